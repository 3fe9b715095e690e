"""Times train steps of dense vision transformers in PyTorch.

  pip install -r benchmarks/requirements-torch.txt
  python benchmarks/torch_vit.py 224/16 CASE

CASE is JSON, as `speed.py --peer` and `accelerator.py` pass it: batch,
channels, classes, head_dim and, under `subnets`, the sizes of each. Prints one
JSON line: the seconds of a step of each subnet. Each network has the subnet's
size and its own weights, exact GELU, LayerNorm, mean pooling, and AutoFormer's
2-D relative position for keys and values (arXiv 2107.00651): a dense
(N, N, head_dim) tensor of vectors, gathered from tables of 2m + 2. A step is
cross entropy, gradients and AdamW.

It runs eagerly in float32 on all cores, unless CASE says otherwise: `device` is
`cpu` or `cuda`, `bf16` computes under autocast with bfloat16, and `compile`
compiles the network.
"""

import json
import os
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional

MAX_DISTANCE = 14
# Measurements of a figure, after one that is not counted, and the steps of each
# measurement: a GPU runs them without waiting for the host.
MEASUREMENTS, STEPS = 3, {'cpu': 1, 'cuda': 10}


class RelativePosition(nn.Module):
  def __init__(self, head_dim, grid):
    super().__init__()
    shape = 2 * MAX_DISTANCE + 2, head_dim
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
  def __init__(self, width, heads, head_dim, grid):
    super().__init__()
    self.heads, self.head_dim = heads, head_dim
    self.qkv = nn.Linear(width, 3 * heads * head_dim)
    self.keys = RelativePosition(head_dim, grid)
    self.values = RelativePosition(head_dim, grid)
    self.out = nn.Linear(heads * head_dim, width)

  def forward(self, x):
    b, n, _ = x.shape
    h, k = self.heads, self.head_dim
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
  def __init__(self, width, heads, head_dim, mlp_dim, grid):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.attention = Attention(width, heads, head_dim, grid)
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
        Block(width, heads, case['head_dim'], mlp_dim, grid)
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
  """Median seconds of a step."""
  device = torch.device(case.get('device', 'cpu'))
  model = VisionTransformer(size // patch, patch, case, subnet).to(device)
  optimizer = torch.optim.AdamW(
    model.parameters(), 1e-4, weight_decay=0.05, fused=device.type == 'cuda'
  )
  if case.get('compile', False):
    torch.compiler.reset()  # Sizes of the network before do not matter.
    model = torch.compile(model, dynamic=False)
  shape = case['batch'], case['channels'], size, size
  images = torch.randn(shape, device=device)
  labels = torch.arange(case['batch'], device=device) % case['classes']

  def step():
    optimizer.zero_grad()
    with torch.autocast(
      device.type, torch.bfloat16, enabled=case.get('bf16', False)
    ):
      loss = functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()

  def measure():
    start = time.perf_counter()
    for _ in range(STEPS[device.type]):
      step()
    if device.type == 'cuda':
      torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS[device.type]

  return statistics.median([measure() for _ in range(1 + MEASUREMENTS)][1:])


def main(geometry, case):
  torch.set_num_threads(len(os.sched_getaffinity(0)))
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
