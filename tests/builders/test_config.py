"""Configurations on disk, also those of older runs."""

import json

import pytest

from mdm_jax.builders.config import (
  load_config,
  read_config,
  require_same_config,
  write_config,
)
from tests.runtime.test_files import UNREADABLE


def test_an_older_run_lacks_keys_and_goes_on(make_config, tmp_path):
  new = json.loads(make_config().to_json())
  old = {
    key: value
    for key, value in new.items()
    if key not in ('checkpoint_minutes', 'profile_every')
  }
  write_config(tmp_path, old)
  require_same_config(tmp_path, new)
  # These may change at any time, others may not.
  require_same_config(tmp_path, new | {'checkpoint_minutes': 5.0})
  with pytest.raises(ValueError, match='seed: 0 -> 1'):
    require_same_config(tmp_path, new | {'seed': 1})
  config = load_config(read_config(tmp_path))
  assert (config.checkpoint_minutes, config.profile_every) == (0, 0)
  assert json.loads(config.to_json()) == new


@pytest.mark.parametrize('case', UNREADABLE)
def test_a_config_that_cannot_be_read_is_named_or_made_anew(
  make_config, tmp_path, monkeypatch, caplog, case
):
  make, reason = UNREADABLE[case]
  monkeypatch.chdir(tmp_path)
  make(tmp_path / 'config.json')
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    read_config(tmp_path)
  if (tmp_path / 'config.json').exists():
    assert f'config.json {reason}' in str(error.value)
    assert 'run the command that trains the run once more' in str(error.value)
  assert '\n' not in str(error.value)

  new = json.loads(make_config().to_json())
  require_same_config(tmp_path, new)
  (record,) = caplog.records
  assert f'config.json {reason}' in record.getMessage()
  write_config(tmp_path, new)
  assert read_config(tmp_path) == new
