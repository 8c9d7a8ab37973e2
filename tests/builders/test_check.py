"""Mistakes in configurations are found before anything is compiled."""

import importlib
import json
import pathlib

from etils import epath
import jax
from ml_collections import ConfigDict
import pytest

from configs import common
from mdm_jax.builders.check import check
from mdm_jax.builders.check_levels import parts_of_batches
from mdm_jax.builders.config import load_config
from mdm_jax.builders.data import make_source
from mdm_jax.builders.model import make_levels
from mdm_jax.builders.stage import batch_sizes
from mdm_jax.data import precomputed
from mdm_jax.runtime import sharding

RECIPES = sorted(
  path.stem
  for path in (pathlib.Path(__file__).parents[2] / 'configs').glob('*.py')
  if path.stem not in ('__init__', 'common')
)


LOGIT_NORMAL = {'diffusion.time_density': 'logit_normal'}
ONE_SIZE = {  # Level 1 has features of one size.
  'model.levels[1].channels': (8,),
  'model.levels[1].num_blocks': (0,),
  'model.levels[1].attention_layers': (0,),
}
LINEAR = {
  'diffusion.schedule': 'linear',
  'diffusion.parameterization': 'velocity',
  'diffusion.loss_space': 'velocity',
}


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh({'data': -1, 'fsdp': 1, 'spatial': 1})


def changed(config: ConfigDict, changes: dict) -> ConfigDict:
  """Changes values, {'stages[1].steps': 0} as --config.stages[1].steps=0."""
  for path, value in changes.items():
    *sections, key = path.replace('[', '.').replace(']', '').split('.')
    section = config
    for name in sections:
      section = section[int(name)] if name.isdigit() else section[name]
    section[key] = value
  return config.lock()


def test_tiny_config_is_good(make_config, mesh):
  check(make_config().lock(), mesh)


@pytest.mark.parametrize(
  'image_set, message',
  [
    ('tars', 'images: another text encoder'),
    ('shapes', "with data.image_set='shapes': only a prepared data set"),
  ],
)
def test_text_features_of_both_sets_are_checked(
  make_config, mesh, t5_directory, monkeypatch, image_set, message
):
  def require_same(path, info, made_with):
    if path == 'images':
      raise ValueError(f'{path}: another text encoder')

  monkeypatch.setattr(precomputed, 'read_info', lambda path: None)
  monkeypatch.setattr(precomputed, 'require_same', require_same)
  config = make_config()
  config.text.update(encoder='precomputed', path=str(t5_directory.path))
  config.data.update(
    name='tars', path='clips', image_set=image_set, image_path='images'
  )
  with pytest.raises(ValueError, match=message):
    check(config, mesh)


def test_batches_of_training_matter_to_training_alone(make_config, mesh):
  config = changed(make_config(), {'stages[0].batch_size': 6})
  with pytest.raises(ValueError, match=r'stages\[0\].batch_size=6 is not div'):
    check(config, mesh)
  check(config, mesh, training=False)


@pytest.mark.parametrize(
  'changes',
  [
    {**LINEAR, **LOGIT_NORMAL, 'diffusion.stratified_times': True},
    {
      **LINEAR,
      'diffusion.parameterization': 'x0',
      'diffusion.noise_floor': 0.05,
    },
    {
      **LINEAR,
      'diffusion.parameterization': 'x0',
      'diffusion.time_weights': 'min_snr',
    },
    {'diffusion.level_times': 'coarse_first', 'diffusion.level_offset': 2.0},
    {'diffusion.level_times': 'independent', 'sampler.level_offset': 2.0},
    {'diffusion.schedule': 'ddpm'},
    {'diffusion.schedule': 'cosine'},
    {'diffusion.num_steps': 10},
  ],
)
def test_objectives_that_are_good(make_config, mesh, changes):
  check(changed(make_config(), changes), mesh)


def test_levels_of_patches_fit(make_config, mesh):
  config = make_config()
  for level in config.model.levels:
    level.patch_size = 2
  check(config.lock(), mesh)


def test_devices_hold_whole_periods_of_a_mixed_batch(make_config, mesh):
  config = make_config()
  config.stages[1].update(mixed_ratio=(1.0, 2.0), batch_size=48)
  check(config.lock(), mesh)
  assert batch_sizes(config.stages[1]) == (48, 32)
  assert parts_of_batches(config) == [8, 16, 16]
  config.stages[1].accumulate = 2
  assert parts_of_batches(config) == [8, 16, 8]


def test_rows_that_devices_do_not_divide_are_named(make_config):
  config = make_config()
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'spatial': 8})
  check(config, mesh)
  config.model.levels[0].update(resolution=4, scale_condition=4)
  config.model.levels[1].resolution = 8
  with pytest.raises(
    ValueError,
    match=(
      r'mesh.spatial=8 does not divide the height of the levels, \[4, 8\] px: '
      'use a divisor of 4'
    ),
  ):
    check(config, mesh)


def test_devices_divide_frames(make_config):
  config = make_config()
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'spatial': 4})
  config.model.levels[1].frames = 8
  check(config, mesh)
  config.model.levels[1].frames = 6
  with pytest.raises(ValueError, match=r'divide the frames .* \[6\]: .* of 6'):
    check(config, mesh)


TRANSFORMER = {
  'model.levels[0].kind': 'transformer',
  'model.levels[0].num_groups': 32,
  'model.levels[0].num_blocks': (1,),
}


def test_a_transformer_inside_is_good(make_config, mesh):
  check(changed(make_config(), TRANSFORMER), mesh)


# Of the first stage.
AUTOENCODER = {
  'autoencoder.resolution': 16,
  'autoencoder.channels': (8, 8),
  'autoencoder.num_blocks': (1, 0),
  'autoencoder.num_groups': 4,
  'stages[0].kind': 'autoencoder',
  'stages[0].num_levels': 0,
  'stages[0].loss_weights': (),
}


def test_a_first_stage_that_is_an_autoencoder_is_good(make_config, mesh):
  first, second = check(changed(make_config(), AUTOENCODER), mesh)
  assert first.batch_sizes == (16,) and second.batch_sizes == (16, 16)
  assert first.model.spec.code_shape == (8, 8, 4)
  assert first.model.image_shapes == ((16, 16, 3),)
  assert (first.is_generative, second.is_generative) == (False, True)


BAD = [
  ({'stages[0].num_levels': 0}, r'stages\[0\].num_levels=0: give 1 to 2'),
  (
    {**AUTOENCODER, 'stages[1].kind': 'autoencoder'},
    r"stages\[1\].kind='autoencoder': only the first stage",
  ),
  (
    {**AUTOENCODER, 'autoencoder.resolution': 0},
    "kind='autoencoder' with autoencoder.resolution=0: give the pixels",
  ),
  (
    {**AUTOENCODER, 'stages[0].num_levels': 1},
    r"stages\[0\].num_levels=1 with kind='autoencoder': .* leave it at 0",
  ),
  (
    {**AUTOENCODER, 'stages[0].mixed_ratio': (1.0, 1.0)},
    r'stages\[0\].mixed_ratio=\(1.0, 1.0\) with .* leave it at \(1.0,\)',
  ),
  (
    {**AUTOENCODER, 'autoencoder.resolution': 17},
    'autoencoder: resolution=17 .*: use a multiple of 2',
  ),
  (
    {**AUTOENCODER, 'autoencoder.num_groups': 3},
    'autoencoder: num_groups=3 does not divide the 8 channels',
  ),
  (
    {**AUTOENCODER, 'stages[0].accumulate': 4},
    r'stages\[0\].batch_size=16 / 4 does not give each of the 8 devices',
  ),
  (
    {'model.levels[0].frames': 2, 'model.levels[1].frames': 3},
    r'model.levels\[1\].frames=3: give a multiple of the 2 of level 0',
  ),
  (
    {
      'model.levels[0].frames': 4,
      'model.levels[1].frames': 8,
      'stages[1].max_frames': 6,
    },
    r'model.levels\[1\].frames=6 with stages\[1\].max_frames=6: give a '
    'multiple of the 4 of level 0',
  ),
  (
    {
      'model.levels[0].frames': 4,
      'model.levels[1].frames': 4,
      'stages[1].max_frames': 1,
    },
    r'stages\[1\].max_frames=1 gives its levels fewer frames than the stage '
    'before',
  ),
  (
    {
      'model.levels[0].frames': 4,
      'model.levels[1].frames': 8,
      'stages[1].max_frames': 4,
    },
    r'stages\[1\].max_frames=4: its levels have 4 and 8 frames, and would have '
    '4 and 4, other times of the clip; give 1 or 0',
  ),
  (
    {
      **ONE_SIZE,
      'model.levels[0].patch_size': 2,
      'model.levels[1].patch_size': 3,
      'model.levels[1].resolution': 12,
    },
    r'model.levels\[1\].resolution=12: give a multiple of the 8 px of level 0',
  ),
  (
    {**ONE_SIZE, 'model.levels[1].resolution': 8},
    r'model.levels\[1\] has the resolution and frames of level 0: give it more',
  ),
  (
    {'model.levels[1].frame_attention': (1,)},
    r'model.levels\[1\].*frame_attention=\(1,\): give one entry',
  ),
  ({'dtype': 'float16'}, "dtype='float16': use one of float32, bfloat16"),
  (
    {'stages[0].batch_size': 12},
    r'stages\[0\].batch_size=12 is not divisible by 8',
  ),
  ({'stages[1].batch_size': 0}, r'stages\[1\].batch_size=0'),
  ({'eval.batch_size': 4}, 'eval.batch_size=4 is not divisible by 8'),
  (
    {
      'model.levels[0].resolution': 7,
      'model.levels[0].channels': (8, 8),
      'model.levels[0].num_blocks': (1, 1),
      'model.levels[0].attention_layers': (0, 0),
    },
    r'model.levels\[0\].resolution=7 cannot be .* halved 1 times',
  ),
  (
    {'model.levels[1].resolution': 32},
    r'model.levels\[1\].resolution=32 .* gives 16 px, but level 0 works at 8',
  ),
  ({'model.levels[0].patch_size': 0}, r'levels\[0\].*patch_size=0'),
  (
    {'model.levels[0].patch_size': 3},
    r'resolution=8 cannot be divided into patches of 3 px and halved 0 times',
  ),
  (
    {'model.levels[0].patch_size': 2},
    r'levels\[1\].* gives 8 px, but level 0 works at 4',
  ),
  (
    {'model.levels[1].channels': (8, 8, 8)},
    r'model.levels\[1\].*channels, num_blocks and attention_layers must',
  ),
  (
    {'model.levels[0].num_groups': 3},
    r'model.levels\[0\].*num_groups=3 does not divide the 8 channels',
  ),
  (
    {'model.levels[0].num_heads': 3, 'model.levels[0].attention_layers': (1,)},
    r'model.levels\[0\].*num_heads=3 does not divide the 8 channels',
  ),
  # The middle of the innermost level always has attention.
  (
    {'model.levels[0].num_heads': 3},
    r'model.levels\[0\].*num_heads=3 does not divide the 8 channels',
  ),
  (
    {'model.levels[1].share': 'some'},
    r"model.levels\[1\].share='some': use one of none, blocks, all",
  ),
  (
    {'model.levels[0].share': 'all'},
    r"model.levels\[0\]: share='all': the coarsest level has none to share "
    "with; use 'none'",
  ),
  (
    {**TRANSFORMER, 'model.levels[1].share': 'blocks'},
    r"model.levels\[1\]: share='blocks': the next coarser level is of kind="
    "'transformer', which has no layers of a UNet; use 'none'",
  ),
  (
    {'model.levels[1].share': 'blocks', 'model.levels[1].channels': (8, 12)},
    r"model.levels\[1\]: share='blocks': no layer of channels=\(8, 12\) has "
    r'the widths, .* channels=\(8,\), .*; make its last two channels 8, or use',
  ),
  (
    {'model.levels[0].kind': 'dit'},
    r"model.levels\[0\].kind='dit': use one of unet, transformer",
  ),
  (
    {'model.levels[1].kind': 'transformer'},
    r"model.levels\[1\].kind='transformer': only the innermost level, level 0",
  ),
  (
    {'model.levels[0].kind': 'transformer'},
    r"model.levels\[0\]: kind='transformer' with channels=\(8,\) and "
    r'num_blocks=\(0,\): give one width and one depth',
  ),
  (
    TRANSFORMER | {'model.levels[0].num_groups': 4},
    r'model.levels\[0\]: .*num_groups=4: that is of UNets; leave it at 32',
  ),
  (
    TRANSFORMER | {'model.levels[0].num_heads': 3},
    r'model.levels\[0\]: num_heads=3 does not divide the width 8',
  ),
  (
    TRANSFORMER | {'model.levels[0].num_heads': 4},
    r'model.levels\[0\]: num_heads=4 .* heads of a multiple of 4 channels',
  ),
  (
    TRANSFORMER | {'model.levels[0].patch_size': 3},
    r'model.levels\[0\].resolution=8 .* into patches of 3 px',
  ),
  (
    TRANSFORMER | {'model.levels[0].lanes': 64},
    r'model.levels\[0\]: .*lanes=64: that is of UNets; leave it at 1',
  ),
  ({'model.levels[1].temporal_dim': 32}, 'temporal_dim'),
  ({'model.levels': []}, 'at least one stage and one level'),
  ({'text.num_heads': 3}, 'text.num_heads=3 does not divide text.width=16'),
  (
    {'model.text.num_heads': 3, 'model.text.num_layers': 1},
    'model.text.num_heads=3 does not divide model.text.width=16',
  ),
  ({'text.encoder': 'clip'}, "text.encoder='clip': use one of"),
  ({'text.encoder': 't5'}, 'text.path is empty: name the directory of a T5'),
  (
    {'text.encoder': 't5', 'text.path': 'nowhere'},
    "text.path='nowhere' is no directory: name the directory of a T5",
  ),
  ({'text.tokenizer': 'no/such.model'}, "no tokenizer at 'no/such.model'"),
  ({'text.max_length': 1}, 'text.max_length=1: give an integer from 2'),
  ({'text.encoder': 'label'}, 'text.num_classes=0: give the number'),
  (
    {
      'text.encoder': 'label',
      'text.num_classes': 3,
      'text.class_names': 'no/such',
    },
    "class_names='no/such' does not exist",
  ),
  ({'text.caption_dropout': 1.5}, 'text.caption_dropout=1.5'),
  ({'diffusion.schedule': 'sine'}, "schedule='sine': use one of deepfloyd"),
  (
    {'text.padding': 'batch'},
    "text.padding='batch': use one of max_length, longest",
  ),
  (
    {'text.tokenizer_rules': 't5'},
    "tokenizer_rules='t5': use one of sentencepiece, release",
  ),
  ({'sampler.pixels': 'floor'}, "pixels='floor': use one of round, truncate"),
  (
    {'diffusion.time_density': 'cauchy'},
    "time_density='cauchy': use one of uniform, logit_normal",
  ),
  (
    {'diffusion.time_weights': 'max_snr'},
    "time_weights='max_snr': use one of none, vdm, min_snr, sigmoid, p2",
  ),
  (
    {'diffusion.logit_normal': (0.0, 0.0), **LOGIT_NORMAL},
    r'logit_normal=\(0.0, 0.0\): give a mean and a standard deviation above 0',
  ),
  ({'diffusion.logit_normal': (99.0, 1.0)}, r'diffusion.logit_normal=\(99.0'),
  ({'diffusion.min_snr_gamma': 0.0}, 'min_snr_gamma=0.0: give a number above'),
  ({'diffusion.sigmoid_bias': 31.0}, 'sigmoid_bias=31.0: give a number from'),
  (
    {**LINEAR, 'diffusion.time_weights': 'p2', 'diffusion.p2': (9.0, 0.0)},
    "time_weights='p2': its weights are 0 or infinite in float32",
  ),
  (
    {'diffusion.noise_floor': 0.05},
    "noise_floor=0.05: it is for parameterization='x0' with another loss_space",
  ),
  (
    {
      **LINEAR,
      'diffusion.parameterization': 'x0',
      'diffusion.time_weights': 'p2',
      'diffusion.p2': (0.5, 1.0),
    },
    'the loss divides by the noise',
  ),
  (
    {'diffusion.level_times': 'coarse_first'},
    "level_times='coarse_first' with level_offset=0.0: give the nats",
  ),
  (
    {'diffusion.level_times': 'coarse_first', 'diffusion.level_offset': 11.0},
    'level_offset=11.0: give a number from 0 to 10',
  ),
  ({'diffusion.p2': (-1.0, 1.0)}, r'diffusion.p2=\(-1.0, 1.0\): give a tuple'),
  ({'diffusion.p2': (1.0,)}, r'diffusion.p2=\(1.0,\): give a tuple of 2'),
  ({'diffusion.noise_floor': 1.0}, 'noise_floor=1.0: give a number from 0 to'),
  (
    {'diffusion.schedule': 'linear'},
    "parameterization='v' with schedule='linear': use velocity or x0",
  ),
  (
    {**LINEAR, 'diffusion.parameterization': 'eps'},
    "parameterization='eps' with schedule='linear': use velocity or x0",
  ),
  (
    {**LINEAR, 'diffusion.loss_space': 'v'},
    "loss_space='v' with schedule='linear': use velocity, eps or x0",
  ),
  (
    {**LINEAR, 'diffusion.parameterization': 'x0'},
    "parameterization='x0' with schedule='linear' and loss_space='velocity': "
    'the loss divides by the noise, which is 0 at t = 0; give '
    'diffusion.noise_floor',
  ),
  (
    {'diffusion.level_times': 'alternating'},
    "level_times='alternating': use one of shared, independent, coarse_first",
  ),
  (
    {
      'diffusion.level_times': 'independent',
      'stages[1].num_levels': 1,
      'stages[1].loss_weights': (1.0,),
      'stages[1].mixed_ratio': (1.0,),
    },
    "level_times='independent' with a single level: use 'shared'",
  ),
  (
    {'diffusion.level_offset': 1.0},
    "level_offset=1.0 with level_times='shared': give 0.0, or",
  ),
  ({'diffusion.level_offset': -1.0}, 'diffusion.level_offset=-1.0: give a num'),
  (
    {'sampler.level_offset': 1.0},
    "sampler.level_offset=1.0 with diffusion.level_times='shared': give 0.0",
  ),
  (
    {'diffusion.parameterization': 'eps', 'diffusion.loss_space': 'v'},
    "loss_space='v' with parameterization='eps': the loss divides by the si",
  ),
  (
    {'diffusion.schedule': 'ddpm', 'diffusion.num_steps': 100},
    "diffusion.num_steps=100 with schedule='ddpm': .* 36% of the .* as 1000",
  ),
  ({'diffusion.num_steps': 1}, 'diffusion.num_steps=1: give an integer from 2'),
  (
    {'diffusion.reference_resolution': 100_000},
    'diffusion.reference_resolution=',
  ),
  (
    {'model.levels[0].frame_attention': (1,)},
    r'levels\[0\].frame_attention=\(1,\) with frames=1: images have no frames',
  ),
  (
    {'stages[1].frame_shift_power': 1.0},
    r'stages\[1\].frame_shift_power=1.0: no level has clips; give 0.0',
  ),
  (
    {'stages[0].max_frames': 1},
    r'stages\[0\].max_frames=1: no level has clips; give 0\.',
  ),
  (
    {'model.levels[1].frame_attention_kind': 'joint'},
    r"levels\[1\].frame_attention_kind='joint' with frame_attention=\(\): .* "
    "give 'divided'",
  ),
  (
    {'autoencoder.resolution': 64},
    'autoencoder.resolution=64: no stage trains it; give 0, or',
  ),
  ({'diffusion.parameterization': 'x'}, "diffusion.parameterization='x'"),
  ({'diffusion.loss_space': 'x'}, "diffusion.loss_space='x'"),
  ({'sampler.name': 'euler'}, "sampler.name='euler'"),
  ({'sampler.threshold': 'hard'}, "threshold='hard': use one of none"),
  (
    {'sampler.num_steps': 1001},
    'num_steps=1001: give an integer from 1 to 1,000',
  ),
  ({'sampler.eta': 2.0}, 'eta.*2.0'),
  (
    {'sampler.guidance_rescale': -0.5},
    'guidance_rescale=-0.5: give a number from',
  ),
  (
    {'sampler.guidance_interval': (0.5, 0.5)},
    r'guidance_interval=\(0.5, 0.5\): give two rising shares',
  ),
  (
    {'optimizer.decay': 'linear'},
    "decay='linear': use one of constant, cosine",
  ),
  ({'optimizer.name': 'sgd'}, "optimizer.name='sgd': use one of adamw"),
  ({'stages': []}, 'at least one stage and one level'),
  ({'stages[1].name': '8'}, r"stages have names \['8', '8'\]"),
  ({'stages[1].steps': 0}, r'stages\[1\].steps=0'),
  ({'stages[1].loss_weights': (0.0, 0.0)}, 'loss_weights=.*: give one above 0'),
  ({'seed': 2**31}, 'seed=2147483648 with 2 stages: .* 0 to 2,147,483,647'),
  ({'text.width': 15, 'text.num_heads': 3}, 'text.width=15: give an even'),
  ({'stages[1].num_levels': 3}, r'stages\[1\].num_levels=3: give 1 to 2'),
  (
    {
      'stages[0].num_levels': 2,
      'stages[1].num_levels': 1,
      'stages[0].loss_weights': (1.0, 1.0),
      'stages[0].mixed_ratio': (0.0, 1.0),
    },
    r'stages\[1\].num_levels=1 is less',
  ),
  (
    {'stages[1].loss_weights': (1.0,)},
    r'stages\[1\].loss_weights=\(1.0,\): give one number for each of its 2',
  ),
  (
    {'stages[1].mixed_ratio': (1.0, 1.0, 1.0)},
    r'stages\[1\].mixed_ratio=\(1.0, 1.0, 1.0\): give one number',
  ),
  ({'stages[1].mixed_ratio': (1.0, 2.0)}, r'stages\[1\].*16 examples do not'),
  ({'stages[1].mixed_ratio': (1.0, 0.0)}, r'stages\[1\].*mixed_ratio'),
  (
    {'stages[1].mixed_ratio': (1.0, 1.0), 'stages[1].batch_size': 24},
    r'stages\[1\].batch_size=24 does not .* 8 devices .*'
    r'mixed_ratio=\(1.0, 1.0\), 2 examples each: use a multiple of 16',
  ),
  (
    {'stages[1].accumulate': 3},
    r'stages\[1\].accumulate=3 does not divide the 16 patterns',
  ),
  ({'stages[1].accumulate': 0}, r'stages\[1\].accumulate=0'),
  (
    {'stages[1].accumulate': 4},
    r'stages\[1\].batch_size=16 / 4 does not .* use a multiple of 32',
  ),
  (
    {'guard.spike_factor': 0.5},
    'guard.spike_factor=0.5: give a number above 1 and up to .*, or 0',
  ),
  ({'guard.window': 0}, 'guard.window=0'),
  ({'guard.max_skipped': 0}, 'guard.max_skipped=0'),
  (
    {'averages.widths': (0.05, 0.3)},
    r'averages.widths=\(0.05, 0.3\): give a tuple, each a number from 0.001',
  ),
  ({'averages.widths': (0.05, 0.05)}, 'averages.widths=.*they must differ'),
  ({'averages.snapshot_every': 0}, 'averages.snapshot_every=0: give an int'),
  ({'eval.every': -1}, 'eval.every=-1: give an integer from 0'),
  (
    {'eval.best_metric': 'held_out_loss_8', 'eval.loss_every': 0},
    "eval.best_metric='held_out_loss_8' with eval.every=0: give the steps",
  ),
  (
    {'eval.best_metric': 'accuracy_all'},  # `loss_every` has no samples.
    "eval.best_metric='accuracy_all' with eval.every=0: give the steps",
  ),
  (
    {'eval.best_metric': 'train_split_loss_8'},
    r"best_metric='train_split_loss_8': use one of \['held_out_loss_8',",
  ),
  ({'eval.loss_every': -1}, 'eval.loss_every=-1: give an integer from 0'),
  (
    {'trackers': ('tensorboard', 'wanb')},
    r"trackers=\('tensorboard', 'wanb'\): give a tuple, each one of "
    'tensorboard, wandb',
  ),
  (
    {'eval.best_metric': 'loss', 'eval.every': 10},
    r"best_metric='loss': use one of \['held_out_loss_8', 'held_out_loss_16',"
    " 'accuracy_background'",
  ),
  (
    {
      'eval.best_metric': 'accuracy_all',
      'eval.every': 10,
      'text.encoder': 'label',
      'text.num_classes': 8,
      'text.width': 16,
    },
    r"best_metric='accuracy_all': use one of \['held_out_loss_8', ",
  ),
  (
    {'data.image_set': 'tars'},
    "data.image_set='tars': no level has clips. Set data.name",
  ),
  (
    {
      'data.image_set': 'shapes',
      'model.levels[0].frames': 4,
      'model.levels[1].frames': 4,
    },
    "data.image_set='shapes': no stage is trained on images. Give one max_f",
  ),
  (
    {
      'data.image_set': 'tars',
      'model.levels[0].frames': 4,
      'model.levels[1].frames': 4,
      'stages[0].max_frames': 1,
    },
    r"data.image_set='tars': name its directory, --config.data.image_path=DIR",
  ),
  ({'log_every': 0}, 'log_every=0'),
  ({'sample_every': 0}, 'sample_every=0'),
  ({'checkpoint_every': -1}, 'checkpoint_every=-1'),
]


@pytest.mark.parametrize(
  'changes, message', BAD, ids=[','.join(changes) for changes, _ in BAD]
)
def test_bad_config_is_named(make_config, mesh, changes, message):
  config = changed(make_config(), changes)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    check(config, mesh)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'data.name': 'captioned_images'}, 'data.path is empty'),
    ({'data.name': 'captioned_images', 'data.path': 'no/such'}, 'no/such'),
    ({'data.name': 'cc12m'}, "data.name='cc12m': use one of"),
    (
      {'data.name': 'tfds:no_such', 'data.path': 'nowhere'},
      "TFDS has no data set 'no_such' in nowhere",
    ),
  ],
)
def test_bad_data_is_named(make_config, changes, message):
  config = changed(make_config(), changes)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    make_source(config, 'train', 16)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ['changes', 'message'],
  [
    (
      {'data.name': 'captioned_images', 'data.path': 'HERE'},
      "data.path='gs://.*': ArrayRecord files cannot .* Mount it with gcsfuse",
    ),
    (
      {'data.name': 'tfds:flowers', 'data.path': 'HERE'},
      "data.path='gs://.*': ArrayRecord files cannot .* data.name='tars'",
    ),
    (
      {'data.name': 'tars', 'data.path': 'gs://not-there/index'},
      "data.path='gs://not-there/index': there is no bucket not-there: create",
    ),
    (
      {'data.name': 'tars', 'data.path': 'HERE'},
      'no index in gs://.*: make one with python -m mdm_jax.tools.index_tars',
    ),
    (
      {'text.encoder': 't5', 'text.path': 'gs://not-there/t5'},
      "text.path='gs://not-there/t5': there is no bucket not-there",
    ),
    (
      {'text.encoder': 't5', 'text.path': 'HERE/t5'},
      "text.path='gs://.*/t5' is no directory: name the directory of a T5",
    ),
    (
      {'text.tokenizer': 'gs:/tests/spiece.model'},
      'text.tokenizer=.*write gs:// with two slashes',
    ),
    (
      {'text.tokenizer': 'HERE/spiece.model'},
      "no tokenizer at 'gs://.*/spiece.model': give the path",
    ),
    (
      {
        'text.encoder': 'label',
        'text.num_classes': 6,
        'text.class_names': 'HERE/names',
      },
      "text.class_names='gs://.*/names' does not exist",
    ),
  ],
)
def test_what_is_wrong_in_a_bucket_is_named(
  make_config, mesh, bucket, changes, message
):
  changes = {
    key: value.replace('HERE', bucket.path) if isinstance(value, str) else value
    for key, value in changes.items()
  }
  (epath.Path(bucket.path) / 'other').write_text('')
  config = changed(make_config(), changes)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    check(config, mesh)
    make_source(config, 'train', 16)
  assert '\n' not in str(error.value)


def test_a_bucket_that_refuses_is_named(make_config, mesh, bucket):
  for key, status, message in (
    ('data.path', 403, 'data.path=.*no permission .*: give this account the'),
    ('text.path', 401, 'text.path=.*gcloud auth application-default login'),
  ):
    changes = {'data.name': 'tars', key: f'{bucket.path}/x'}
    with (
      bucket.failing('.', status=status, body=b'no access'),
      pytest.raises(ValueError, match=message),
    ):
      check(changed(make_config(), changes), mesh)


@pytest.mark.parametrize(
  'path',
  [
    'nonsense',
    'data.nonsense',
    'stages[0].nonsense',
    'model.levels[1].nonsense',
  ],
)
def test_locked_config_rejects_unknown_keys(make_config, path):
  with pytest.raises(KeyError, match='nonsense'):
    changed(make_config().lock(), {path: 1})


def recipe(name: str, mode: str) -> ConfigDict:
  return importlib.import_module(f'configs.{name}').get_config(mode).lock()


def keys(section: ConfigDict) -> dict:
  return {
    key: keys(value) if isinstance(value, ConfigDict) else None
    for key, value in section.items()
  }


@pytest.mark.parametrize('mode', ['', 'smoke'])
@pytest.mark.parametrize('name', RECIPES)
def test_recipe(name, mode, mesh, t5_directory):
  config = recipe(name, mode)
  if config.text.encoder == 't5':
    config.text.path = str(t5_directory.path)
  if config.data.name in ('captioned_images', 'tars') and not config.data.path:
    is_video = any(level.frames > 1 for level in config.model.levels)
    config.data.name = 'moving_shapes' if is_video else 'shapes'
  if (name, mode) == ('moving_shapes', ''):
    # Its mixed batch, of as many clips as two cores can take, has 4 patterns.
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:4])
  check(config, mesh)
  # A recipe sets exactly the keys that common.py documents.
  assert keys(config) == keys(common.get_config())
  for level in config.model.levels:
    assert keys(level) == keys(common.level(8))
  for stage in config.stages:
    assert keys(stage) == keys(common.stage('8', 1))


def test_a_stage_of_images_has_no_attention_between_frames():
  config = recipe('emoji_video', '')
  levels = [make_levels(config, stage) for stage in config.stages]
  assert [[x.frame_attention for x in each] for each in levels] == [
    [()],
    [(1,)],
    [(1,), (0, 1)],
  ]


@pytest.mark.parametrize('mode', ['', 'smoke'])
@pytest.mark.parametrize('name', RECIPES)
def test_only_recipes_of_released_models_follow_the_release(name, mode):
  config = recipe(name, mode)
  text = config.text.tokenizer_rules, config.text.padding
  trainer = config.diffusion.normalize_time_weights, config.sampler.pixels
  is_released = name.startswith('flickr')
  assert text == (
    ('release', 'longest')
    if is_released or name.startswith(('cc12m', 'webvid'))
    else ('sentencepiece', 'max_length')
  )
  assert trainer == ((True, 'truncate') if is_released else (False, 'round'))


@pytest.mark.parametrize('name', RECIPES)
def test_config_survives_json(name):
  config = recipe(name, '')
  again = load_config(json.loads(config.to_json()))
  assert again == config
  assert again.is_locked
  assert again.to_json() == config.to_json()
