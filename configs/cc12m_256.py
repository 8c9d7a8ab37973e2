r"""CC12M at 64 px and then 64+256 px: the network of the released 256 model.

    python -m mdm_jax.main --config=configs/cc12m_256.py \
        --config.data.path=DIR --config.text.path=T5

See cc12m_64 for DIR and T5. Not yet trained at full size.
"""

from configs import cc12m_64, common


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = cc12m_64.get_config()
  config.model.levels.append(common.level(256, remat='block'))
  # Two of three images are trained at 256 px, all of them at 64 px.
  config.stages.append(
    common.stage(
      '256', 2, steps=400_000, batch_size=768, mixed_ratio=(1.0, 2.0)
    )
  )
  config.sampler.num_steps = 100
  return common.in_mode(config, mode)
