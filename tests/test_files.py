import resource

from etils import epath
import pytest

from focusformer_jax import errors
from focusformer_jax import files


def test_a_file_is_there_whole_or_as_before(tmp_path):
  path = epath.Path(tmp_path) / 'folder' / 'value.json'
  files.write(path, '{"a": 1}')
  assert files.read_json(path) == {'a': 1}
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
  try:
    with pytest.raises(OSError):
      files.write(path, b'{"a": 2}' + b' ' * 100)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert files.read_json(path) == {'a': 1}


@pytest.mark.parametrize('content', [b'', b'{"a"', b'\xff\xfe\x00'])
def test_what_is_no_json_is_named(content, tmp_path):
  path = epath.Path(tmp_path) / 'value.json'
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match=r'value.json: wanted JSON'):
    files.read_json(path)
