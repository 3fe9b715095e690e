// The page: an image and a budget in, a class and its cost out.

import {Networks, crop, toInput} from './classify.js';

const get = (id) => document.getElementById(id);
const number = (n) => n.toLocaleString('en');
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const time = (ms) => `${ms < 10 ? ms.toFixed(2) : ms.toFixed(0)} ms`;
const bytes = (n) => (n < 1e6 ? `${(n / 1e3).toFixed(0)} kB` : `${(n / 1e6).toFixed(1)} MB`);

function element(tag, text = '', className = '') {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

const pad = get('pad');
const pen = pad.getContext('2d', {willReadFrequently: true});
let about, networks, input;
let blank = true; // Nothing is drawn yet.
let round = 0; // Counts images; results of an older one are dropped.

function clear() {
  pen.fillStyle = '#000';
  pen.fillRect(0, 0, pad.width, pad.height);
  blank = true;
}

/** Shows an image, and classifies its pixels as they are in the file. */
async function show(blob) {
  const image = await createImageBitmap(blob, {
    colorSpaceConversion: 'none',
    imageOrientation: 'none',
    premultiplyAlpha: 'none',
  });
  const [left, top, side] = crop(image.width, image.height, about.center_crop);
  const square = new OffscreenCanvas(side, side);
  const context = square.getContext('2d');
  context.drawImage(image, -left, -top);
  clear();
  pen.imageSmoothingEnabled = side > pad.width;
  pen.drawImage(square, 0, 0, pad.width, pad.height);
  classify(context.getImageData(0, 0, side, side).data, side);
}

function classifyDrawing() {
  const {data} = pen.getImageData(0, 0, pad.width, pad.height);
  classify(data, pad.width);
}

function classify(rgba, side) {
  input = toInput(rgba, side, about);
  showSeen();
  round++;
  update();
}

/** Draws what the network sees. */
function showSeen() {
  const {image_size: size, channels} = about;
  const canvas = get('seen');
  canvas.width = canvas.height = size;
  const pixels = new ImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++) {
      pixels.data[4 * i + c] = input[i * channels + (channels === 1 ? 0 : c)];
    }
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext('2d').putImageData(pixels, 0, 0);
}

const cost = (network) => Object.entries(network.costs);

function showBudget() {
  const network = about.networks[get('budget').value];
  const words = `at most ${number(network.budget)} ${about.budget}`;
  get('budget-text').textContent = words;
  get('budget').setAttribute('aria-valuetext', words);
  get('facts').replaceChildren(...[
    ...cost(network).map(([name, value]) => [name, number(value)]),
    ['test accuracy', percent(network.accuracy)],
    ['file', bytes(network.bytes)],
    ['time here', '…'],
  ].flatMap(([name, value]) => {
    const group = element('div');
    group.append(element('dt', name), element('dd', value));
    return [group];
  }));
  [...get('rows').children].forEach((row, i) => {
    row.setAttribute('aria-current', String(i === Number(get('budget').value)));
  });
}

function showAnswer({probabilities, milliseconds}) {
  const order = [...probabilities.keys()]
    .sort((a, b) => probabilities[b] - probabilities[a]);
  get('answer').textContent = about.classes[order[0]];
  get('bars').replaceChildren(...order.slice(0, 5).map((c) => {
    const row = element('li'), bar = element('div', '', 'bar');
    const filled = element('span');
    filled.style.width = `${100 * probabilities[c]}%`;
    bar.append(filled);
    row.append(
      element('span', about.classes[c], 'name'),
      bar,
      element('span', percent(probabilities[c]), 'share'),
    );
    return row;
  }));
  get('facts').lastChild.lastChild.textContent = time(milliseconds);
}

/** Classifies the image with the network of the budget, then with all. */
async function update() {
  showBudget();
  if (!input) return;
  const mine = ++round, chosen = Number(get('budget').value);
  get('problem').textContent = '';
  try {
    const answer = await networks.classify(chosen, input);
    if (mine !== round) return;
    showAnswer(answer);
    for (let i = 0; i < about.networks.length; i++) {
      const found = i === chosen ? answer : await networks.classify(i, input);
      if (mine !== round) return;
      const best = found.probabilities.indexOf(Math.max(...found.probabilities));
      const cells = get('rows').children[i].children;
      cells[cells.length - 3].textContent = about.classes[best];
      cells[cells.length - 2].textContent = percent(found.probabilities[best]);
      cells[cells.length - 1].textContent = time(found.milliseconds);
    }
  } catch (error) {
    get('problem').textContent = `The network did not run: ${error.message}`;
  }
}

function listen() {
  let last = null;
  const place = (event) => {
    const box = pad.getBoundingClientRect(), scale = pad.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  const draw = (event) => {
    const now = place(event);
    pen.strokeStyle = '#fff';
    pen.lineWidth = pad.width / 7;
    pen.lineCap = pen.lineJoin = 'round';
    pen.beginPath();
    pen.moveTo(...last);
    pen.lineTo(...now);
    pen.stroke();
    last = now;
  };
  pad.addEventListener('pointerdown', (event) => {
    if (blank) clear();
    blank = false;
    pad.setPointerCapture(event.pointerId);
    last = place(event);
    draw(event);
  });
  pad.addEventListener('pointermove', (event) => last && draw(event));
  for (const name of ['pointerup', 'pointercancel']) {
    pad.addEventListener(name, () => {
      if (last) classifyDrawing();
      last = null;
    });
  }
  get('clear').addEventListener('click', () => {
    clear();
    classifyDrawing();
  });
  get('file').addEventListener('change', ({target}) => {
    if (target.files.length) read(target.files[0]);
  });
  const read = (blob) => show(blob).catch(() => {
    get('problem').textContent = 'Wanted an image, found another kind of file.';
  });
  pad.addEventListener('dragover', (event) => {
    event.preventDefault();
    pad.classList.add('over');
  });
  pad.addEventListener('dragleave', () => pad.classList.remove('over'));
  pad.addEventListener('drop', (event) => {
    event.preventDefault();
    pad.classList.remove('over');
    if (event.dataTransfer.files.length) read(event.dataTransfer.files[0]);
  });
  get('budget').addEventListener('input', update);
}

function fill() {
  const {networks: rows, classes, image_size: size, data} = about;
  get('about').textContent = `${rows.length} networks from one training run on `
    + `${data}: ${classes.length} classes, ${size} × ${size} pixels. `
    + 'They run in this browser; no image leaves it.';
  get('seen-text').textContent = `What the network sees: ${size} × ${size} pixels`;
  get('budget').max = rows.length - 1;
  get('budget').value = rows.length - 1;
  get('budgets').replaceChildren(...rows.map((_, i) => {
    const mark = element('option');
    mark.value = i;
    return mark;
  }));
  const costs = cost(rows[0]).map(([name]) => name);
  const heads = ['budget', ...costs, 'test accuracy', 'class', 'probability', 'time'];
  get('heads').replaceChildren(...heads.map((name) => {
    const head = element('th', name);
    head.scope = 'col';
    return head;
  }));
  get('rows').replaceChildren(...rows.map((network) => {
    const row = element('tr');
    row.append(...[
      number(network.budget),
      ...cost(network).map(([, value]) => number(value)),
      percent(network.accuracy), '', '', '',
    ].map((text) => element('td', text)));
    return row;
  }));
  get('samples').replaceChildren(...about.samples.map(({file, label}) => {
    const button = element('button'), image = element('img');
    button.type = 'button';
    image.src = file;
    image.alt = `Test image: ${label}`;
    button.title = label;
    button.append(image);
    button.addEventListener('click', async () => {
      read(await (await fetch(file)).blob());
    });
    return button;
  }));
}

try {
  about = await (await fetch('demo.json')).json();
  const ort = await import(about.runtime);
  // More threads need headers that a plain server does not send.
  if (!self.crossOriginIsolated) ort.env.wasm.numThreads = 1;
  networks = new Networks(ort, about);
  clear();
  fill();
  listen();
  showBudget();
  get('samples').firstChild.click();
} catch (error) {
  get('about').textContent = '';
  get('problem').textContent = location.protocol === 'file:'
    ? 'A browser loads networks from a server alone: run python -m http.server '
      + 'in this folder and open http://localhost:8000.'
    : `The page did not load: ${error.message}`;
}
