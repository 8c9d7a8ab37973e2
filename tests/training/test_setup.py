"""What a run needs at its end is checked before it begins."""

import pytest

from mdm_jax.training import loop


@pytest.mark.parametrize('name', ['checkpoints', 'samples', 'tensorboard'])
def test_a_file_in_place_of_a_directory_is_named(name, make_config, tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  (workdir / name).write_text('')
  with pytest.raises(ValueError, match=f'{workdir}/{name}: this is a file'):
    loop.setup(make_config().lock(), str(workdir))
  assert [path.name for path in workdir.iterdir()] == [name]


def test_a_file_in_place_of_the_working_directory(make_config, tmp_path):
  (tmp_path / 'file').write_text('')
  for workdir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
    with pytest.raises(ValueError, match='file'):
      loop.setup(make_config().lock(), str(workdir))


def test_a_working_directory_that_cannot_be_written(
  make_config, tmp_path, monkeypatch
):
  # Tests may run as root, who may write anywhere.
  monkeypatch.setattr('os.access', lambda path, mode: False)
  with pytest.raises(ValueError, match=f'nothing can be written to {tmp_path}'):
    loop.setup(make_config().lock(), str(tmp_path / 'run'))
  assert not list(tmp_path.iterdir())
