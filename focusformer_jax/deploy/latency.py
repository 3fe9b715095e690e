"""How long networks take on this device, and the table that says so.

No part of a network is timed alone, where a call's overhead would count for
every layer and neighbors could not be fused. What is timed are whole networks
whose layers are all alike, every choice at full depth and some at half of it,
and the table is what explains their times best.

Letters: `E` embed choices, `H` head choices, `R` ratio choices, `T` networks
timed, `I` rounds of timing.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import platform
import time
from typing import Any

from flax import nnx
import jax
from jaxtyping import Float
import numpy as np
import scipy.optimize

from focusformer_jax import machine
from focusformer_jax import progress
from focusformer_jax.models import supernet as supernet_lib
from focusformer_jax.models import vit
from focusformer_jax.spaces import search_space
from focusformer_jax.training import experiment as experiment_lib


def design(
  space: search_space.SearchSpace,
) -> tuple[search_space.SearchSpace, list[search_space.Architecture]]:
  """Networks whose times tell what stem and layers take.

  For each width, every choice at full depth, in all layers alike, and the
  smallest and the largest at half of it or at the least depth.

  Returns:
    A space of these two depths, and its architectures.
  """
  full = max(2, space.depth[-1])
  half = max(1, min(space.depth[0], full // 2))
  space = dataclasses.replace(space, depth=(half, full))
  layers = list(itertools.product(space.num_heads, space.mlp_ratio))
  ends = dict.fromkeys((layers[0], layers[-1]))
  return space, [
    space.from_json(
      {
        'depth': depth,
        'embed_dim': embed,
        'num_heads': [heads] * depth,
        'mlp_ratio': [ratio] * depth,
      }
    )
    for embed in space.embed_dim
    for depth, chosen in ((half, ends), (full, layers))
    for heads, ratio in chosen
  ]


def fit(
  space: search_space.SearchSpace,
  archs: Sequence[search_space.Architecture],
  microseconds_T: Float[np.ndarray, 'T'],
) -> dict[str, np.ndarray]:
  """The table that explains measured times best.

  For each width, least squares of the relative error, no entry below 0. Where
  times tell the sum of a layer's halves alone, the cheapest halves are equal.

  Args:
    space: Space of the architectures.
    archs: Timed architectures; at least two depths of each width.
    microseconds_T: Measured time of each.

  Returns:
    Whole microseconds: stem int64[E], attention int64[E,H], mlp int64[E,R].
  """
  E, H, R = (
    len(choices)
    for choices in (space.embed_dim, space.num_heads, space.mlp_ratio)
  )
  widths_T = np.array([arch.embed_dim for arch in archs])
  counts = np.ones((len(archs), 1 + H + R))
  for row, arch in zip(counts, archs, strict=True):
    live = slice(space.depth[arch.depth])
    row[1 : 1 + H] = np.bincount(arch.num_heads[live], minlength=H)
    row[1 + H :] = np.bincount(arch.mlp_ratio[live], minlength=R)
  relative = counts / microseconds_T[:, None]
  entries = np.array(
    [
      scipy.optimize.nnls(rows, np.ones(len(rows)))[0]
      for rows in (relative[widths_T == e] for e in range(E))
    ]
  )
  stem_E1, attention_EH, mlp_ER = np.split(entries, [1, 1 + H], axis=1)
  shift_E1 = (mlp_ER.min(1) - attention_EH.min(1))[:, None] / 2
  tables = {
    'stem': stem_E1[:, 0],
    'attention': attention_EH + shift_E1,
    'mlp': mlp_ER - shift_E1,
  }
  return {name: np.rint(t).astype(np.int64) for name, t in tables.items()}


def compile_networks(
  experiment: experiment_lib.Experiment,
  space: search_space.SearchSpace,
  archs: Sequence[search_space.Architecture],
) -> list[Callable[[], jax.Array]]:
  """Extracted networks as programs of one batch that wait for the logits.

  Weights and images are random: their values take no time.
  """
  settings, geometry = experiment.settings, experiment.geometry
  rng, device = np.random.default_rng(0), jax.local_devices()[0]

  def new(leaf):
    return rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)

  supernet = jax.tree.map(
    new,
    jax.eval_shape(
      lambda: supernet_lib.Supernet(
        space,
        geometry,
        pool=settings.supernet.pool,
        dtype=settings.supernet.dtype,
        rngs=nnx.Rngs(0),
      )
    ),
  )
  size = geometry.image_size
  shape = (settings.profile.batch_size, size, size, geometry.channels)
  images = jax.device_put(new(jax.ShapeDtypeStruct(shape, np.float32)), device)

  def program(arch):
    # As a list: the modules' tree would be taken apart again in every call.
    leaves, treedef = jax.tree.flatten(vit.extract(supernet, arch))
    weights = jax.device_put(leaves, device)
    compiled = (
      jax.jit(lambda weights, images: treedef.unflatten(weights)(images))
      .lower(weights, images)
      .compile()
    )
    return lambda: compiled(weights, images).block_until_ready()

  programs = []
  with progress.Progress('compiling', len(archs), 'networks') as show:
    for arch in archs:
      programs.append(program(arch))
      show(len(programs))
  return programs


def measure(
  programs: Sequence[Callable[[], Any]], repeats: int
) -> Float[np.ndarray, 'T']:
  """Typical microseconds of a call of each program.

  Rounds time each of them once, in an order of their own; a call that is not
  timed goes before each. A machine's speed changes from round to round, for all
  of them alike, so times are compared within rounds (`typical`).
  """
  rng = np.random.default_rng(0)
  seconds_IT = np.empty((repeats, len(programs)))
  with progress.Progress('timing', repeats, 'rounds') as show:
    for i in range(repeats):
      for t in rng.permutation(len(programs)):
        programs[t]()
        start = time.perf_counter()
        programs[t]()
        seconds_IT[i, t] = time.perf_counter() - start
      show(i + 1)
  return 1e6 * typical(seconds_IT)


def typical(
  seconds_IT: Float[np.ndarray, 'I T'],
) -> Float[np.ndarray, 'T']:
  """Medians over rounds, each round's slowness taken out of its times first.

  A round is as slow as the median of its times over their own medians.
  """
  slowness_I = np.median(seconds_IT / np.median(seconds_IT, axis=0), axis=1)
  return np.median(seconds_IT / slowness_I[:, None], axis=0)


def device_name() -> str:
  """What programs run on, for people."""
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  return f'{platform.machine()} CPU, cores: {machine.cores()}'
