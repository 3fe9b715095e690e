"""Builds TFDS's `fashion_mnist` from Debian's package, without a network.

  apt-get install dataset-fashion-mnist
  python benchmarks/stage_fashion_mnist.py

The package holds the four files that TFDS would download (github.com/
zalandoresearch/fashion-mnist). TFDS's own builder reads them, so the data set
and its order are the same. Writes to TFDS's default directory or to --data_dir.
"""

import argparse
import gzip
import pathlib
import sys
import tempfile
from unittest import mock

import tensorflow_datasets as tfds

DEBIAN = pathlib.Path('/usr/share/datasets/fashion-mnist')
FILES = {
  'train_data': 'train-images-idx3-ubyte',
  'train_labels': 'train-labels-idx1-ubyte',
  'test_data': 't10k-images-idx3-ubyte',
  'test_labels': 't10k-labels-idx1-ubyte',
}


def stage(source: pathlib.Path, data_dir: str | None) -> pathlib.Path:
  """Builds the data set and returns its directory."""
  builder = tfds.builder(
    'fashion_mnist', data_dir=data_dir, file_format='array_record'
  )
  with tempfile.TemporaryDirectory() as extracted:
    paths = {}
    for key, name in FILES.items():
      paths[key] = pathlib.Path(extracted, name)
      packed = (source / f'{name}.gz').read_bytes()
      paths[key].write_bytes(gzip.decompress(packed))
    # Replaces the download: TFDS asks for the four files by these names.
    with mock.patch.object(
      tfds.download.DownloadManager,
      'download_and_extract',
      lambda manager, urls: {key: paths[key] for key in urls},
    ):
      builder.download_and_prepare()
  return builder.data_path


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--source', type=pathlib.Path, default=DEBIAN)
  parser.add_argument('--data_dir', help="default: TFDS's own")
  args = parser.parse_args()
  missing = [
    n for n in FILES.values() if not (args.source / f'{n}.gz').exists()
  ]
  if missing:
    sys.exit(
      f'error: --source: wanted {missing[0]}.gz in {args.source}, found none; '
      'install the package dataset-fashion-mnist'
    )
  print(stage(args.source, args.data_dir))


if __name__ == '__main__':
  main()
