"""Flags of the commands that use a trained model, spelled once.

Importing it defines them. It imports nothing slow, so that --help is quick.
"""

from typing import Any

from absl import flags

# `samplers.SAMPLERS` and `samplers.THRESHOLDS`, which import JAX; a test
# compares them.
SAMPLERS = ('ddim', 'ddpm', 'heun', 'dpm', 'dpm_sde')
THRESHOLDS = ('none', 'clip', 'dynamic', 'dynamic_if')

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Working directory of the training run.'
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size',
  None,
  'Images at once, over all devices; rounded up to a multiple of them. '
  'Default: eval.batch_size of the config.',
  lower_bound=1,
)
_SAMPLER = flags.DEFINE_enum(
  'sampler', None, SAMPLERS, 'Sampler. Default: as in the config.'
)
_STEPS = flags.DEFINE_integer(
  'steps', None, 'Sampling steps. Default: as in the config.', lower_bound=1
)
_GUIDANCE = flags.DEFINE_float(
  'guidance', None, 'Guidance weight, 1 is none. Default: as in the config.'
)
_THRESHOLD = flags.DEFINE_enum(
  'threshold',
  None,
  THRESHOLDS,
  'How predicted images are kept in range. Default: as in the config.',
)
_SIGMA_REL = flags.DEFINE_float(
  'sigma_rel',
  None,
  'Use a post-hoc EMA of this width, if training has saved snapshots: see '
  "docs/post_hoc_ema.md. Default: the EMA with the optimizer's decay.",
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


def options() -> dict[str, Any]:
  """What the flags change of a run, for `session.open_run`."""
  return {
    'sampler': {
      'name': _SAMPLER.value,
      'num_steps': _STEPS.value,
      'guidance': _GUIDANCE.value,
      'threshold': _THRESHOLD.value,
    },
    'evaluation': {'batch_size': _BATCH_SIZE.value},
    'sigma_rel': _SIGMA_REL.value,
    'best': _BEST.value,
  }
