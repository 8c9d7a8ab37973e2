r"""Animated emoji: 32 px images, then 8 frames of 32 px, then 16 of 64 px.

    python -m mdm_jax.main --config=configs/emoji_video.py \
        --config.data.path=data/emoji_clips \
        --config.text.tokenizer=data/emoji_clips.model

docs/video.md has the commands that make the data. For a GPU. Not yet trained at
full size.
"""

from configs import common, emoji_64


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = emoji_64.get_config()
  config.dtype = 'bfloat16'
  config.data.num_workers = 4
  inner, outer = config.model.levels
  # Of 8 x 8 patches in 8 frames: few enough for all to see all.
  inner.update(frames=8, frame_attention=(1,), frame_attention_kind='joint')
  outer.update(frames=16, frame_attention=(0, 1))
  # Larger rates undo what was learned from images.
  clips = {
    'learning_rate': 0.005,
    'warmup_steps': 200,
    'shift_power': 2.0,
  }
  config.stages = [
    common.stage('32', 1, max_frames=1, steps=20_000, batch_size=128, **clips),
    common.stage('8x32', 1, steps=20_000, batch_size=64, **clips),
    common.stage('16x64', 2, steps=10_000, batch_size=32, **clips),
  ]
  config.stages[0].learning_rate = 0.02
  config.eval.update(loss_batches=3, batch_size=16)
  return common.in_mode(config, mode)
