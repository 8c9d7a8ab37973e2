"""The default: captioned shapes, drawn on the fly, 16 px and then 64 px.

    python -m mdm_jax.main --config=configs/shapes_64.py
"""

from configs import common


def get_config(mode: str = ''):
  """The recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = common.get_config()
  shared = {'temporal_dim': 128, 'num_heads': 4, 'num_groups': 8}
  config.model.levels = [
      common.level(16, channels=(64, 128), num_blocks=(1, 1),
                   attention_layers=(0, 1), **shared),
      common.level(64, channels=(16, 16, 32), num_blocks=(0, 1, 1),
                   attention_layers=(0, 0, 0), **shared),
  ]
  training = {'batch_size': 32, 'learning_rate': 1e-3, 'warmup_steps': 100}
  config.stages = [
      common.stage('16', 1, steps=3000, **training),
      common.stage('64', 2, steps=1500, **training),
  ]
  config.optimizer.update(b2=0.99, clip_norm=1.0, decay='cosine',
                          ema_decay=0.998)
  config.sampler.update(num_steps=25, guidance=3.0, threshold='clip')
  return common.in_mode(config, mode)
