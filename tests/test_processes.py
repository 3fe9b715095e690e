"""Two processes of one job, joined as on a pod; the rest is a benchmark."""

import jax
import numpy as np

from benchmarks import multiprocess
from focusformer_jax.training import train
from tests.conftest import ROOT


def test_two_processes_train_what_one_does(
  experiment, trained, tfds_dir, tmp_path, monkeypatch
):
  monkeypatch.setenv(
    'JAX_COMPILATION_CACHE_DIR', str(ROOT / '.pytest_cache' / 'jax')
  )
  table = multiprocess.run(
    2,
    1,
    'main.py',
    *multiprocess.flags(
      {
        'data.batch_size': 32,
        'data.dir': tfds_dir,
        'search.method': 'sampler',
      }
    ),
    f'--workdir={tmp_path}',
  )
  # Process 0 prints and writes, for all.
  assert 'sampler' in table
  assert len(list(tmp_path.glob('metrics/events*'))) == 1
  assert (tmp_path / 'subnet' / 'model.safetensors').exists()

  # Their checkpoint, restored on one device, is that of one device.
  found = []
  for workdir in (trained, tmp_path):
    streams = train.open_streams(experiment)
    with train.open_checkpoints(experiment, workdir) as checkpoints:
      state = checkpoints.restore(experiment.abstract_state, streams)
    positions = [stream.position for stream in streams.values()]
    # Subnets in a window differ little, and Adam scales what rounding leaves of
    # that to whole steps. The policy's moments stay close, the policy does not.
    assert np.isfinite(jax.tree.leaves(state.policy)[0]).all()
    state = state.replace(policy=None)
    found.append([*positions, *jax.tree.leaves(state)])
  for one, two in zip(*found, strict=True):
    np.testing.assert_allclose(one, two, atol=5e-4)
