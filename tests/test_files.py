import resource

from etils import epath
import pytest

from focusformer_jax import atomic_files
from focusformer_jax import errors


def test_a_file_is_there_whole_or_as_before(tmp_path):
  path = epath.Path(tmp_path) / 'folder' / 'value.json'
  atomic_files.write_json(path, {'a': 1})
  assert atomic_files.read_json(path) == {'a': 1}
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
  try:
    with pytest.raises(OSError):
      atomic_files.write(path, b'{"a": 2}' + b' ' * 100)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert atomic_files.read_json(path) == {'a': 1}


@pytest.mark.parametrize('content', [b'', b'{"a"', b'\xff\xfe\x00'])
def test_what_is_no_json_is_named(content, tmp_path):
  path = epath.Path(tmp_path) / 'value.json'
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match=r'value.json: wanted JSON'):
    atomic_files.read_json(path)
