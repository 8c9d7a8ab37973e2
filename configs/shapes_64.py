"""The default: captioned procedural shapes, 16 px and then 16+64 px.

    python -m mdm_jax.main --config=configs/shapes_64.py

Made for two CPU cores, on which it takes about 11 minutes. The cheap 16 px
stage learns what the words mean, so the 64 px stage needs fewer steps. Both
levels work on patches of pixels and therefore predict x0: a patch's noise has
more dimensions than their narrow channels can carry.
"""

from configs import common


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = common.get_config()
  shared = {
    'temporal_dim': 128,
    'num_heads': 2,
    'num_groups': 8,
    'attention_ffn': False,
    'position_waves': 2,
  }
  config.model.levels = [
    common.level(
      16,
      channels=(64,),
      num_blocks=(0,),
      attention_layers=(1,),
      patch_size=2,
      **shared,
    ),
    common.level(
      64,
      channels=(64, 64),
      num_blocks=(0, 0),
      attention_layers=(0, 1),
      patch_size=4,
      **shared,
    ),
  ]
  config.stages = [
    common.stage(
      '16', 1, steps=5000, batch_size=64, learning_rate=0.02, warmup_steps=100
    ),
    # With a power of 2 the noise hides as much of a 64 px image as of its
    # 16 px version.
    common.stage(
      '64',
      2,
      steps=1200,
      batch_size=64,
      learning_rate=0.01,
      warmup_steps=20,
      shift_power=2.0,
    ),
  ]
  config.text.max_length = 24
  config.diffusion.update(parameterization='x0', loss_space='x0')
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
  config.sample_every = 1000
  config.checkpoint_every = 250
  config.eval.update(loss_batches=4, batch_size=32, loss_every=180)
  return common.in_mode(config, mode)
