"""Configurations on disk, also those of older runs."""

import functools
import json
import os
import re

import pytest

from configs import cc12m_64
from mdm_jax.builders import config as builders_config
from mdm_jax.builders import listing, ranges
from mdm_jax.builders.config import (
  differences,
  load_config,
  read_config,
  require_same_config,
  write_config,
)
from mdm_jax.inference import session
from mdm_jax.training import loop
from tests import toy
from tests.runtime.test_files import UNREADABLE


def test_config_round_trip(make_config, tmp_path):
  workdir = tmp_path / 'runs' / 'a'
  with pytest.raises(FileNotFoundError, match='config.json'):
    read_config(workdir)
  config = make_config()
  values = json.loads(config.to_json())
  write_config(workdir, {})
  write_config(workdir, values)
  read = read_config(workdir)
  assert read == values
  assert load_config(read).model.levels[1].channels == (8, 8)
  assert load_config(read).to_json() == config.to_json()
  # A tuple equals a list.
  assert differences(read, values | {'trackers': ('tensorboard',)}) == []
  assert [p.name for p in workdir.iterdir()] == ['config.json']


# Values that older runs behaved by, of the keys that they lack.
ADDED = {
  'model.levels[].remat': 'none',
  'model.levels[].lanes': 1,
  'stages[].accumulate': 1,
  'averages.widths': (),
  'averages.snapshot_every': 1000,
  'guard.spike_factor': 0,
  'guard.window': 100,
  'guard.max_skipped': 10,
  'replicas_every': 0,
  'watchdog.start_up': 0,
  'watchdog.step': 0,
  'watchdog.save': 0,
  'watchdog.evaluate': 0,
  'eval.every': 0,
  'eval.best_metric': '',
  'checkpoint_minutes': 0,
  'profile_every': 0,
  'trackers': ('tensorboard',),
  'data.max_pixels': 128_000_000,
  'text.tokenizer_rules': 'sentencepiece',
  'text.padding': 'max_length',
  'diffusion.normalize_time_weights': False,
  'sampler.pixels': 'round',
  'eval.loss_every': 0,
  'data.two_objects': 0.25,
  'diffusion.noise_floor': 0,
  'diffusion.min_snr_gamma': 5,
  'diffusion.sigmoid_bias': 0,
  'diffusion.p2': (1, 1),
  'diffusion.time_density': 'uniform',
  'diffusion.logit_normal': (0, 1),
  'diffusion.stratified_times': False,
  'diffusion.level_times': 'shared',
  'diffusion.level_offset': 0,
  'sampler.level_offset': 0,
  'diffusion.reference_resolution': 0,
  'model.levels[].kind': 'unet',
  'model.levels[].frames': 1,
  'model.levels[].frame_attention': (),
  'stages[].max_frames': 0,
  'stages[].frame_shift_power': 0,
  'data.clip_start': 'random',
  'data.image_set': '',
  'data.image_path': '',
  'model.levels[].frame_attention_kind': 'divided',
  'model.cascade': False,
  'diffusion.augmentation': 0.5,
  'sampler.augmentation': 0.1,
  'model.levels[].share': 'none',
  'autoencoder.resolution': 0,
  'autoencoder.kind': 'plain',
  'autoencoder.kl_weight': 1e-6,
  'autoencoder.latent_channels': 4,
  'autoencoder.channels': (128, 256, 512, 512),
  'autoencoder.num_blocks': (2, 2, 2, 2),
  'autoencoder.num_groups': 32,
  'autoencoder.patch_size': 1,
  'stages[].kind': 'diffusion',
  'model.levels[].downsample': 'average',
  'optimizer.mu_dtype': 'float32',
}


def values_of(config, key: str) -> list:
  """The values of a key, one for each section of a list."""
  parts = [config]
  for name in key.split('.'):
    parts = [part[name.removesuffix('[]')] for part in parts]
    if name.endswith('[]'):
      parts = [section for part in parts for section in part]
  return parts


def write_older(workdir, values: dict) -> dict:
  """The config.json of a run that lacks all that was added since."""
  older = functools.reduce(toy.without, ADDED, values)
  # A section that lacks all of its keys was not there.
  older = {key: value for key, value in older.items() if value != {}}
  (workdir / 'config.json').write_text(json.dumps(older))
  return older


def test_an_older_run_is_read_with_the_values_that_it_behaved_by(
  make_config, tmp_path, caplog
):
  new = json.loads(make_config().to_json())
  older = write_older(tmp_path, new)
  assert older.keys() == new.keys() - {
    *('averages', 'guard', 'replicas_every', 'watchdog'),
    *('checkpoint_minutes', 'profile_every', 'trackers', 'autoencoder'),
  }
  with caplog.at_level('INFO', logger='absl'):
    config = load_config(read_config(tmp_path))
  for key, value in ADDED.items():
    found = values_of(config, key)
    assert found == [value] * len(found) and found
  ranges.check(config)
  (line,) = caplog.messages
  start, _, listed = line.partition(' Keys added since: ')
  assert start == f'{tmp_path}/config.json is of an earlier version.'
  assert listed.startswith("model.levels[].remat='none', model.levels[].lanes=")
  found = [text.split('=')[0] for text in re.split(r', (?=[a-z])', listed)]
  assert found == [*ADDED]

  # It goes on with a recipe of today, but not with what it did not do.
  require_same_config(tmp_path, new)
  require_same_config(tmp_path, new | {'checkpoint_minutes': 5.0})
  with pytest.raises(ValueError, match='seed: 0 -> 1'):
    require_same_config(tmp_path, new | {'seed': 1})
  text = new['text'] | {'padding': 'longest'}
  with pytest.raises(
    ValueError, match="text.padding: 'max_length' -> 'longest'"
  ):
    require_same_config(tmp_path, new | {'text': text})
  # Post-hoc EMAs may begin where there were none, and only there.
  averages = new['averages'] | {'widths': [0.05, 0.1]}
  require_same_config(tmp_path, new | {'averages': averages})
  write_config(tmp_path, new)
  with pytest.raises(ValueError, match=r'widths\[0\]: absent -> 0.05'):
    require_same_config(tmp_path, new | {'averages': averages})
  caplog.clear()
  with caplog.at_level('INFO', logger='absl'):
    assert json.loads(load_config(read_config(tmp_path)).to_json()) == new
  assert not caplog.messages  # It lacks nothing.


def test_the_home_directory_has_become_a_path(make_config, tmp_path):
  values = json.loads(make_config().to_json())
  values['data']['path'] = '~/x'
  write_config(tmp_path, values)
  values['data']['path'] = os.path.expanduser('~/x')
  require_same_config(tmp_path, values)


def test_an_older_run_of_cc12m_behaves_as_it_did(tmp_path):
  write_older(tmp_path, json.loads(cc12m_64.get_config().to_json()))
  config = load_config(read_config(tmp_path))
  for key in ('text.tokenizer_rules', 'text.padding', 'sampler.pixels'):
    assert values_of(config, key) == [ADDED[key]]


def test_the_number_of_added_keys_is_the_version(make_config, tmp_path):
  """Each is in the table of keys, may have its value, and is tested here."""
  assert builders_config._ADDED == ADDED
  assert ADDED.keys() <= ranges.KEYS.keys()
  values = json.loads(make_config().to_json())
  write_config(tmp_path, values)
  written = json.loads((tmp_path / 'config.json').read_text())
  assert written == {'version': len(ADDED), **values}


def later(values: dict) -> str:
  values['version'] = len(ADDED) + 2
  return (
    'config.json is of a later version of mdm_jax (its keys are version '
    f'{len(ADDED) + 2}; this one knows {len(ADDED)}): update mdm_jax.'
  )


def unknown(values: dict) -> str:
  values['stages'][1]['warm\n_up'] = 5
  return (
    "config.json: this version of mdm_jax has no key 'stages[1].warm\\n_up': "
    'use the version that the run was trained with.'
  )


@pytest.mark.parametrize('change', [later, unknown])
def test_a_run_that_cannot_be_read_here_is_refused_in_a_line(
  make_config, tmp_path, change
):
  config = make_config()
  values = json.loads(config.to_json())
  message = change(values)
  (tmp_path / 'config.json').write_text(json.dumps(values))
  before = (tmp_path / 'config.json').read_bytes()
  for read in (
    read_config,
    lambda workdir: require_same_config(workdir, values),
    lambda workdir: loop.setup(config, str(workdir)),
    lambda workdir: session.open_run(str(workdir)),
  ):
    with pytest.raises(ValueError) as error:
      read(tmp_path)
    assert str(error.value) == f'{tmp_path}/{message}'
  assert listing.run_changes(config, str(tmp_path)) == f'# {error.value}'
  assert (tmp_path / 'config.json').read_bytes() == before


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
