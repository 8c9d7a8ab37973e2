"""What each key of the configuration may be: its type, its range, its names.

The table has every key of configs/common.py. `check` is quick and imports
nothing slow, so that a command checks its configuration before all else.
Conditions between keys are in `check.py`.
"""

from collections.abc import Iterator, Mapping
import contextlib
import re
from typing import Any

from ml_collections import ConfigDict

from mdm_jax.runtime.value_types import (
  NAME,
  SEED,
  Boolean,
  Choice,
  List,
  Number,
  Path,
  Text,
  Tuple,
)

# `samplers.SAMPLERS` and `samplers.THRESHOLDS`, which import JAX; a test
# compares them.
SAMPLERS = ('ddim', 'ddpm', 'heun', 'dpm', 'dpm_sde')
THRESHOLDS = ('none', 'clip', 'dynamic', 'dynamic_if')
# What `inference.evaluation` measures.
METRICS = (
  'loss',
  'prompt_accuracy',
  'edge_width',
  'frechet',
  'fid',
  'kid',
  'precision_recall',
  'clip',
  'flicker',
  'fvd',
)

_SPACES = Choice(('v', 'eps', 'x0', 'velocity'))
_PERIOD = Number(int, 1, 10**9)  # in steps
_RARELY = Number(int, 0, 10**9)  # in steps; 0: never
_SHARE = Number(float, 0, 1)
_NATS = Number(float, 0, 10)  # of logSNR
# Nearer to 1 it is 1 in float32, and Adam divides by 0.
_DECAY = Number(float, 0, 0.9999999)
_AXIS = Number(int, 1, 10**6, also=(-1,))
_SECONDS = Number(int, 0, 10**7)
_WIDTH = Number(int, 1, 10**6)
_FRAMES = Number(int, 1, 1024)
_LAYERS = Number(int, 0, 1000)
_HEADS = Number(int, 1, 10**5)
_BATCH = Number(int, 1, 10**6)
_FEATURE = Text('a name of TFDS', r'\S+')
_WEIGHTS = Tuple(Number(float, 0, 10**6))
# sigma_rel of the plain mean, `post_hoc_ema.MAX_SIGMA_REL`, imports JAX.
SIGMA_REL = Number(float, 0.001, 12**-0.5, below=True)


class _Rules:
  """Pairs of a regular expression and a tuple of mesh axes."""

  def __str__(self):
    return (
      "pairs such as (r'/kernel$', ('fsdp',)) of a regular expression and a "
      'tuple of mesh axes, data, fsdp, spatial or None'
    )

  def check(self, value: Any) -> tuple:
    """Returns the value; raises ValueError if it is something else."""
    try:
      if not isinstance(value, tuple):
        raise TypeError
      for path, axes in value:
        re.compile(path)
        if not isinstance(axes, tuple) or not set(axes) <= {
          'data',
          'fsdp',
          'spatial',
          None,
        }:
          raise ValueError
    except (re.error, TypeError, ValueError):
      raise ValueError(f'give {self}.') from None
    return value


# By key; [] stands for the index of a level or a stage.
KEYS = {
  'seed': SEED,
  'dtype': Choice(('float32', 'bfloat16')),
  'mesh.data': _AXIS,
  'mesh.fsdp': _AXIS,
  'mesh.spatial': _AXIS,
  'sharding_rules': _Rules(),
  'data.name': Choice(
    ('shapes', 'moving_shapes', 'captioned_images', 'tars', 'tfds:NAME')
  ),
  'data.path': Path('directory', missing=True, empty=True),
  'data.image_set': Choice(('', 'shapes', 'captioned_images', 'tars')),
  'data.image_path': Path('directory', missing=True, empty=True),
  'data.image': _FEATURE,
  'data.caption': _FEATURE,
  'data.label': _FEATURE,
  'data.train_split': Text('a split of TFDS', r'\S.*'),
  'data.validation_split': Text('a split of TFDS'),
  'data.size': Number(int, 1, 2**31 - 1),
  'data.two_objects': _SHARE,
  'data.flip': Boolean(),
  'data.random_crop': Boolean(),
  'data.clip_start': Choice(('first', 'centre', 'random')),
  'data.max_bad_fraction': _SHARE,
  'data.max_pixels': Number(int, 1, 2**32),
  'data.may_change': Boolean(),
  'data.num_workers': Number(int, 0, 1000),
  'data.num_threads': Number(int, 1, 1000),
  'data.prefetch': Number(int, 1, 1000),
  'text.encoder': Choice(('learned', 'label', 't5', 'precomputed')),
  'text.path': Path('directory', missing=True, empty=True),
  'text.tokenizer': Path('file', missing=True, empty=True),
  'text.tokenizer_rules': Choice(('sentencepiece', 'release')),
  'text.padding': Choice(('max_length', 'longest')),
  'text.max_length': Number(int, 2, 10**5),
  'text.long_captions': Choice(('cut', 'leave_out')),
  'text.num_classes': Number(int, 0, 10**7),
  'text.class_names': Path('file', missing=True, empty=True),
  'text.width': _WIDTH,
  'text.num_layers': _LAYERS,
  'text.num_heads': _HEADS,
  'text.caption_dropout': _SHARE,
  'model.text.width': _WIDTH,
  'model.text.num_layers': _LAYERS,
  'model.text.num_heads': _HEADS,
  'model.text.masked_attention': Boolean(),
  'model.cascade': Boolean(),
  'model.levels[].resolution': Number(int, 1, 2**16),
  'model.levels[].frames': _FRAMES,
  'model.levels[].kind': Choice(('unet', 'transformer')),
  'model.levels[].channels': Tuple(_WIDTH),
  'model.levels[].num_blocks': Tuple(_LAYERS),
  'model.levels[].attention_layers': Tuple(_LAYERS),
  'model.levels[].attention_ffn': Boolean(),
  'model.levels[].frame_attention': Tuple(_LAYERS),
  'model.levels[].frame_attention_kind': Choice(('divided', 'joint')),
  'model.levels[].temporal_dim': Number(int, 8, 10**6),
  'model.levels[].scale_condition': Number(int, 1, 2**16),
  'model.levels[].normalize_input': Boolean(),
  'model.levels[].num_heads': _HEADS,
  'model.levels[].num_groups': _WIDTH,
  'model.levels[].position_waves': Number(int, 0, 64),
  'model.levels[].patch_size': Number(int, 1, 1024),
  'model.levels[].remat': Choice(('none', 'block', 'level')),
  'model.levels[].lanes': Number(int, 0, 10**5),
  'model.levels[].downsample': Choice(('average', 'encoder')),
  'model.levels[].share': Choice(('none', 'blocks', 'all')),
  'autoencoder.resolution': Number(int, 0, 2**16),
  'autoencoder.kind': Choice(('plain', 'kl')),
  'autoencoder.kl_weight': Number(float, 0, 1000),
  'autoencoder.latent_channels': _WIDTH,
  'autoencoder.channels': Tuple(_WIDTH),
  'autoencoder.num_blocks': Tuple(_LAYERS),
  'autoencoder.num_groups': _WIDTH,
  'autoencoder.patch_size': Number(int, 1, 1024),
  'diffusion.schedule': Choice(('deepfloyd', 'ddpm', 'cosine', 'linear')),
  'diffusion.num_steps': Number(int, 2, 10**5),
  'diffusion.reference_resolution': Number(int, 0, 10**5),
  'diffusion.parameterization': _SPACES,
  'diffusion.loss_space': _SPACES,
  'diffusion.noise_floor': Number(float, 0, 1, below=True),
  'diffusion.time_weights': Choice(('none', 'vdm', 'min_snr', 'sigmoid', 'p2')),
  'diffusion.min_snr_gamma': Number(float, 0, 1000, above=True),
  'diffusion.sigmoid_bias': Number(float, -10, 10),
  'diffusion.p2': Tuple(Number(float, 0, 10), 2),
  'diffusion.normalize_time_weights': Boolean(),
  'diffusion.time_density': Choice(('uniform', 'logit_normal')),
  'diffusion.logit_normal': Tuple(Number(float, -10, 10), 2),
  'diffusion.stratified_times': Boolean(),
  'diffusion.level_times': Choice(('shared', 'independent', 'coarse_first')),
  'diffusion.level_offset': _NATS,
  'diffusion.augmentation': _SHARE,
  'stages[].name': NAME,
  'stages[].kind': Choice(('diffusion', 'autoencoder')),
  'stages[].num_levels': Number(int, 0, 100),
  'stages[].steps': _PERIOD,
  'stages[].batch_size': _BATCH,
  'stages[].accumulate': _BATCH,
  'stages[].learning_rate': Number(float, 0, 1000),
  'stages[].warmup_steps': _RARELY,
  'stages[].max_frames': Number(int, 0, 1024),
  'stages[].shift_power': Number(float, 0, 10),
  'stages[].frame_shift_power': Number(float, 0, 10),
  'stages[].loss_weights': _WEIGHTS,
  'stages[].mixed_ratio': _WEIGHTS,
  'optimizer.name': Choice(('adamw', 'muon')),
  'optimizer.b1': _DECAY,
  'optimizer.b2': _DECAY,
  'optimizer.epsilon': Number(float, 1e-30, 1),
  'optimizer.mu_dtype': Choice(('float32', 'bfloat16')),
  'optimizer.weight_decay': Number(float, 0, 1000),
  'optimizer.clip_norm': Number(float, 1e-30, 10**9),
  'optimizer.adam_scale': Number(float, 0, 1000),
  'optimizer.decay': Choice(('constant', 'cosine')),
  'optimizer.ema_decay': _SHARE,
  'averages.widths': Tuple(SIGMA_REL),
  'averages.snapshot_every': _PERIOD,
  'guard.spike_factor': Number(float, 1, 10**9, above=True, also=(0,)),
  'guard.window': _PERIOD,
  'guard.max_skipped': _PERIOD,
  'sampler.name': Choice(SAMPLERS),
  'sampler.num_steps': Number(int, 1, 10**5),
  'sampler.eta': _SHARE,
  'sampler.guidance': Number(float, 0, 1000),
  'sampler.guidance_rescale': _SHARE,
  'sampler.guidance_interval': Tuple(_SHARE, 2),
  'sampler.pixels': Choice(('round', 'truncate')),
  'sampler.threshold': Choice(THRESHOLDS),
  'sampler.level_offset': _NATS,
  'sampler.augmentation': _SHARE,
  'log_every': _PERIOD,
  'trackers': Tuple(Choice(('tensorboard', 'wandb'))),
  'sample_every': _PERIOD,
  'checkpoint_every': _PERIOD,
  'checkpoint_minutes': Number(float, 0, 10**6),
  'checkpoints_to_keep': Number(int, 1, 10**6),
  'save_failures': Number(int, 1, 10**6),
  'replicas_every': _RARELY,
  'profile_every': _RARELY,
  'watchdog.start_up': _SECONDS,
  'watchdog.step': _SECONDS,
  'watchdog.save': _SECONDS,
  'watchdog.evaluate': _SECONDS,
  'eval.num_prompts': Number(int, 1, 10**7),
  'eval.loss_batches': Number(int, 1, 10**6),
  'eval.batch_size': _BATCH,
  'eval.every': _RARELY,
  'eval.loss_every': _RARELY,
  'eval.best_metric': Text('the name of a metric', r'\w*'),
}
_LISTS = ('model.levels', 'stages')


class UnknownKey(ValueError):
  """A configuration has a key that is not in the table.

  Attributes:
    key: with the sections that it is in.
  """

  def __init__(self, key: str):
    """The message is for whoever writes a recipe."""
    super().__init__(f'{key}: no such key; configs/common.py has all keys.')
    self.key = key


def pattern(key: str) -> str:
  """The key of the table for a key: 'stages[].steps' of 'stages[1].steps'."""
  return re.sub(r'\[-?\d+\]', '[]', key)


# Frames of a sampled clip.
FRAMES = Number(int, 1, 10**4)

# What an evaluation's options may be, as flags and in Python.
EVALUATION = {
  'metrics': List(Choice(METRICS)),
  'num_samples': Number(int, 1, 10**7),
  'seed': SEED,
  'num_reference': Number(int, 1, 10**9),
  'reference_split': Text('the name of a split', r'\S.*'),
  'reference': Path('directory'),
  'resolution': Number(int, 1, 2**16),
  'inception': Path('file'),
  'clip': Path('directory'),
  'i3d': Path('file'),
  'cache': Path('directory', output=True),
  'output': Path('file', output=True),
}


def check(config: ConfigDict) -> None:
  """Checks each key by itself; replaces '~' in paths, and NumPy's numbers.

  Raises:
    ValueError: a key is unknown, missing, or has a value of another type or
      outside its range. The message names the key and the remedy.
  """
  found = set()
  for section, name, key in leaves(config, ''):
    kind = KEYS[pattern(key)]
    found.add(key)
    value = section[name]
    try:
      checked = kind.check(value)
    except ValueError as error:
      raise ValueError(f'{key}={_short(value)}: {error}') from None
    if checked != value or type(checked) is not type(value):
      # A plain dict has no types.
      with getattr(section, 'ignore_type', contextlib.nullcontext)():
        section[name] = checked
  for key in KEYS:
    name, in_list, _ = key.partition('[]')
    items = find(config, name) if in_list else [None]
    needed = [key.replace('[]', f'[{i}]', 1) for i in range(len(items or ()))]
    for each in [name] if items is None else needed:
      if each not in found:
        raise ValueError(
          f'{each} is missing: start from configs/common.py, which has all '
          'keys.'
        )


def find(config: ConfigDict, name: str) -> Any:
  """The value of a key with dots; None if there is none."""
  for part in name.split('.'):
    config = config.get(part) if config else None
  return config


def leaves(section: Any, path: str) -> Iterator[tuple[Any, str, str]]:
  """(section, name, key) of each value that is not a section itself.

  Args:
    section: the configuration, or a section of it.
    path: key of the section; '' for the whole configuration.

  Raises:
    UnknownKey: a key is not in the table.
    ValueError: there is a value where a section should be.
  """
  for name in section:
    key = f'{path}.{name}' if path else str(name)
    value = section[name]
    if key in _LISTS:
      if not isinstance(value, list | tuple):
        raise ValueError(wanted_list(key, value))
      for i, child in enumerate(value):
        if not isinstance(child, Mapping | ConfigDict):
          raise ValueError(
            f'{key}[{i}]={_short(child)}: give a section; {_maker(key)}.'
          )
        yield from leaves(child, f'{key}[{i}]')
    elif pattern(key) in KEYS:
      yield section, name, key
    elif not any(other.startswith(f'{pattern(key)}.') for other in KEYS):
      raise UnknownKey(key)
    elif isinstance(value, Mapping | ConfigDict):
      yield from leaves(value, key)
    else:
      raise ValueError(f'{key}={_short(value)}: give a section of keys.')


def wanted_list(key: str, value: Any) -> str:
  """What is wrong with a value in place of the levels or stages."""
  return f'{key}={_short(value)}: give a list of sections; {_maker(key)}.'


def _maker(key: str) -> str:
  return f'common.{"level" if "level" in key else "stage"}() returns one'


def _short(value: Any) -> str:
  text = ' '.join(repr(value).split())
  return text if len(text) <= 200 else f'{text[:200]}…'
