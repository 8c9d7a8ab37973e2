r"""CC12M in three stages: 64, 64+256 and 64+256+1024 px, as in the paper.

    python -m mdm_jax.main --config=configs/cc12m_1024.py \
        --config.data.path=DIR --config.text.path=T5

See cc12m_64 for DIR and T5. Not yet trained at full size; docs/tpu_slices.md
has the memory and time that six TPU slices need at least.
"""

from configs import cc12m_256, common


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = cc12m_256.get_config()
  # The released 1024 model normalizes the input of its 256 px level.
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
