"""Variants of the default recipe, each for a claim of the paper.

    python -m mdm_jax.tools.compare_models \
        --recipe=mdm=docs/results/claims.py \
        --recipe=three_levels=docs/results/claims.py:three_levels \
        --budgets=0.5 --metrics=frechet,prompt_accuracy --num_samples=1024 \
        --output=comparisons/claims

A mode changes one thing of `shapes_64`, and `compare_models` trains all of them
for the same FLOPs. docs/claims.md has what came of it.
"""

from configs import common, shapes_64

# Of the two stages, for these shares of the FLOPs; the default has a half.
_STEPS = {'coarse_quarter': (1300, 2900), 'coarse_three_quarters': (3900, 1000)}


def get_config(mode: str = ''):
  """Returns the recipe of a mode, '' for the default one."""
  config = shapes_64.get_config()
  coarse, fine = config.stages
  match mode:
    case '':
      pass
    case 'single_transformer':
      _at_64_px_alone(config)
    case 'three_levels':
      _add_level(config)
    case 'three_levels_shared':
      _add_level(config)
      config.model.levels[2].share = 'all'
    case 'coarse_quarter' | 'coarse_three_quarters':
      coarse.steps, fine.steps = _STEPS[mode]
    case 'mixed_batch':
      fine.mixed_ratio = (0.5, 0.5)
    case 'fine_weight_16':
      fine.loss_weights = (1.0, 16.0)
    case 'fine_alone':
      fine.loss_weights = (0.0, 1.0)
    case 'shift_0' | 'shift_1':
      for stage in config.stages:
        stage.shift_power = float(mode[-1])
    case _:
      raise ValueError(f'Unknown mode {mode!r}.')
  return config


def _at_64_px_alone(config) -> None:
  """The transformer of the coarse level, which sees 64 patches of 8 px."""
  level = config.model.levels[0]
  level.update(resolution=64, scale_condition=64, patch_size=8)
  config.model.levels = [level]
  config.stages = config.stages[:1]
  config.stages[0].name = '64'


def _add_level(config) -> None:
  """16, 32 and 64 px: 32 does what 64 px did at 8 x 8 positions."""
  coarse, fine = config.model.levels
  coarse.update(resolution=16, scale_condition=16, patch_size=2)
  config.diffusion.reference_resolution = 14  # as suits 16 px
  half_size = {'resolution': 32, 'scale_condition': 32, 'patch_size': 2}
  middle = common.level(**fine.to_dict() | half_size)
  fine.update(channels=(64,), num_blocks=(0,), attention_layers=(0,))
  config.model.levels = [coarse, middle, fine]
  first, last = config.stages
  first.name = '16'
  half = common.stage(**last.to_dict() | {'name': '32'})
  half.steps = last.steps = last.steps // 2
  last.update(
    num_levels=3, loss_weights=(1.0,) * 3, mixed_ratio=(0.0, 0.0, 1.0)
  )
  config.stages = [first, half, last]
