r"""Emoji, 64 px and then 64+256 px.

    python -m mdm_jax.main --config=configs/emoji_256.py \
        --config.data.path=data/emoji --config.text.tokenizer=data/emoji.model

docs/emoji.md has the commands that make the data, for this recipe without
--resolution=64. The Fluent images have 256 px, those of Noto 136 px, which the
network receives as the micro-condition. For a GPU. Not yet trained at full
size.
"""

from configs import common, emoji_64


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = emoji_64.get_config()
  config.dtype = 'bfloat16'
  config.data.num_workers = 4
  shared = {'temporal_dim': 256, 'num_heads': 4, 'num_groups': 16}
  config.model.levels = [
    common.level(
      64,
      channels=(64, 128, 192),
      num_blocks=(1, 1, 2),
      attention_layers=(0, 1, 1),
      patch_size=2,
      position_waves=2,
      **shared,
    ),
    common.level(
      256,
      channels=(64, 64),
      num_blocks=(1, 1),
      attention_layers=(0, 0),
      patch_size=4,
      position_waves=2,
      **shared,
    ),
  ]
  config.stages = [
    common.stage(
      '64',
      1,
      steps=30_000,
      batch_size=128,
      learning_rate=0.01,
      warmup_steps=200,
    ),
    # With a power of 2 the noise hides as much of a 256 px image as of its
    # 64 px version.
    common.stage(
      '256',
      2,
      steps=20_000,
      batch_size=64,
      learning_rate=0.005,
      warmup_steps=200,
      shift_power=2.0,
    ),
  ]
  config.checkpoint_every = 1000
  config.eval.loss_every = 1000
  return common.in_mode(config, mode)
