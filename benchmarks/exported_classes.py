"""Compares the classes that the files of an export name for all test images.

  python benchmarks/exported_classes.py WORKDIR [--chromium=PROGRAM]

WORKDIR holds the run and what `--mode=export` wrote with `--config.export.int8`
and `--config.export.demo`. For each network, the classes by `model.jax_export`
are compared with those by the files in ONNX, by `model_torch.py`, and by the
page in a headless Chromium, whose onnxruntime-web has to be a local copy
(`--config.export.onnxruntime_web`): no other address than this machine's is
asked. Exits 1 if a file of float32 weights names another class.

Needs torch and the packages of the extra `onnx` in one environment.

Letters: `B` images, `C` classes.
"""

import functools
import http.server
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app
from absl import flags
import jax
from jax import export as jax_export
import numpy as np
import onnxruntime

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import text_table
from focusformer_jax.data import datasets
from focusformer_jax.deploy import export
from focusformer_jax.models import vit

CHROMIUM = flags.DEFINE_string('chromium', 'chromium', 'The browser.')
BATCH = 500
ARGUMENTS = (
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--no-first-run',
)
# Classifies `images.bin` with every network of the page, by the page's code.
SCRIPT = """<!doctype html><script type="module">
import {Networks} from './classify.js';
const about = await (await fetch('demo.json')).json();
const ort = await import(about.runtime);
ort.env.wasm.numThreads = 1;
const images = new Uint8Array(await (await fetch('images.bin')).arrayBuffer());
const networks = new Networks(ort, about);
const size = about.image_size ** 2 * about.channels;
const found = {};
for (const [index, {model}] of about.networks.entries()) {
  found[model] = [];
  for (let i = 0; i < images.length; i += BATCH * size) {
    const batch = images.slice(i, i + BATCH * size);
    const {logits} = await networks.logits(index, batch, batch.length / size);
    for (let row = 0; row < logits.length; row += about.classes.length) {
      const one = logits.slice(row, row + about.classes.length);
      found[model].push(one.indexOf(Math.max(...one)));
    }
  }
}
await fetch('found', {method: 'POST', body: JSON.stringify(found)});
</script>"""


def by_batch(classify, images_BHWC: np.ndarray) -> np.ndarray:
  """Classes, by a function from images to logits."""
  starts = range(0, len(images_BHWC), BATCH)
  return np.concatenate(
    [np.argmax(classify(images_BHWC[i : i + BATCH]), -1) for i in starts]
  )


def by_jax(directory: pathlib.Path, images_BHWC: np.ndarray) -> np.ndarray:
  artifact = (directory / export.ARTIFACT).read_bytes()
  return by_batch(jax.jit(jax_export.deserialize(artifact).call), images_BHWC)


def by_onnx(
  file: str, directory: pathlib.Path, images_BHWC: np.ndarray
) -> np.ndarray:
  session = onnxruntime.InferenceSession(directory / file)
  return by_batch(
    lambda images: session.run(None, {'images': images})[0], images_BHWC
  )


def by_torch(
  file: str, directory: pathlib.Path, images_BHWC: np.ndarray
) -> np.ndarray:
  import torch

  spec = importlib.util.spec_from_file_location(
    'model_torch', directory / 'model_torch.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  model = module.load(file)

  @torch.no_grad()
  def classify(images):
    return model(module.normalize(torch.from_numpy(images))).numpy()

  return by_batch(classify, images_BHWC)


def by_page(
  page: pathlib.Path, images_BHWC: np.ndarray
) -> dict[str, np.ndarray]:
  """Classes by name of a network, from a browser that runs the page's code."""
  found, done = {}, threading.Event()

  class Handler(http.server.SimpleHTTPRequestHandler):
    def do_POST(self):
      body = self.rfile.read(int(self.headers['Content-Length']))
      self.send_response(204)
      self.end_headers()
      found.update(json.loads(body))
      done.set()

    def log_message(self, *args):
      pass

  with tempfile.TemporaryDirectory() as folder:
    shutil.copytree(page, folder, dirs_exist_ok=True)
    root = pathlib.Path(folder)
    (root / 'images.bin').write_bytes(images_BHWC.tobytes())
    script = SCRIPT.replace('BATCH', str(BATCH))
    (root / 'check.html').write_text(script)
    serve = functools.partial(Handler, directory=folder)
    with (
      http.server.ThreadingHTTPServer(('127.0.0.1', 0), serve) as server,
      tempfile.TemporaryDirectory() as profile,
    ):
      threading.Thread(target=server.serve_forever, daemon=True).start()
      address = f'http://127.0.0.1:{server.server_port}/check.html'
      browser = subprocess.Popen(
        [
          CHROMIUM.value,
          *ARGUMENTS,
          f'--user-data-dir={profile}',
          '--remote-debugging-port=0',  # Keeps it open.
          address,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
      )
      try:
        if not done.wait(1200):
          raise SystemExit('wanted an answer of the page, found none')
      finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
  return {model: np.asarray(classes) for model, classes in found.items()}


def main(argv: list[str]) -> int:
  if len(argv) != 2:
    sys.exit(__doc__)
  workdir = pathlib.Path(argv[1])
  settings = config_lib.parse(atomic_files.read_json(workdir / 'config.json'))
  dataset = datasets.open_dataset(settings.data, settings.augment.resized_crop)
  test = dataset.split('test')
  batch = test.batch(np.arange(len(test)))
  images_BHWC, labels_B = batch['image'], batch['label']
  page = workdir / 'export' / 'demo'
  files = {
    export.ONNX: functools.partial(by_onnx, export.ONNX),
    'model_torch.py': functools.partial(by_torch, vit.WEIGHTS),
    export.INT8_ONNX: functools.partial(by_onnx, export.INT8_ONNX),
    vit.INT8_WEIGHTS: functools.partial(by_torch, vit.INT8_WEIGHTS),
  }
  rows, wrong = [], 0
  from_page = by_page(page, images_BHWC)
  for model, page_B in from_page.items():
    directory = workdir / 'export' / model.removesuffix('.onnx')
    wanted_B = by_jax(directory, images_BHWC)
    found = {name: by(directory, images_BHWC) for name, by in files.items()}
    found['page'] = page_B
    for name, classes_B in found.items():
      others = int((classes_B != wanted_B).sum())
      wrong += others * ('int8' not in name)
      right = (classes_B == labels_B).mean()
      rows.append([directory.name, name, str(others), f'{right:.2%}'])
  heads = ['network', 'file', f'other classes of {len(labels_B):,}', 'accuracy']
  print(text_table.align([heads, *rows]))
  return int(wrong > 0)


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)))
