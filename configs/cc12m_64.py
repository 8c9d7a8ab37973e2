r"""CC12M at 64 px: network and noise schedule of the released 64 px model.

    python -m mdm_jax.main --config=configs/cc12m_64.py \
        --config.data.path=DIR --config.text.path=T5

DIR is the data set that `tools.prepare_data` made from CC12M's tars. T5 is a
directory with the files of google/flan-t5-xl, whose encoder stays frozen. The
UNet has 461 M parameters. Not yet trained at full size.
"""

from configs import common


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = common.get_config()
  config.dtype = 'bfloat16'
  config.data.update(name='captioned_images', num_workers=8)
  config.text.update(
    encoder='t5',
    tokenizer_rules='release',
    max_length=128,
    padding='longest',
    long_captions='leave_out',
  )
  config.model.text.update(width=2048, masked_attention=False)
  config.model.levels = [
    common.level(
      64,
      channels=(256, 512, 768),
      num_blocks=(2, 2, 2),
      attention_layers=(0, 1, 5),
    )
  ]
  config.stages = [common.stage('64', 1, steps=1_000_000, batch_size=1024)]
  config.log_every = 100
  config.sample_every = config.checkpoint_every = 5000
  config.eval.loss_every = 5000
  return common.in_mode(config, mode)
