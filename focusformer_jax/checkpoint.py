"""Checkpoints: one value that holds all a resumed run needs.

The only module that imports Orbax. A checkpoint is the training state under
readable names, the position of every data iterator, and beside them the facts
(space, geometry, shapes) that decide whether it fits a run at all: Orbax can
half-load a checkpoint of another depth without an error, so these are compared
first.
"""

from collections.abc import Mapping
import json
from typing import Any, TypeVar

from etils import epath
import grain
import jax
from orbax.checkpoint import v1 as ocp

from focusformer_jax import errors

Tree = TypeVar('Tree')


def _named(tree) -> dict[str, Any]:
  """Leaves by readable name, such as `supernet.blocks.mlp.up`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.').removesuffix(
      '.value'
    ): leaf
    for path, leaf in leaves
  }


def _abstract(leaf) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


class Checkpoints:
  """The checkpoints of one working directory.

  Args:
    directory: of the checkpoints; made when the first is saved.
    facts: JSON values that a checkpoint must share with this run.
    keep: how many of the newest stay on disk.
  """

  def __init__(
    self, directory: epath.PathLike, facts: Mapping[str, Any], keep: int = 2
  ):
    self.directory = epath.Path(directory).resolve()
    self._facts = json.loads(json.dumps(facts))
    self._orbax = ocp.training.Checkpointer(
      self.directory,
      # Whether to save is decided by the training loop alone.
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(
        1
      ),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    )

  @property
  def latest_step(self) -> int | None:
    latest = self._orbax.latest
    return None if latest is None else latest.step

  def save(
    self,
    step: int,
    state: Tree,
    iterators: Mapping[str, grain.DatasetIterator],
  ) -> None:
    """Starts to write a checkpoint in the background; call before `next`."""
    if step == self.latest_step:
      return
    self._orbax.save_checkpointables_async(
      step, {'state': _named(state), **iterators}, custom_metadata=self._facts
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception) -> None:
    """Waits for the checkpoint in hand, also when training was interrupted."""
    self._orbax.close()

  def restore(
    self,
    state: Tree,
    iterators: Mapping[str, grain.DatasetIterator] | None = None,
    step: int | None = None,
  ) -> Tree:
    """The newest checkpoint, with the structure and shardings of `state`.

    Args:
      state: what to restore, or only a part of what was saved.
      iterators: set to where they were.
      step: another checkpoint than the newest.

    Raises:
      UserError: there is none, it is of another run, or cannot be read.
    """
    step = self.latest_step if step is None else step
    if step is None:
      raise errors.UserError(
        f'--workdir: wanted a checkpoint in {self.directory}, found none; run '
        '--mode=train first'
      )
    wanted = _named(state)
    try:
      metadata = self._orbax.metadata(step)
      saved = metadata.metadata
      found = metadata.custom_metadata or {}
    except Exception as error:  # Orbax raises anything on a broken file.
      raise self._unreadable(step, error) from error
    self._compare(step, found)
    for name, leaf in wanted.items():
      if name not in saved or tuple(saved[name].shape) != leaf.shape:
        there = saved[name].shape if name in saved else 'nothing'
        raise errors.UserError(
          f'{self.directory / str(step)}: wanted {name} of shape {leaf.shape}, '
          f'found {there}; use another --workdir'
        )
    targets = dict(iterators or {})
    try:
      loaded = self._orbax.load_checkpointables(
        step, {'state': {k: _abstract(v) for k, v in wanted.items()}, **targets}
      )
    except Exception as error:
      raise self._unreadable(step, error) from error
    leaves = [loaded['state'][name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)

  def _unreadable(self, step: int, error: Exception) -> errors.UserError:
    return errors.UserError(
      f'{self.directory / str(step)}: wanted a readable checkpoint, found '
      f'{errors.first_line(error)}; remove that directory to fall back on an '
      'older one'
    )

  def _compare(self, step: int, found: Mapping[str, Any]) -> None:
    for name, wanted in self._facts.items():
      if found.get(name) != wanted:
        raise errors.UserError(
          f'{self.directory / str(step)}: wanted a checkpoint with '
          f'config.{name}={wanted}, found {found.get(name)}; change that key '
          'or use another --workdir'
        )
