"""Metrics on disk, as this version and as earlier ones wrote them."""

from etils import epath
import numpy as np
import pytest
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2
from tensorboardX.proto import summary_pb2
from tensorboardX.proto import tensor_pb2
from tensorboardX.proto import tensor_shape_pb2
from tensorboardX.proto import types_pb2

from focusformer_jax import errors
from focusformer_jax.training import metrics


def test_metrics_are_on_disk_when_written(tmp_path):
  directory = epath.Path(tmp_path) / 'metrics'
  writer = metrics.Writer(directory, 0)
  writer.write(1, {'a': 1.5, 'b': 0.0})
  writer.write(2, {'a': 2.0})
  assert metrics.read(directory) == {'a': [(1, 1.5), (2, 2.0)], 'b': [(1, 0.0)]}
  writer.close()


def test_metrics_of_tensorflow_are_read(tmp_path):
  """It writes scalars as tensors without dimensions."""
  shape = tensor_shape_pb2.TensorShapeProto
  tensors = {
    'content': {'tensor_content': np.float32(1.5).tobytes()},
    'value': {'float_val': [2.5]},
    'zero': {},
    'vector': {
      'float_val': [1.0],
      'tensor_shape': shape(dim=[shape.Dim(size=1)]),
    },
  }
  values = [
    summary_pb2.Summary.Value(
      tag=tag,
      tensor=tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, **fields),
    )
    for tag, fields in tensors.items()
  ]
  events = event_file_writer.EventsWriter(str(tmp_path / 'events'))
  summary = summary_pb2.Summary(value=values)
  events.write_event(event_pb2.Event(step=3, summary=summary))
  events.close()
  assert metrics.read(epath.Path(tmp_path)) == {
    'content': [(3, 1.5)],
    'value': [(3, 2.5)],
    'zero': [(3, 0.0)],
  }


def test_metrics_before_a_damaged_record_are_read(tmp_path):
  directory = epath.Path(tmp_path)
  writer, sizes = metrics.Writer(directory, 0), []
  (path,) = tmp_path.glob('events*')
  for step in (1, 2, 3):
    writer.write(step, {'a': step})
    sizes.append(path.stat().st_size)
  writer.close()
  content = bytearray(path.read_bytes())
  content[(sizes[0] + sizes[1]) // 2] ^= 1
  path.write_bytes(content)
  assert metrics.read(directory) == {'a': [(1, 1.0)]}


def test_metrics_in_a_bucket_without_its_client_are_refused(
  tmp_path, monkeypatch
):
  def no_client(*_):
    raise ImportError('google-cloud-storage must be installed')

  monkeypatch.setattr(event_file_writer, 'EventsWriter', no_client)
  with pytest.raises(errors.UserError, match=r'^--workdir: wanted .*google'):
    metrics.Writer(epath.Path(tmp_path), 0)
