"""The network in this directory as a PyTorch module; needs torch alone.

  model = model_torch.load()  # float32, on the CPU, in evaluation mode
  logits = model(model_torch.normalize(images))  # uint8, (B, height, width, C)

Parameters have timm's names and layouts. Letters: `B` batch, `N` tokens, `D`
width, `F` MLP width, `H` heads, `K` head dim, `C` channels of an image.
"""

import json
import pathlib
import types

import torch
from torch import nn
from torch.nn import functional

HERE = pathlib.Path(__file__).resolve().parent
TYPES = {'F32': torch.float32, 'I8': torch.int8}


class Attention(nn.Module):
  """Self-attention, with relative position if there are tables for it.

  Then a query sees two more vectors beside each key and each value: those for
  the distances in rows and in columns, at `index_2NN` in two tables.
  """

  def __init__(self, width, heads, head_dim, distance, index_2NN):
    super().__init__()
    self.heads, self.scale, self.distance = heads, head_dim**-0.5, distance
    self.qkv = nn.Linear(width, 3 * heads * head_dim)
    self.proj = nn.Linear(heads * head_dim, width)
    if distance:
      self.register_buffer('index_2NN', index_2NN, persistent=False)
      tables = torch.zeros(2, 2, 2 * distance + 2, head_dim)
      self.position = nn.Parameter(tables)

  def forward(self, x_BND):
    qkv = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1))
    q_BHNK, k_BHNK, v_BHNK = qkv.permute(2, 0, 3, 1, 4)
    if self.distance:
      tables, (rows, columns) = self.position, self.index_2NN
      key_NNK, value_NNK = tables[:, 0, rows] + tables[:, 1, columns]
      near_BHNN = torch.einsum('bhnk,nmk->bhnm', q_BHNK, key_NNK)
      logits_BHNN = (q_BHNK @ k_BHNK.mT + near_BHNN) * self.scale
      attention_BHNN = logits_BHNN.softmax(-1)
      seen_BHNK = torch.einsum('bhnm,nmk->bhnk', attention_BHNN, value_NNK)
      out_BHNK = attention_BHNN @ v_BHNK + seen_BHNK
    else:
      out_BHNK = functional.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)
    return self.proj(out_BHNK.transpose(1, 2).flatten(2))


class Block(nn.Module):
  """A transformer layer that normalizes the input of each branch."""

  def __init__(self, width, mlp_dim, eps, attention):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
    up, down = nn.Linear(width, mlp_dim), nn.Linear(mlp_dim, width)
    self.attn, self.mlp = attention, nn.ModuleDict({'fc1': up, 'fc2': down})

  def forward(self, x_BND):
    x_BND = x_BND + self.attn(self.norm1(x_BND))
    hidden_BNF = functional.gelu(self.mlp['fc1'](self.norm2(x_BND)))
    return x_BND + self.mlp['fc2'](hidden_BNF)


class VisionTransformer(nn.Module):
  """The network of a description, in the sizes that its tensors have."""

  def __init__(self, description, tensors):
    super().__init__()
    g = types.SimpleNamespace(**description['geometry'])
    pool, first_patch = description['pool'], g.class_token + g.registers
    self.pooled = slice(0, 1) if pool == 'cls' else slice(first_patch, None)
    width, patch = tensors['pos_embed'].shape[-1], g.patch_size
    embedding = nn.Conv2d(g.channels, width, patch, stride=patch)
    self.patch_embed = nn.ModuleDict({'proj': embedding})
    for name in ('cls_token', 'reg_token', 'pos_embed'):
      there = nn.Parameter(tensors[name]) if name in tensors else None
      self.register_parameter(name, there)
    head_dim, distance = description['head_dim'], g.max_relative_position
    index_2NN = table_index(g.image_size // patch, first_patch, distance)
    self.blocks = nn.ModuleList()
    for i, heads in enumerate(description['num_heads']):
      attention = Attention(width, heads, head_dim, distance, index_2NN)
      mlp_dim = len(tensors[f'blocks.{i}.mlp.fc1.bias'])
      self.blocks.append(Block(width, mlp_dim, g.norm_eps, attention))
    self.norm, self.fc_norm = nn.LayerNorm(width, g.norm_eps), nn.Identity()
    if pool == 'fc_norm':
      self.norm, self.fc_norm = self.fc_norm, self.norm
    classes = g.num_classes
    self.head = nn.Linear(width, classes) if classes else nn.Identity()

  def forward_features(self, images_BCHW):
    """All tokens, normalized unless the norm follows the pooling."""
    patches_BND = self.patch_embed['proj'](images_BCHW).flatten(2).mT
    first = [t for t in (self.cls_token, self.reg_token) if t is not None]
    first = [t.expand(len(patches_BND), -1, -1) for t in first]
    x_BND = torch.cat([*first, patches_BND], 1) + self.pos_embed
    for block in self.blocks:
      x_BND = block(x_BND)
    return self.norm(x_BND)

  def forward(self, images_BCHW):
    """Logits; the pooled features if there are no classes."""
    pooled_BD = self.forward_features(images_BCHW)[:, self.pooled].mean(1)
    return self.head(self.fc_norm(pooled_BD))


def table_index(grid, first_patch, most):
  """Entries in both tables for each pair; 0 if one token is no patch."""
  place_2N = torch.cartesian_prod(*[torch.arange(grid)] * 2).T
  distance = (place_2N[:, None] - place_2N[:, :, None]).clamp(-most, most)
  return functional.pad(distance + most + 1, (first_patch, 0, first_patch, 0))


def normalize(images_BHWC):
  """The module's input, (B, C, height, width), from uint8 images."""
  how = json.loads((HERE / 'preprocessing.json').read_text())
  device = images_BHWC.device
  mean, std = (torch.tensor(how[n], device=device) for n in ('mean', 'std'))
  return ((images_BHWC / 255 - mean) / std).permute(0, 3, 1, 2)


def read(path):
  """Tensors of a safetensors file by name; matrices of bytes times scales."""
  data, tensors = bytearray(path.read_bytes()), {}
  start = 8 + int.from_bytes(data[:8], 'little')
  for name, entry in json.loads(data[8:start]).items():
    first, last = entry['data_offsets']
    values = data[start + first : start + last]
    values = torch.frombuffer(values, dtype=TYPES[entry['dtype']])
    tensors[name] = values.reshape(entry['shape'])
  for name in [name for name in tensors if name.endswith('_scale')]:
    matrix = name.removesuffix('_scale')
    tensors[matrix] = tensors[matrix] * tensors.pop(name)
  return tensors


def load(weights='model.safetensors', directory=HERE):
  """The module with the weights of a file, such as `model_int8.safetensors`."""
  description = json.loads((directory / 'architecture.json').read_text())
  tensors = read(directory / weights)
  model = VisionTransformer(description, tensors)
  model.load_state_dict(tensors)
  return model.eval()
