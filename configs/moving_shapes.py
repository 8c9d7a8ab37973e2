"""Captioned clips of shapes that move: images, clips, and larger clips.

    python -m mdm_jax.main --config=configs/moving_shapes.py

Made for two CPU cores, which take over half an hour (docs/video.md says what
it learns). The first stage trains the 16 px level on images, the second both
levels, and the third trains them on clips: 4 frames of 16 px inside of 8 frames
of 64 px, most of the batch at 16 px alone. That batch divides among at most 4
devices. The images are those of shapes, whose captions say nothing of motion:
outlines are learned from them in fewer steps than from the first frames of
clips.
"""

from ml_collections import ConfigDict

from configs import common

FRAMES = 8


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = common.get_config()
  config.data.name = 'moving_shapes'
  config.data.update(image_set='shapes', two_objects=0.3)
  config.text.max_length = 32
  config.model.levels = _levels()
  # Gradients of the 64 px level, of few clips, undo what the 16 px level has
  # learned, unless its own weigh more. Muon's steps are of one size, so the
  # 64 px level learns as before.
  both = {'loss_weights': (16.0, 1.0), 'learning_rate': 0.01}
  shared = {'warmup_steps': 50, 'shift_power': 2.0}
  config.stages = [
    common.stage(
      '16',
      1,
      max_frames=1,
      steps=1400,
      batch_size=128,
      learning_rate=0.02,
      **shared,
    ),
    common.stage(
      '64', 2, max_frames=1, steps=1800, batch_size=32, **both, **shared
    ),
    # How things move is learned at 16 px, where clips are cheap.
    common.stage(
      '8x64',
      2,
      steps=2000,
      batch_size=40,
      mixed_ratio=(9.0, 1.0),
      **both,
      **shared,
    ),
  ]
  # As in shapes_64, with more noise: frames tell about each other.
  config.diffusion.update(
    reference_resolution=12,
    parameterization='x0',
    loss_space='v',
    noise_floor=0.35,
  )
  config.optimizer.update(
    name='muon',
    b2=0.99,
    weight_decay=0.01,
    clip_norm=1.0,
    decay='cosine',
    ema_decay=0.995,
  )
  config.sampler.update(
    name='dpm', num_steps=20, guidance=2.0, threshold='clip'
  )
  config.log_every = 50
  config.sample_every = 600
  config.checkpoint_every = 200
  config.eval.update(loss_batches=2, batch_size=16, loss_every=300)
  return common.in_mode(config, mode)


def _levels() -> list[ConfigDict]:
  """Returns the 16 px transformer and, around it, the 64 px UNet."""
  return [
    # Of few patches, so that each can see all those of all frames.
    common.level(
      16,
      frames=FRAMES // 2,
      kind='transformer',
      channels=(128,),
      num_blocks=(4,),
      attention_layers=(0,),
      frame_attention=(1,),
      frame_attention_kind='joint',
      num_heads=4,
      temporal_dim=128,
      patch_size=4,
    ),
    common.level(
      64,
      frames=FRAMES,
      channels=(64, 64, 64),
      num_blocks=(0, 0, 0),
      attention_layers=(0, 0, 0),
      frame_attention=(0, 0, 1),
      frame_attention_kind='joint',
      attention_ffn=False,
      num_heads=2,
      num_groups=8,
      temporal_dim=128,
      position_waves=2,
      patch_size=4,
    ),
  ]
