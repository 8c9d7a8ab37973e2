"""Captioned clips of shapes that move: images, clips, and larger clips.

    python -m mdm_jax.main --config=configs/moving_shapes.py

Made for two CPU cores, which take about 47 minutes: too few to learn how things
move (docs/video.md). The first stage trains the 16 px level on images, the
second on clips of 8 frames, and the third adds a level of 64 px.
"""

from configs import common

FRAMES = 8


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = common.get_config()
  config.data.name = 'moving_shapes'
  config.data.two_objects = 0.3
  config.text.max_length = 32
  config.model.levels = [
    common.level(
      16,
      frames=FRAMES,
      kind='transformer',
      channels=(96,),
      num_blocks=(4,),
      attention_layers=(0,),
      frame_attention=(1,),
      num_heads=3,
      temporal_dim=128,
      patch_size=2,
    ),
    common.level(
      64,
      frames=FRAMES,
      channels=(64, 64),
      num_blocks=(0, 0),
      attention_layers=(0, 0),
      frame_attention=(0, 1),
      attention_ffn=False,
      num_heads=2,
      num_groups=8,
      temporal_dim=128,
      position_waves=2,
      patch_size=4,
    ),
  ]
  shared = {'warmup_steps': 50, 'shift_power': 2.0}
  config.stages = [
    common.stage(
      '16',
      1,
      max_frames=1,
      steps=1200,
      batch_size=64,
      learning_rate=0.02,
      **shared,
    ),
    # Larger rates undo what was learned from images.
    common.stage(
      '8x16', 1, steps=1200, batch_size=16, learning_rate=0.005, **shared
    ),
    common.stage(
      '8x64', 2, steps=600, batch_size=8, learning_rate=0.005, **shared
    ),
  ]
  # As in shapes_64.
  config.diffusion.update(
    reference_resolution=14,
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
