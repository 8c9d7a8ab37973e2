"""CC12M in three stages, 64, 64+256 and 64+256+1024 px: the whole paper.

    python -m mdm_jax.main --config=configs/cc12m_1024.py \
        --config.data.path=DIR --config.text.path=T5

What a TPU slice takes is in docs/tpu_slices.md.
"""

from configs import cc12m_256, common


def get_config(mode: str = ''):
  """The recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = cc12m_256.get_config()
  # As in the released 1024 model.
  config.model.levels[1].normalize_input = True
  config.model.levels.append(
    common.level(1024, channels=(32, 32, 64), remat='block')
  )
  config.stages.append(
    common.stage(
      '1024',
      3,
      steps=100_000,
      batch_size=256,
      shift_power=2.0,
      loss_weights=(1.0, 4.0, 16.0),
    )
  )
  config.sampler.update(num_steps=250, eta=1.0)
  return common.in_mode(config, mode)
