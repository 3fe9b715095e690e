"""Fingerprints: JSON values that say what a stored result depends on.

They are stored with scores, answers and extracted networks, and compared before
any of these is reused or shown. Keys are those of the configuration where they
come from there.
"""

from collections.abc import Mapping, Sequence
import json
from typing import Any
import zlib

from etils import epath

from focusformer_jax import config as config_lib
from focusformer_jax.spaces import cost
from focusformer_jax.training import checkpoint
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import facts
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import train

Fingerprint = dict[str, Any]

# Keys on which scores depend, and those on which answers depend too; a search
# may change them after the training.
SCORED = 'data.test', 'supernet.dtype', 'data.eval_batch_size'
SEARCHED = *SCORED, 'sampler.cost', 'sampler.bins', 'sampler.window'


def of_config(settings: config_lib.Settings) -> Fingerprint:
  """The part of `of_answers` that follows from the configuration alone."""
  return _json(facts.of_config(settings) | _keys(settings, SEARCHED))


def _keys(settings: config_lib.Settings, names: Sequence[str]) -> Fingerprint:
  """The values of keys such as 'data.test'."""
  found = {}
  for name in names:
    section, key = name.split('.')
    found[name] = getattr(getattr(settings, section), key)
  if settings.supernet.head:  # Otherwise images are compared with their batch.
    del found['data.eval_batch_size']
  return found


def _neighbors(experiment: experiment_lib.Experiment) -> Fingerprint:
  """Networks without classes compare images with those of their device."""
  head = experiment.settings.supernet.head
  return {} if head else {'devices': experiment.mesh.size}


def of_weights(checksums: Mapping[str, int]) -> Fingerprint:
  """The part of `of_answers` that follows from the trained weights.

  Args:
    checksums: Those of a training state's arrays, as `checkpoint.checksums`
      returns them and every checkpoint notes them.
  """
  averaged = any(name.startswith('average.') for name in checksums)
  parts = {'weights': 'average' if averaged else 'supernet', 'policy': 'policy'}
  return {
    name: _crc32(
      {k: v for k, v in checksums.items() if k.startswith(f'{part}.')}
    )
    for name, part in parts.items()
  }


def of_scores(
  experiment: experiment_lib.Experiment, state: state_lib.TrainState
) -> Fingerprint:
  """What the score of an architecture depends on, beside the architecture."""
  names = [*experiment.facts(), *_keys(experiment.settings, SCORED)]
  names += [*_neighbors(experiment), 'checkpoint_step', 'weights']
  answers = of_answers(experiment, state)
  return {name: answers[name] for name in names}


def of_answers(
  experiment: experiment_lib.Experiment, state: state_lib.TrainState
) -> Fingerprint:
  """What the answer to a budget depends on, beside `config.search`."""
  return (
    _json(experiment.facts())
    | of_config(experiment.settings)
    | _neighbors(experiment)
    | {'costs': {name: _entries(t) for name, t in experiment.tables.items()}}
    | {'checkpoint_step': int(state.step)}
    | of_weights(checkpoint.checksums(state))
  )


def of_newest_checkpoint(workdir: epath.Path) -> Fingerprint | None:
  """The part of `of_answers` that follows from the newest checkpoint.

  Only its notes are read. None where the workdir has no checkpoint.
  """
  if not (workdir / train.CHECKPOINTS).exists():
    return None
  with checkpoint.Checkpoints(
    workdir / train.CHECKPOINTS, facts={}
  ) as checkpoints:
    step = checkpoints.latest_step
    if step is None:
      return None
    weights = of_weights(checkpoints.noted_checksums())
  return {'checkpoint_step': step} | weights


def difference(wanted: Fingerprint, found: Fingerprint) -> str | None:
  """The first key of `wanted` that `found` lacks or disagrees with, in words.

  For example 'sampler.cost=params, found macs'.
  """
  for name, value in wanted.items():
    if found.get(name) != value:
      return f'{name}={value}, found {found.get(name, "nothing")}'
  return None


def _entries(table: cost.CostTable) -> str:
  entries = table.stem_E, table.attention_EH, table.mlp_ER
  return _crc32([list(table.depth), *(entry.tolist() for entry in entries)])


def _crc32(value: Any) -> str:
  return f'{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}'


def _json(value: Any) -> Any:
  """The value as it is read back: tuples become lists."""
  return json.loads(json.dumps(value))
