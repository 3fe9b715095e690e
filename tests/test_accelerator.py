"""The benchmark of accelerators, as far as it goes on a CPU."""

import subprocess
import sys

import pytest

from benchmarks import accelerator_parts
from benchmarks import accelerator_tables
from tests.conftest import ROOT


def test_accelerator_benchmark_needs_few_libraries():
  script = """
import importlib.abc, sys

class Without(importlib.abc.MetaPathFinder):
  def find_spec(self, name, *rest):
    if name in {
      'clu', 'cv2', 'grain', 'matplotlib', 'safetensors', 'simplejpeg',
      'sklearn', 'tensorboardX', 'tensorflow', 'tensorflow_datasets', 'tqdm',
    }:
      raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Without())
from benchmarks import accelerator
"""
  run = subprocess.run(
    [sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
  ('kind', 'wanted'),
  [
    ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H100 PCIe', 756),
    ('TPU v5 lite', 197),
    ('TPU v5p', 459),
    ('cpu', None),
  ],
)
def test_peak_is_that_of_the_longest_known_name(kind, wanted):
  assert accelerator_parts.peak(kind) == wanted


def test_accelerator_tables_show_shares_ratios_and_errors():
  step = {
    'execution': 'masked',
    'attention': 'cudnn',
    'remat': 'dots',
    'batch': 128,
    'milliseconds': 64.0,
    'images_per_second': 2000.0,
    'macs_per_image': 1e9,
    'largest_macs': 2e9,
    'compile_seconds': 30.0,
    'compiler_gib': 3.0,
    'peak_gib': 0.0,
  }
  rate = {'milliseconds': 128.0, 'images_per_second': 1000.0}
  text = accelerator_tables.markdown(
    {
      'device': {
        'kind': 'TPU v5 lite',
        'devices': 8,
        'memory_gib': 16.0,
        'peak_tflops': 100,
        'matmul_tflops': 90.0,
        'versions': {'jax': '0.10.2'},
      },
      'step tiny': step,
      'step tiny batch=256': step | {'batch': 256},
      'torch tiny compiled': {'middle': rate, 'largest': rate},
      'augment whole': {'error': 'exit code 1: no'},
    }
  )
  # 6 * 1e9 * 2000 FLOP/s of 100 TFLOP/s; twice PyTorch's images per second.
  assert (
    '| tiny | masked | cudnn | dots | 128 | 64 | 2,000 | 12.0% | 24.0% | 2.00 |'
    ' 2.00 | 3.00 | 30 s |'
  ) in text
  assert '| 24.0% | - | - |' in text  # PyTorch ran another batch.
  assert '| augment whole | exit code 1: no |' in text
