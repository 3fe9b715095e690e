"""Times train steps of dense vision transformers in PyTorch, for `speed.py`.

  pip install -r benchmarks/requirements-torch.txt
  python benchmarks/torch_vit.py 224/16 SUBNETS

SUBNETS is the JSON that `speed.py --peer` passes; prints one JSON line. Each
network has the subnet's size and its own weights, and runs eagerly in float32
on all cores, with exact GELU, LayerNorm, mean pooling, and AutoFormer's 2-D
relative position for keys and values (arXiv 2107.00651): a dense (N, N, 64)
tensor of vectors, gathered from tables of 2m + 2. A step is cross entropy,
gradients and AdamW.
"""

import json
import os
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional

HEAD_DIM, MAX_DISTANCE, STEPS = 64, 14, 3


class RelativePosition(nn.Module):
  def __init__(self, grid):
    super().__init__()
    shape = 2 * MAX_DISTANCE + 2, HEAD_DIM
    self.vertical = nn.Parameter(0.02 * torch.randn(shape))
    self.horizontal = nn.Parameter(0.02 * torch.randn(shape))
    place = torch.arange(grid * grid)
    for name, at in ('iv', place // grid), ('ih', place % grid):
      distance = (at - at[:, None]).clamp(-MAX_DISTANCE, MAX_DISTANCE)
      # Entry 0 belongs to pairs with the class token.
      index = functional.pad(distance + MAX_DISTANCE + 1, (1, 0, 1, 0))
      self.register_buffer(name, index)

  def forward(self):
    return self.vertical[self.iv] + self.horizontal[self.ih]


class Attention(nn.Module):
  def __init__(self, width, heads, grid):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * heads * HEAD_DIM)
    self.keys, self.values = RelativePosition(grid), RelativePosition(grid)
    self.out = nn.Linear(heads * HEAD_DIM, width)

  def forward(self, x):
    b, n, _ = x.shape
    h, k = self.heads, HEAD_DIM
    query, key, value = (
      self.qkv(x).reshape(b, n, 3, h, k).permute(2, 0, 3, 1, 4)
    )
    logits = query @ key.transpose(-2, -1)
    # (n, b*h, k) @ (n, k, n): each query times the vectors of its distances.
    seen = query.permute(2, 0, 1, 3).reshape(n, b * h, k)
    near = seen @ self.keys().transpose(1, 2)
    logits = logits + near.transpose(0, 1).reshape(b, h, n, n)
    attention = (logits * k**-0.5).softmax(-1)
    given = attention.permute(2, 0, 1, 3).reshape(n, b * h, n) @ self.values()
    out = attention @ value + given.transpose(0, 1).reshape(b, h, n, k)
    return self.out(out.transpose(1, 2).reshape(b, n, h * k))


class Block(nn.Module):
  def __init__(self, width, heads, mlp_dim, grid):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.attention = Attention(width, heads, grid)
    self.mlp = nn.Sequential(
      nn.Linear(width, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, width)
    )

  def forward(self, x):
    x = x + self.attention(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
  def __init__(self, grid, patch, case, subnet):
    super().__init__()
    width = subnet['embed_dim']
    self.patches = nn.Conv2d(case['channels'], width, patch, patch)
    self.token = nn.Parameter(torch.zeros(1, 1, width))
    self.position = nn.Parameter(0.02 * torch.randn(1, grid**2 + 1, width))
    self.blocks = nn.Sequential(
      *(
        Block(width, heads, mlp_dim, grid)
        for heads, mlp_dim in zip(subnet['num_heads'], subnet['mlp_dim'])
      )
    )
    self.norm = nn.LayerNorm(width)
    self.head = nn.Linear(width, case['classes'])

  def forward(self, images):
    x = self.patches(images).flatten(2).transpose(1, 2)
    x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
    return self.head(self.norm(self.blocks(x))[:, 1:].mean(1))


def train_seconds(size, patch, case, subnet):
  """Median seconds of a few steps, after one that is not counted."""
  model = VisionTransformer(size // patch, patch, case, subnet)
  optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05)
  images = torch.randn(case['batch'], case['channels'], size, size)
  labels = torch.arange(case['batch']) % case['classes']
  seconds = []
  for _ in range(1 + STEPS):
    start = time.perf_counter()
    optimizer.zero_grad()
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[1:])


def main(geometry, case):
  torch.set_num_threads(os.cpu_count())
  torch.manual_seed(0)
  size, patch = map(int, geometry.split('/'))
  case = json.loads(case)
  print(
    json.dumps(
      {
        name: train_seconds(size, patch, case, subnet)
        for name, subnet in case['subnets'].items()
      }
    )
  )


if __name__ == '__main__':
  if len(sys.argv) != 3:
    sys.exit(__doc__)
  main(*sys.argv[1:])
