"""Captioned shapes in three stages: 32, 32+64 and 32+64+256 px.

    python -m mdm_jax.main --config=configs/shapes_256.py

The first two stages are those of `shapes_64`. The third adds outlines, hatching
and grain, which only show at 256 px. For a GPU or a TPU. Not yet trained at
full size.
"""

from configs import common, shapes_64


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = shapes_64.get_config()
  config.model.levels.append(
    common.level(
      256,
      channels=(32, 48, 64),
      num_blocks=(0, 1, 1),
      temporal_dim=128,
      num_groups=8,
      patch_size=4,
    )
  )
  config.stages.append(
    common.stage(
      '256',
      3,
      steps=20_000,
      batch_size=32,
      learning_rate=0.01,
      warmup_steps=200,
      shift_power=2.0,
      mixed_ratio=(0.0, 1.0, 1.0),
    )
  )
  return common.in_mode(config, mode)
