"""Training metrics on disk, in TensorBoard's format but without TensorFlow."""

import collections
from collections.abc import Iterator, Mapping
import struct
import time

from etils import epath
from google.protobuf import message
import numpy as np
from tensorboardX import event_file_writer
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2
from tensorboardX.proto import summary_pb2
from tensorboardX.proto import types_pb2

from focusformer_jax import errors

# Points (step, value) by the name of a metric.
Curves = dict[str, list[tuple[int, float]]]


class Writer:
  """Appends scalars to a file of events, which are on disk at once.

  Args:
    directory: Where the file goes; it is created if it does not exist.
    step: Step that the run starts from, part of the file's name.

  Raises:
    UserError: The directory is in a bucket whose client is not installed.
  """

  def __init__(self, directory: epath.Path, step: int):
    directory.mkdir(parents=True, exist_ok=True)
    try:
      self._events = event_file_writer.EventsWriter(
        str(directory / 'events'), f'.{step:09d}'
      )
    except ImportError as error:
      raise errors.UserError(
        f'--workdir: wanted to write metrics to {directory}, found '
        f'{errors.first_line(error)}'
      ) from error

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes the scalars of a step, by name."""
    values = [
      summary_pb2.Summary.Value(tag=name, simple_value=value)
      for name, value in scalars.items()
    ]
    self._events.write_event(
      event_pb2.Event(
        step=step,
        wall_time=time.time(),
        summary=summary_pb2.Summary(value=values),
      )
    )
    self._events.flush()

  def close(self) -> None:
    self._events.close()


def read(directory: epath.Path) -> Curves:
  """Scalars that training logged; where runs overlap, those of the later one.

  Reads the files of `Writer`, and those that TensorFlow wrote for earlier
  versions of this project.
  """
  curves = collections.defaultdict(dict)
  for path in sorted(directory.glob('events.out.tfevents.*')):
    for event in _events(path.read_bytes()):
      for value in event.summary.value:
        scalar = _scalar(value)
        if scalar is not None:
          curves[value.tag][event.step] = scalar
  return {name: sorted(curves[name].items()) for name in sorted(curves)}


def _events(content: bytes) -> Iterator[event_pb2.Event]:
  """Events of a file up to the first that is damaged, or was cut off by a kill.

  A record is the length of its data as uint64, its checksum, the data and their
  checksum, all little-endian (tensorflow.org/tutorials/load_data/tfrecord).
  """
  start = 0
  while start + 16 <= len(content):
    (length,) = struct.unpack_from('<Q', content, start)
    data = content[start + 12 : start + 12 + length]
    checksum = content[start + 12 + length : start + 16 + length]
    if checksum != struct.pack('<I', record_writer.masked_crc32c(data)):
      return
    try:
      yield event_pb2.Event.FromString(data)
    except message.DecodeError:
      return
    start += 16 + length


def _scalar(value: summary_pb2.Summary.Value) -> float | None:
  """The number that a summary holds, if it is one."""
  if value.WhichOneof('value') == 'simple_value':
    return value.simple_value
  tensor = value.tensor
  if tensor.dtype != types_pb2.DT_FLOAT or tensor.tensor_shape.dim:
    return None
  if tensor.tensor_content:
    return float(np.frombuffer(tensor.tensor_content, '<f4')[0])
  return tensor.float_val[0] if tensor.float_val else 0.0
