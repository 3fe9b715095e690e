// From images to probabilities: preprocessing as in training, and the networks.

/** Rounds halves to even, as NumPy and Python do. */
function rint(x) {
  const down = Math.floor(x);
  return x - down === 0.5 ? down + (down % 2) : Math.round(x);
}

/**
 * How to resize a line of pixels: for each new pixel, the first old one that
 * counts, and the weights from there on.
 */
export function resizing(pixels, size) {
  const step = pixels / size;
  return Array.from({length: size}, (_, i) => {
    if (step < 2) { // Linear between the two nearest.
      const center = step * (i + 0.5) - 0.5;
      const clipped = Math.min(Math.max(center, 0), pixels - 1);
      const first = Math.floor(clipped), part = clipped - first;
      return {first, weights: part ? [1 - part, part] : [1]};
    }
    const start = step * i, end = step * (i + 1); // The mean of the covered ones.
    const first = Math.floor(start), weights = [];
    for (let p = first; p < Math.min(Math.ceil(end), pixels); p++) {
      weights.push((Math.min(end, p + 1) - Math.max(start, p)) / step);
    }
    return {first, weights};
  });
}

/** The square of an image that the network sees: left, top, side. */
export function crop(width, height, share) {
  const side = Math.max(1, rint(share * Math.min(width, height)));
  return [Math.floor((width - side) / 2), Math.floor((height - side) / 2), side];
}

/**
 * A network's input: bytes of (size, size, channels), from a square of RGBA.
 * `how` has the fields of preprocessing.json.
 */
export function toInput(rgba, side, how) {
  const {image_size: size, channels} = how;
  const planes = Array.from({length: channels}, () => new Float64Array(side * side));
  for (let i = 0; i < side * side; i++) {
    const [r, g, b] = rgba.subarray(4 * i, 4 * i + 3);
    if (channels === 1) {
      planes[0][i] = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
    } else {
      planes[0][i] = r, planes[1][i] = g, planes[2][i] = b;
    }
  }
  const rows = resizing(side, size), input = new Uint8Array(size * size * channels);
  planes.forEach((plane, channel) => {
    const narrow = new Float64Array(side * size);
    for (let y = 0; y < side; y++) {
      rows.forEach(({first, weights}, x) => {
        narrow[y * size + x] = weights.reduce(
          (sum, w, i) => sum + w * plane[y * side + first + i], 0);
      });
    }
    rows.forEach(({first, weights}, y) => {
      for (let x = 0; x < size; x++) {
        const value = weights.reduce(
          (sum, w, i) => sum + w * narrow[(first + i) * size + x], 0);
        input[(y * size + x) * channels + channel] = rint(value);
      }
    });
  });
  return input;
}

/** Probabilities of logits. */
export function softmax(logits) {
  const most = Math.max(...logits);
  const exponentials = Array.from(logits, (x) => Math.exp(x - most));
  const sum = exponentials.reduce((a, b) => a + b);
  return exponentials.map((x) => x / sum);
}

/** The networks of demo.json, each loaded when it is first asked for. */
export class Networks {
  constructor(ort, about) {
    this.ort = ort;
    this.about = about;
    this.sessions = new Map();
    this.busy = Promise.resolve();
  }

  /** Logits of `count` images, one array after the other, and milliseconds. */
  async logits(index, input, count = 1) {
    const {image_size: size, channels, networks} = this.about;
    const model = networks[index].model;
    if (!this.sessions.has(model)) {
      this.sessions.set(model, this.ort.InferenceSession.create(model));
    }
    const session = await this.sessions.get(model);
    const shape = [count, size, size, channels];
    const images = new this.ort.Tensor('uint8', input, shape);
    // One run at a time, so that none is measured while another one works.
    const turn = this.busy.then(async () => {
      const start = performance.now();
      const {logits} = await session.run({images});
      return {logits: logits.data, milliseconds: performance.now() - start};
    });
    this.busy = turn.catch(() => {});
    return turn;
  }

  /** Probabilities of one image, and the median time of a few runs. */
  async classify(index, input) {
    const {logits} = await this.logits(index, input); // The first is slower.
    const times = [];
    for (const start = performance.now(); times.length < 5;) {
      times.push((await this.logits(index, input)).milliseconds);
      if (performance.now() - start > 300) break;
    }
    times.sort((a, b) => a - b);
    const milliseconds = times[Math.floor(times.length / 2)];
    return {probabilities: softmax(logits), milliseconds};
  }
}
