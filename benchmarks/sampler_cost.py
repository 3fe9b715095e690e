"""Measures the sampler's share of the training time after the warm-up.

  python benchmarks/sampler_cost.py --config configs/digits.py

Times, in alternation, a supernet step, a sampler step, and the policy's part of
each: drawing the subnets of a supernet step, and a sampler step on one image
per device, which scores almost nothing. Prints each as a share of the time from
one sampler step to the next.
"""

import argparse
import functools
import importlib.util
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags
import jax

from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax import sharding
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.training import curricula
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import steps


def load(path: pathlib.Path) -> config_lib.Settings:
  spec = importlib.util.spec_from_file_location('config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return config_lib.parse(module.get_config())


def draw(experiment, state: state_lib.TrainState):
  """Draws the subnets of one step."""
  key = state_lib.stream_key(0, state_lib.Stream.CURRICULUM, state.step)
  return experiment.draw(
    key, curricula.Context(state.step, state.policy, shares=state.shares)
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', type=pathlib.Path, required=True)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--calls', type=int, default=10, help='per round')
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # Grain reads an absl flag.

  settings = load(args.config)
  experiment = experiment_lib.create(settings)
  state = experiment.init_state()
  # The last step, after the warm-up, so that the policy draws.
  state = state.replace(step=state.step + settings.train.steps - 1)

  def batch(split: str, size: int):
    batches = batches_lib.train_batches(
      experiment.dataset.split(split), size, 0
    )
    return sharding.put_batch(experiment.mesh, next(batches))

  train = batch('train', settings.data.batch_size)
  heldout = batch('heldout', settings.sampler.batch_size)
  size = experiment.mesh.size
  one_image = jax.tree.map(lambda leaf: leaf[:size], heldout)
  calls = {
    'supernet step': (steps.supernet_step, (state, train)),
    'sampler step': (steps.sampler_step, (state, heldout)),
    'draws of a supernet step': (draw, (state,)),
    'sampler step, one image': (steps.sampler_step, (state, one_image)),
  }
  compiled = {
    name: jax.jit(functools.partial(function, experiment))
    .lower(*arguments)
    .compile()
    for name, (function, arguments) in calls.items()
  }
  seconds = {name: [] for name in calls}
  for _ in range(args.rounds):
    for name, (_, arguments) in calls.items():
      start = time.perf_counter()
      for _ in range(args.calls):
        jax.block_until_ready(compiled[name](*arguments))
      seconds[name].append((time.perf_counter() - start) / args.calls)
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  every = settings.sampler.every
  cycle = every * medians['supernet step'] + medians['sampler step']
  print(
    f'{args.config.name}: one sampler step every {every} supernet steps, on '
    f'{experiment.mesh.size} {jax.devices()[0].platform} device(s)'
  )
  for name, median in medians.items():
    times = 1 if name.startswith('sampler') else every
    print(f'{name:26} {1e3 * median:8.2f} ms {times * median / cycle:8.2%}')


if __name__ == '__main__':
  try:
    main()
  except (OSError, errors.UserError) as error:
    sys.exit(f'error: {error}')
