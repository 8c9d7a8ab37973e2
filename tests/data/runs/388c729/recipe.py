"""Six steps of a network of two levels, as small as can be."""

from configs import common


def get_config():
  """Returns the recipe that the run was trained with."""
  config = common.get_config()
  config.data.size = 1000
  config.text.update(max_length=8, width=2, num_layers=0, num_heads=1)
  config.model.text.update(width=2, num_heads=1)
  shared = {'temporal_dim': 8, 'num_heads': 1, 'num_groups': 1}
  config.model.levels = [
    common.level(
      8, channels=(2,), num_blocks=(0,), attention_layers=(0,), **shared
    ),
    common.level(
      16, channels=(2, 2), num_blocks=(0, 0), attention_layers=(0, 0), **shared
    ),
  ]
  config.stages = [
    common.stage(
      '16', 2, steps=6, batch_size=8, warmup_steps=2, learning_rate=1e-2
    )
  ]
  config.sampler.num_steps = 4
  config.log_every = 1
  config.sample_every = 6
  config.checkpoint_every = 3
  config.eval.update(num_prompts=8, loss_batches=1, batch_size=8)
  return config
