"""Trains a small vision transformer in timm's own code, for `pruning.py`.

  pip install -r benchmarks/requirements-torch.txt
  python benchmarks/timm_vit.py DIRECTORY

Runs in an environment of its own, without jax. Reads `train.npz` and `test.npz`
of the directory, which `pruning.py data` wrote; writes the state dict to
`vit.safetensors`, and epochs, seconds and test accuracy to `vit.json`. The form
is that of timm's `vit_tiny_patch16_224`, narrower: pre-norm, class token, exact
GELU, biases everywhere. The recipe: AdamW, linear warm-up and cosine,
mirrored images.
"""

import argparse
import json
import math
import pathlib
import time

import numpy as np
import safetensors.torch
from timm.models import vision_transformer
import torch
from torch.nn import functional

MODEL = {
  'img_size': 28,
  'patch_size': 7,
  'in_chans': 1,
  'num_classes': 10,
  'embed_dim': 96,
  'depth': 6,
  'num_heads': 6,
}
BATCH, LEARNING_RATE, WEIGHT_DECAY, WARMUP = 128, 2e-3, 0.05, 200
MEAN, STD = 0.286, 0.353


def load(path: pathlib.Path) -> tuple[torch.Tensor, torch.Tensor]:
  """Normalized images in PyTorch's layout, and labels."""
  with np.load(path) as file:
    images = torch.from_numpy(file['image']).permute(0, 3, 1, 2)
    labels = torch.from_numpy(file['label']).long()
  return (images.float() / 255 - MEAN) / STD, labels


def learning_rate(step: int, steps: int) -> float:
  """Share of the peak: linear warm-up, then a cosine to 0."""
  if step < WARMUP:
    return step / WARMUP
  return 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
  parser.add_argument('directory', type=pathlib.Path)
  parser.add_argument('--epochs', type=int, default=10)
  parser.add_argument('--threads', type=int, default=1)
  args = parser.parse_args()
  torch.set_num_threads(args.threads)
  torch.manual_seed(0)
  images, labels = load(args.directory / 'train.npz')
  model = vision_transformer.VisionTransformer(**MODEL)
  vectors = [p for p in model.parameters() if p.squeeze().ndim < 2]
  matrices = [p for p in model.parameters() if p.squeeze().ndim > 1]
  optimizer = torch.optim.AdamW(
    [
      {'params': matrices, 'weight_decay': WEIGHT_DECAY},
      {'params': vectors, 'weight_decay': 0.0},
    ],
    LEARNING_RATE,
  )
  per_epoch = len(labels) // BATCH
  steps = args.epochs * per_epoch
  schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: learning_rate(step, steps)
  )
  start = time.monotonic()
  for step in range(steps):
    if step % per_epoch == 0:
      order = torch.randperm(len(labels))
    chosen = order[step % per_epoch * BATCH :][:BATCH]
    x, flip = images[chosen], torch.rand(BATCH, 1, 1, 1) < 0.5
    loss = functional.cross_entropy(
      model(torch.where(flip, x.flip(-1), x)), labels[chosen]
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 100 == 0:
      seconds = time.monotonic() - start
      print(f'step {step}/{steps} loss {loss:.3f} {seconds:.0f} s', flush=True)
  seconds = time.monotonic() - start
  model.eval()
  images, labels = load(args.directory / 'test.npz')
  with torch.inference_mode():
    logits = torch.cat([model(part) for part in images.split(1000)])
  accuracy = (logits.argmax(-1) == labels).float().mean().item()
  safetensors.torch.save_file(
    model.state_dict(), args.directory / 'vit.safetensors'
  )
  facts = {
    'epochs': args.epochs,
    'steps': steps,
    'seconds': round(seconds),
    'test_accuracy': accuracy,
  }
  (args.directory / 'vit.json').write_text(json.dumps(facts, indent=2) + '\n')
  print(facts)


if __name__ == '__main__':
  main()
