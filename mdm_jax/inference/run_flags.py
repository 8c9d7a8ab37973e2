"""Flags of the commands that use a trained model, spelled once.

Importing it defines them. It imports nothing slow, so that --help is quick.
"""

from typing import Any

from absl import flags

from mdm_jax.builders import ranges
from mdm_jax.runtime import flag_types, value_types

_WORKDIR = flag_types.define(
  'workdir',
  None,
  value_types.RUN,
  'Working directory of the training run.',
)
_BATCH_SIZE = flag_types.define(
  'batch_size',
  None,
  ranges.KEYS['eval.batch_size'],
  'Images at once, over all devices; rounded up to a multiple of them. '
  'Default: eval.batch_size of the config.',
)
_SAMPLER = flag_types.define(
  'sampler',
  None,
  ranges.KEYS['sampler.name'],
  'Sampler. Default: as in the config.',
)
_STEPS = flag_types.define(
  'steps',
  None,
  ranges.KEYS['sampler.num_steps'],
  'Sampling steps. Default: as in the config.',
)
_GUIDANCE = flag_types.define(
  'guidance',
  None,
  ranges.KEYS['sampler.guidance'],
  'Guidance weight, 1 is none. Default: as in the config.',
)
_THRESHOLD = flag_types.define(
  'threshold',
  None,
  ranges.KEYS['sampler.threshold'],
  'How predicted images are kept in range. Default: as in the config.',
)
_LEVEL_OFFSET = flag_types.define(
  'level_offset',
  None,
  ranges.KEYS['sampler.level_offset'],
  'Nats of logSNR by which each level is ahead of the next finer one, for runs '
  "with diffusion.level_times='independent'. Default: as in the config.",
)
_STAGE = flag_types.define(
  'stage',
  None,
  ranges.KEYS['stages[].name'],
  "Use the weights of this stage of training, such as '32' in shapes_64. "
  'Default: the last stage that has any.',
)
_SIGMA_REL = flag_types.define(
  'sigma_rel',
  None,
  ranges.SIGMA_REL,
  'Use a post-hoc EMA of this width, if training has saved snapshots: see '
  "docs/post_hoc_ema.md. Default: the EMA with the optimizer's decay.",
)
_TEXT_PATH = flag_types.define(
  'text_path',
  None,
  value_types.Path('directory'),
  'Directory of the T5, if it has moved since training.',
)
_TOKENIZER = flag_types.define(
  'tokenizer',
  None,
  value_types.Path('file'),
  'File of the tokenizer, if it has moved since training.',
)
_DATA_PATH = flag_types.define(
  'data_path',
  None,
  value_types.Path('directory'),
  'Where the data set is, if it has moved since training.',
)
_BEST = flags.DEFINE_boolean(
  'best', False, 'Use the EMA that was best by eval.best_metric.'
)


def workdir() -> str | None:
  """Value of --workdir."""
  return _WORKDIR.value


def batch_size() -> int | None:
  """Value of --batch_size."""
  return _BATCH_SIZE.value


def model() -> dict[str, Any]:
  """Which weights to load, and where files are that have moved.

  For `pipeline.load` and `session.open_run`.
  """
  return {
    'stage': _STAGE.value,
    'sigma_rel': _SIGMA_REL.value,
    'best': _BEST.value,
    **moved(),
  }


def moved() -> dict[str, str | None]:
  """Where files are that have moved since training, by the names of flags."""
  return {
    'text_path': _TEXT_PATH.value,
    'tokenizer': _TOKENIZER.value,
    'data_path': _DATA_PATH.value,
  }


def sampling() -> dict[str, Any]:
  """How to sample, for the methods of `pipeline.Pipeline`; None: by default."""
  return {
    'sampler': _SAMPLER.value,
    'steps': _STEPS.value,
    'guidance': _GUIDANCE.value,
    'threshold': _THRESHOLD.value,
    'level_offset': _LEVEL_OFFSET.value,
    'batch_size': _BATCH_SIZE.value,
  }


def options() -> dict[str, Any]:
  """What the flags change of a run, for `session.open_run`."""
  return {
    'sampler': {
      'name': _SAMPLER.value,
      'num_steps': _STEPS.value,
      'guidance': _GUIDANCE.value,
      'threshold': _THRESHOLD.value,
      'level_offset': _LEVEL_OFFSET.value,
    },
    'evaluation': {'batch_size': _BATCH_SIZE.value},
    **model(),
  }
