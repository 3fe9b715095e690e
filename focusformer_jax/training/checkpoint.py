"""Checkpoints: one value that holds everything a resumed run needs.

This is the only module that imports Orbax. A checkpoint holds the training
state under readable names, the position in every stream of batches, and the
facts (seed, data, space, geometry) that decide whether it fits a run at all.
Facts are compared first, because Orbax can load a part of a checkpoint of
another depth without an error. Checksums of all arrays are compared last,
because the files have none of their own, and a flipped bit would pass for a
weight.
"""

import asyncio
from collections.abc import Mapping
import contextlib
import json
import secrets
from typing import Any, TypeVar
import zlib

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jaxtyping import Array, UInt32
import numpy as np
from orbax.checkpoint import v1 as ocp

from focusformer_jax import errors
from focusformer_jax.data import batches as batches_lib
from focusformer_jax.models import layers

Tree = TypeVar('Tree')


def claim(workdir: epath.Path) -> None:
  """Creates the working directory if it does not exist.

  Raises:
    UserError: It cannot be written, or the processes do not share it.
  """
  number = multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31)))
  probe, problem = workdir / f'.probe_{number}', None
  if jax.process_index() == 0:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      probe.write_text('')
    except OSError as error:
      problem = error
  multihost_utils.sync_global_devices('probe is written')
  shared = multihost_utils.process_allgather(np.array(probe.exists())).all()
  if problem:
    raise errors.UserError(
      f'--workdir: wanted a directory that can be written, found {workdir} '
      f'({problem.strerror or errors.first_line(problem)})'
    ) from problem
  if jax.process_index() == 0:
    probe.unlink()
  if not shared:
    raise errors.UserError(
      f'--workdir: wanted a place that all {jax.process_count()} processes '
      f'share, such as a bucket, found {workdir}, which some do not see'
    )


def wait_for_all(name: str) -> None:
  """Waits for all processes, for up to an hour.

  Collectives on CPUs time out after half a minute. A process may compile for
  longer than that, while another finds the program in its cache.
  """
  if jax.process_count() > 1:
    barrier = ocp.multihost.sync_global_processes(
      name, operation_id='focusformer_jax', timeout=3600
    )
    asyncio.run(barrier)


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@jax.jit
def _checksums(arrays: list[jax.Array]) -> UInt32[Array, 'A']:
  """A number for each array that changes with any of its bits.

  It is the sum modulo 2^32 of the array's entries, read as integers, times odd
  weights. It does not depend on the sharding.
  """

  def checksum(array):
    if array.dtype == bool:
      array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, f'uint{8 * array.itemsize}')
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(array.ndim)):
      iota = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
      place += iota * np.uint32(stride)
      stride *= array.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

  return jnp.stack([checksum(array) for array in arrays])


def checksums(state: Tree) -> dict[str, int]:
  """The checksum of each array of a state, by its name in a checkpoint."""
  named = layers.named_leaves(state)
  return dict(
    zip(named, _checksums(list(named.values())).tolist(), strict=True)
  )


def _crc32(notes: Any) -> int:
  return zlib.crc32(json.dumps(notes, sort_keys=True).encode())


class Checkpoints:
  """The checkpoints of one working directory.

  Args:
    directory: Where the checkpoints are; created if need be.
    facts: JSON values that a checkpoint must share with this run.
    keep: Number of the newest checkpoints that stay on disk.
    tidy: Whether to delete incomplete checkpoints; only the writer may.
    implied: Facts that hold where a checkpoint, or `facts`, does not say.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    facts: Mapping[str, Any],
    keep: int = 2,
    *,
    tidy: bool = False,
    implied: Mapping[str, Any] | None = None,
  ):
    self.directory = epath.Path(directory).resolve()
    self._facts = json.loads(json.dumps(facts))
    self._implied = dict(implied or {})
    loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
    self._orbax = ocp.training.Checkpointer(
      self.directory,
      context=ocp.Context(
        pytree_options=ocp.options.PyTreeOptions(loading=loading)
      ),
      # Only the training loop decides when to save.
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(
        1
      ),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
      cleanup_tmp_directories=tidy,
    )

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, if there is one."""
    latest = self._orbax.latest
    return None if latest is None else latest.step

  @property
  def newest(self) -> str:
    """Path of the newest checkpoint, or 'none'."""
    step = self.latest_step
    return 'none' if step is None else str(self.directory / str(step))

  def save(
    self, step: int, state: Tree, streams: Mapping[str, batches_lib.Batches]
  ) -> None:
    """Starts to write a checkpoint in the background.

    Args:
      step: Number of the step.
      state: The training state.
      streams: Streams of batches, whose positions are saved; take the next
        batch after this call.

    Raises:
      UserError: This checkpoint, or the one before, cannot be written.
    """
    if step == self.latest_step:
      return
    named = layers.named_leaves(state)
    notes = {
      'facts': self._facts,
      'positions': {name: stream.position for name, stream in streams.items()},
      'checksums': checksums(state),
    }
    with self._writing():
      self._orbax.save_checkpointables_async(
        step,
        {'state': named},
        custom_metadata={'notes': notes, 'crc32': _crc32(notes)},
      )

  def wait(self) -> None:
    """Waits until the checkpoint in progress is written.

    Raises:
      UserError: It cannot be written.
    """
    with self._writing():
      self._orbax.wait()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception) -> None:
    """Waits for the checkpoint in progress, also after an interruption."""
    with self._writing():
      self._orbax.close()

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    except Exception as error:  # Orbax raises anything on a full disk.
      self._orbax.reload()
      raise errors.UserError(
        f'--workdir: wanted to write a checkpoint to {self.directory}, found '
        f'{errors.first_line(error)}; make room there or use another (the last '
        f'good checkpoint is {self.newest})'
      ) from error

  def restore(
    self,
    state: Tree,
    streams: Mapping[str, batches_lib.Batches] | None = None,
  ) -> Tree:
    """Reads the newest checkpoint, with structure and shardings of `state`.

    Args:
      state: Shapes and shardings of the state; without streams, those of a part
        are enough.
      streams: Streams of batches, which are set to their saved positions.

    Raises:
      UserError: There is none, it is of another run, or it cannot be read.
    """
    step = self.latest_step
    if step is None:
      raise errors.UserError(
        f'--workdir: wanted a checkpoint in {self.directory}, found none; run '
        '--mode=train first'
      )
    wanted = layers.named_leaves(state)
    saved, notes = self._metadata(step)
    self._compare(step, notes['facts'])
    for name, leaf in wanted.items():
      if name not in saved or tuple(saved[name].shape) != leaf.shape:
        there = saved[name].shape if name in saved else 'nothing'
        raise errors.UserError(
          f'{self.directory / str(step)}: wanted {name} of shape {leaf.shape}, '
          f'found {there}; use another --workdir'
        )
    if streams and (more := sorted(saved.keys() - wanted.keys())):
      raise errors.UserError(
        f'{self.directory / str(step)}: wanted nothing but what this config '
        f'trains, found {more[0]} too; continue with the config of before '
        '(config.distillation says whether there is a teacher) or use another '
        '--workdir'
      )
    try:
      loaded = self._orbax.load_checkpointables(
        step, {'state': {k: _abstract(v) for k, v in wanted.items()}}
      )
    except Exception as error:
      raise self._unreadable(step, errors.first_line(error)) from error
    restored = jax.tree.unflatten(
      jax.tree.structure(state), [loaded['state'][name] for name in wanted]
    )
    for name, checksum in checksums(restored).items():
      if checksum != notes['checksums'].get(name):
        raise self._unreadable(step, f'another {name} than was saved')
    for name, batches in (streams or {}).items():
      batches.position = notes['positions'][name]
    return restored

  def _metadata(self, step: int) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Shapes of the arrays, and the notes beside them."""
    try:
      metadata = self._orbax.metadata(step)
      saved, beside = metadata.metadata, metadata.custom_metadata or {}
    except Exception as error:  # Orbax raises anything on a broken file.
      raise self._unreadable(step, errors.first_line(error)) from error
    notes = beside.get('notes')
    if saved is None or beside.get('crc32') != _crc32(notes):
      raise self._unreadable(step, 'other notes than were saved')
    return saved, notes

  def noted_checksums(self) -> dict[str, int]:
    """`checksums` of the state in the newest checkpoint, without reading it."""
    _, notes = self._metadata(self.latest_step)
    return notes['checksums']

  def _unreadable(self, step: int, found: str) -> errors.UserError:
    return errors.UserError(
      f'{self.directory / str(step)}: wanted a readable checkpoint, found '
      f'{found}; remove that directory to fall back on an older one'
    )

  def _compare(self, step: int, found: Mapping[str, Any]) -> None:
    found = self._implied | found
    for name, wanted in (self._implied | self._facts).items():
      if name not in found:  # Written before this was a fact.
        logging.warning(
          '%s: does not say which config.%s it was trained with',
          self.directory / str(step),
          name,
        )
      elif found[name] != wanted:
        raise errors.UserError(
          f'{self.directory / str(step)}: wanted a checkpoint with '
          f'config.{name}={wanted}, found {found[name]}; change that key '
          'or use another --workdir'
        )
