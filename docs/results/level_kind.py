"""A transformer level and a UNet level with equal FLOPs in training.

    python -m mdm_jax.tools.sweep --config=docs/results/level_kind.py:unet \
        --grid=seed=0,1,2 --metric=accuracy_color_2_objects,held_out_loss_32 \
        --output=sweeps/unet

The coarsest level of `shapes_64`, or of `emoji_64` with the modes
'emoji_transformer' and 'emoji_unet', trained by itself. Both networks have the
same objective, optimizer and batches.
"""

from configs import common, emoji_64, shapes_64

# A step of the UNet has fewer FLOPs, so it gets more of them.
STEPS = {
  'transformer': 1200,
  'unet': 1655,
  'emoji_transformer': 2000,
  'emoji_unet': 2530,
}


def get_config(mode: str):
  """Returns the recipe of 'transformer' or 'unet', maybe after 'emoji_'."""
  shapes = shapes_64.get_config()
  config = emoji_64.get_config() if mode.startswith('emoji') else shapes
  side = config.model.levels[0].resolution
  level = _unet() if mode.endswith('unet') else shapes.model.levels[0]
  # Either has 8 x 8 positions.
  level.update(resolution=side, scale_condition=side, patch_size=side // 8)
  config.model.levels = [level]
  config.stages = config.stages[:1]
  config.stages[0].update(steps=STEPS[mode], warmup_steps=100)
  config.optimizer.ema_decay = 0.995
  return config


def _unet():
  """A UNet with attention three times."""
  return common.level(
    16,
    channels=(64,),
    num_blocks=(0,),
    attention_layers=(3,),
    attention_ffn=False,
    num_heads=2,
    num_groups=8,
    temporal_dim=128,
    position_waves=2,
  )
