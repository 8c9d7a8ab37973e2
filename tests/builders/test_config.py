"""Configurations on disk, also those of older runs."""

import json
import os

import pytest

from mdm_jax.builders.config import (
  load_config,
  read_config,
  require_same_config,
  write_config,
)


def test_an_older_run_lacks_keys_and_goes_on(make_config, tmp_path):
  new = json.loads(make_config().to_json())
  old = {
    key: value
    for key, value in new.items()
    if key not in ('checkpoint_minutes', 'profile_every')
  }
  old['data'] = dict(old['data'])
  del old['data']['max_pixels']
  write_config(tmp_path, old)
  require_same_config(tmp_path, new)
  # These may change at any time, others may not.
  require_same_config(tmp_path, new | {'checkpoint_minutes': 5.0})
  with pytest.raises(ValueError, match='seed: 0 -> 1'):
    require_same_config(tmp_path, new | {'seed': 1})
  # The home directory has become a path since.
  home = new | {'data': new['data'] | {'path': '~/x'}}
  write_config(tmp_path / 'home', home)
  home['data']['path'] = os.path.expanduser('~/x')
  require_same_config(tmp_path / 'home', home)
  config = load_config(read_config(tmp_path))
  assert (config.checkpoint_minutes, config.profile_every) == (0, 0)
  assert config.data.max_pixels == 128_000_000
  config.data.max_pixels = new['data']['max_pixels']
  assert json.loads(config.to_json()) == new
