"""Configurations on disk, also those of older runs."""

import functools
import json
import os

import pytest

from configs import cc12m_64
from mdm_jax.builders import config as builders_config
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
    if key not in ('checkpoint_minutes', 'profile_every', 'trackers')
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
  assert config.trackers == ('tensorboard',)
  assert config.data.max_pixels == 128_000_000
  config.data.max_pixels = new['data']['max_pixels']
  assert json.loads(config.to_json()) == new


# Of sections, with the values that older runs behaved by.
ADDED = {
  'text.tokenizer_rules': 'sentencepiece',
  'text.padding': 'max_length',
  'diffusion.normalize_time_weights': False,
  'sampler.pixels': 'round',
  'eval.loss_every': 0,
}


def without(values: dict, path: str) -> dict:
  """A config as JSON, without a key of a section."""
  section, key = path.split('.')
  rest = {name: x for name, x in values[section].items() if name != key}
  return values | {section: rest}


def test_an_older_run_lacks_keys_of_sections(make_config, tmp_path):
  new = json.loads(make_config().to_json())
  new['eval']['loss_every'] = 0  # It has another default.
  old = functools.reduce(without, ADDED, new)
  assert 'padding' not in old['text'] and 'pixels' not in old['sampler']
  write_config(tmp_path, old)
  require_same_config(tmp_path, new)
  assert json.loads(load_config(read_config(tmp_path)).to_json()) == new
  assert read_config(tmp_path) == old  # What was read has not been changed.
  # A recipe that has changed since does not change a run in silence.
  new['text']['padding'] = 'longest'
  with pytest.raises(
    ValueError, match="text.padding: 'max_length' -> 'longest'"
  ):
    require_same_config(tmp_path, new)


def test_an_older_run_of_cc12m_behaves_as_it_did(tmp_path):
  recipe = json.loads(cc12m_64.get_config().to_json())
  write_config(tmp_path, functools.reduce(without, ADDED, recipe))
  config = load_config(read_config(tmp_path))
  for path, value in ADDED.items():
    section, key = path.split('.')
    assert config[section][key] == value


def test_keys_of_sections_in_lists_are_added(make_config, monkeypatch):
  monkeypatch.setattr(builders_config, '_ADDED', {'stages.accumulate': 3})
  values = json.loads(make_config().to_json())
  del values['stages'][0]['accumulate']
  stages = load_config(values).stages
  assert [stage.accumulate for stage in stages] == [3, 1]
  assert 'accumulate' not in values['stages'][0]


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
