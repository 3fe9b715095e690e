"""The pretrained network that a run starts from, sorted by importance.

A network of timm or transformers, or an extracted one, becomes the largest
subnet of a space around it. Units are sorted and layers ranked once, before the
first step; `<workdir>/initial` holds the result, as `vit.save` writes it, and
with it everything that later stages have to know.
"""

import dataclasses
import json
import operator
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np

from focusformer_jax import atomic_files
from focusformer_jax import config as config_lib
from focusformer_jax import errors
from focusformer_jax.data import augment
from focusformer_jax.models import autoformer
from focusformer_jax.models import importance
from focusformer_jax.models import pretrained
from focusformer_jax.models import vit
from focusformer_jax.models import weight_files
from focusformer_jax.spaces import search_space
from focusformer_jax.training import checkpoint
from focusformer_jax.training import experiment as experiment_lib
from focusformer_jax.training import state as state_lib
from focusformer_jax.training import train

DIRECTORY = 'initial'


def settle(
  settings: config_lib.Settings, workdir: epath.Path
) -> config_lib.Settings:
  """The settings, completed from the initial network.

  It decides on `space`, the keys of `supernet` that describe a network, and
  `train.initial`, which then names `<workdir>/initial`. The network is sorted
  and written there unless that is done. Settings without an initial network, or
  with AutoFormer's weights, stay as they are.

  Raises:
    UserError: The network cannot be read, does not fit the data set, or is not
      the one that this workdir started from.
  """
  home, initial = workdir / DIRECTORY, settings.train.initial
  if settings.distillation.teacher == 'initial' and not initial:
    raise errors.UserError(
      'config.train.initial: wanted a pretrained network for '
      'config.distillation.teacher=initial, found none'
    )
  if not initial:
    if not settings.supernet.head:
      raise errors.UserError(
        'config.supernet.head: wanted True without a network in '
        'config.train.initial, found False'
      )
    _check_teaching(settings)
    return settings
  if epath.Path(initial) == home:
    return settings
  if not (home / vit.DESCRIPTION).exists():
    if (workdir / train.CHECKPOINTS).exists():
      _check_start(settings, workdir)  # It started from AutoFormer's weights.
      network = None
    else:
      network = _read(settings)
    if network is None:
      _check_teaching(settings)
      return settings
    _prepare(settings, network, home)
  description = atomic_files.read_json(home / vit.DESCRIPTION)
  for name, wanted in _facts(settings).items():
    # Descriptions of earlier versions lack some.
    if (found := description['made_with'].get(name, wanted)) != wanted:
      raise errors.UserError(
        f'config.{name}: wanted {found}, with which {home} was made, found '
        f'{wanted}; use another --workdir'
      )
  settings = _around(settings, description)
  _check_teaching(settings)
  train_settings = dataclasses.replace(settings.train, initial=str(home))
  return dataclasses.replace(settings, train=train_settings)


def _check_start(settings: config_lib.Settings, workdir: epath.Path) -> None:
  """Checks that a run that started without a directory had the same weights."""
  path, wanted = workdir / 'config.json', settings.train.initial
  if not path.exists():
    return
  found = atomic_files.read_json(path).get('train', {}).get('initial')
  if found != wanted:
    raise errors.UserError(
      f'config.train.initial: wanted {found or "no file"}, as {workdir} '
      f'started, found {wanted}; use another --workdir'
    )


def _facts(settings: config_lib.Settings) -> dict[str, Any]:
  """The settings on which the contents of the directory depend."""
  names = [
    'seed',
    'train.initial',
    'data.image_size',
    'pretrained.num_heads',
    'pretrained.pool',
    'pretrained.interpolate',
    'pretrained.importance',
  ]
  if settings.pretrained.importance != 'none':
    # Images sort the units, and rank layers down to the shallowest subnet.
    names += [
      'pretrained.images',
      'pretrained.depths',
      'data.name',
      'data.heldout',
      'augment.mean',
      'augment.std',
    ]
  facts = {name: operator.attrgetter(name)(settings) for name in names}
  return json.loads(json.dumps(facts))  # Tuples are lists, as in the file.


def _read(settings: config_lib.Settings) -> vit.VisionTransformer | None:
  """The network; None if the file has AutoFormer's names."""
  options, initial = settings.pretrained, epath.Path(settings.train.initial)
  try:
    if initial.is_dir():
      network, description = vit.load(initial)
      for name, wanted in (
        ('num_heads', description['num_heads'][0]),
        ('pool', 'cls' if description['pool'] == 'cls' else 'mean'),
      ):
        if (found := getattr(options, name)) not in (None, wanted):
          raise ValueError(
            f'{name}: wanted None or {wanted}, which {initial} has, found '
            f'{found}'
          )
      if (own := network.geometry.image_size) != settings.data.image_size:
        raise ValueError(
          f'image_size: wanted {own}, which {initial} has (only files are '
          f'interpolated), found {settings.data.image_size}'
        )
      return network
    state_dict = weight_files.read(initial)
    if autoformer.is_state_dict(state_dict):
      return None
    return pretrained.from_pretrained(
      state_dict,
      num_heads=options.num_heads,
      pool=options.pool,
      image_size=settings.data.image_size,
      interpolate=options.interpolate,
      dtype=settings.supernet.dtype,
    )
  except (errors.UserError, ValueError) as error:
    message = str(error)
    key = 'train.initial: '
    if message.startswith(('num_heads:', 'pool:')):
      key = 'pretrained.'
    elif message.startswith(('image_size:', 'patch_size:')):
      key = 'data.image_size: '
      message = message.partition(': ')[2].replace(
        'interpolate=True', 'config.pretrained.interpolate=True'
      )
    raise errors.UserError(f'config.{key}{message}') from error


def _around(
  settings: config_lib.Settings, description: dict[str, Any]
) -> config_lib.Settings:
  """The settings with the space around a network.

  Args:
    settings: As configured.
    description: As `vit.describe` makes it; `layer_order` may be absent.
  """
  options, geometry = settings.pretrained, description['geometry']
  whole = search_space.SearchSpace(
    embed_dim=(description['embed_dim'],),
    depth=(description['depth'],),
    num_heads=(description['num_heads'][0],),
    mlp_ratio=(description['mlp_ratio'][0],),
    head_dim=description['head_dim'],
    layer_order=tuple(description.get('layer_order', ())),
  )
  try:
    space = search_space.around(
      whole,
      widths=options.widths,
      depths=options.depths,
      heads=options.heads,
      ratios=options.ratios,
    )
  except ValueError as error:
    raise errors.UserError(f'config.pretrained.{error}') from error
  names = (
    'patch_size',
    'max_relative_position',
    'class_token',
    'registers',
    'norm_eps',
  )
  supernet = dataclasses.replace(
    settings.supernet,
    pool=description['pool'],
    head=geometry['num_classes'] > 0,
    **{name: geometry[name] for name in names},
  )
  return dataclasses.replace(settings, space=space, supernet=supernet)


def _check_teaching(settings: config_lib.Settings) -> None:
  """Checks that the loss suits what the network returns."""
  teaching = settings.distillation
  for key, wanted, found in (
    ('loss', 'features', teaching.loss),
    ('teacher', 'initial', teaching.teacher),
    ('weight', 1, teaching.weight),
  ):
    if not settings.supernet.head and found != wanted:
      raise errors.UserError(
        f'config.distillation.{key}: wanted {wanted} for a network without '
        f'classes, found {found}'
      )
  if settings.supernet.head and teaching.loss == 'features':
    raise errors.UserError(
      'config.distillation.loss: wanted none, kl or alpha for a network with '
      'classes, found features'
    )


def _prepare(
  settings: config_lib.Settings,
  network: vit.VisionTransformer,
  home: epath.Path,
) -> None:
  """Sorts the network by importance and writes it."""
  try:
    whole = pretrained.space_of(network)
  except ValueError as error:
    raise errors.UserError(f'config.train.initial: {error}') from error
  description = vit.describe(network, whole.to_json(whole.largest()))
  settled = _around(settings, description)
  _check_teaching(settled)
  experiment = experiment_lib.create(settled, trains=False)
  if network.geometry != experiment.geometry:
    raise errors.UserError(
      f'config.train.initial: wanted a network for {settings.data.name}, '
      f'{experiment.geometry}, found one for {network.geometry}'
    )
  # All have to find that it is not there before process 0 writes it.
  checkpoint.wait_for_all('the initial network is read')
  if jax.process_index() == 0:
    description |= {'made_with': _facts(settings)}
    method = settings.pretrained.importance
    if method != 'none':
      logging.info(
        'sorting %s by importance (%s)', settings.train.initial, method
      )
      source = experiment.dataset.split('heldout')
      count = min(settings.pretrained.images, len(source))
      chosen = np.linspace(0, len(source) - 1, count).astype(int)
      images = augment.normalize(
        experiment.recipe, source.batch(chosen)['image']
      )
      key = state_lib.stream_key(settings.seed, state_lib.Stream.IMPORTANCE, 0)
      units = {
        'taylor': lambda: importance.taylor(network, images, key),
        'magnitude': lambda: importance.magnitude(network),
      }[method]()
      shallowest = settled.space.depth[0]
      order = importance.layer_order(network, images, shallowest)
      dropped = np.argsort(order)[: shallowest - 1 : -1]
      logging.info(
        'shallower subnets drop these layers, in this order: %s',
        ' '.join(map(str, dropped)) or 'none',
      )
      network = importance.sort(network, units)
      description['layer_order'] = order
    vit.save(network, description, home)
  checkpoint.wait_for_all('the initial network is written')
