"""State dicts, from names to arrays, and the files that PyTorch has of them."""

from collections.abc import Iterator, Mapping
import io
import itertools
import re
import warnings

from etils import epath
from etils import epy
import numpy as np

from focusformer_jax import errors

with epy.lazy_imports():
  import safetensors

StateDict = Mapping[str, np.ndarray]

# How types begin in safetensors files, and in NumPy.
TYPES = {'F': 'float', 'BF': 'bfloat', 'I': 'int', 'U': 'uint'}


def _read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
  # `safetensors.numpy.load` knows no bfloat16.
  try:
    tensors = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise errors.UserError(
      f'wanted safetensors in {path}, found {errors.first_line(error)}'
    ) from error
  arrays = {}
  for name, tensor in tensors:
    parts = re.fullmatch('([A-Z]+)([0-9]+)', tensor['dtype'])
    if not parts or parts[1] not in TYPES:
      raise errors.UserError(
        f'wanted {", ".join(TYPES)} and a number of bits, such as F16, in '
        f'{path}, found {tensor["dtype"]} under {name!r}'
      )
    dtype = np.dtype(f'{TYPES[parts[1]]}{parts[2]}')
    array = np.frombuffer(tensor['data'], dtype).reshape(tensor['shape'])
    arrays[name] = array.astype(np.float32)
  return arrays


def read(path: epath.Path) -> dict[str, np.ndarray]:
  """Reads a state dict from a `.safetensors` or a `.pth` file, as float32.

  Nothing in a file is executed. A `.pth` file takes torch to read; it must hold
  nothing but tensors, either by name or, as AutoFormer saves them, below a key
  'model'.

  Raises:
    UserError: There is no such file, torch is missing, or the file holds
      anything but tensors of numbers.
  """
  if not path.exists():
    raise errors.UserError(f'wanted a file of weights, found none at {path}')
  if path.suffix == '.safetensors':
    return _read_safetensors(path)
  try:
    import torch  # Only here.
  except ImportError as error:
    raise errors.UserError(
      f'wanted torch to read {path}, found none; pip install torch, or make a '
      '.safetensors file of it where torch is'
    ) from error

  def refuse(found: str) -> errors.UserError:
    return errors.UserError(
      f'wanted tensors alone in {path}, found {found}; where you trust the '
      "file, save its 'model' by itself"
    )

  try:
    with warnings.catch_warnings(action='ignore'):  # Of unusual pickles.
      loaded = torch.load(
        io.BytesIO(path.read_bytes()), 'cpu', weights_only=True
      )
  except Exception as error:  # torch raises anything on what it cannot read.
    # The first line may advise to load the file unsafely.
    message = str(error)
    reason = re.search(r'GLOBAL (\S+)', message)
    reason = reason or re.search(r'Unpickler error:\s*(.+)', message)
    raise refuse(reason[1] if reason else errors.first_line(error)) from error
  if isinstance(loaded, dict) and isinstance(loaded.get('model'), dict):
    loaded = loaded.pop('model') | loaded
  if not isinstance(loaded, dict):
    raise refuse(type(loaded).__name__)
  for name, value in loaded.items():
    if not isinstance(value, torch.Tensor):
      raise refuse(f'{type(value).__name__} under {name!r}')
  return {
    name: tensor.detach().to(torch.float32).numpy()
    for name, tensor in loaded.items()
  }


def by_layer(state_dict: StateDict) -> Iterator[tuple[str, StateDict]]:
  """The prefix `blocks.<layer>.` of each layer, and its arrays by what follows.

  Ends at the first layer that has no arrays.
  """
  for i in itertools.count():
    prefix = f'blocks.{i}.'
    layer = {
      name.removeprefix(prefix): array
      for name, array in state_dict.items()
      if name.startswith(prefix)
    }
    if not layer:
      return
    yield prefix, layer
