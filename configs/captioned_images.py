r"""Your own captioned images, 64 px and then 256 px.

    python -m mdm_jax.tools.prepare_data --input=IMAGES --output=data/mine
    python -m mdm_jax.main --config=configs/captioned_images.py \
        --config.data.path=data/mine

IMAGES is a folder of images, each with its caption in a text file of the same
name (cat.jpg, cat.txt) or in a row of metadata.csv; or of tars or Parquet
files, see docs/data.md.

Sized for a GPU; not yet trained at full size. `:memorize` trains a small model
on a laptop until it reproduces a handful of images, which shows that a data
set is read correctly.
"""

from configs import common


def get_config(mode: str = ''):
  """Returns the recipe; `mode` is '', 'smoke' or 'memorize'."""
  config = common.get_config()
  config.data.update(name='captioned_images', num_workers=4)
  config.dtype = 'bfloat16'
  config.text.update(max_length=128, width=256, num_layers=4, num_heads=8)
  config.model.text.width = 256
  config.model.levels = [
    common.level(
      64,
      channels=(128, 256, 384),
      num_blocks=(2, 2, 2),
      attention_layers=(0, 1, 2),
      temporal_dim=512,
    ),
    common.level(
      256, channels=(64, 64, 128), num_blocks=(1, 2, 1), temporal_dim=512
    ),
  ]
  config.stages = [
    common.stage('64', 1, steps=50_000, learning_rate=1e-4, warmup_steps=1000),
    common.stage(
      '256',
      2,
      steps=50_000,
      learning_rate=1e-4,
      warmup_steps=1000,
      mixed_ratio=(1.0, 1.0),
    ),
  ]
  return common.in_mode(config, mode, memorize=_memorize)


def _memorize(config):
  """Returns 16 px and 64 px levels that a laptop trains in minutes."""
  config.dtype = 'float32'
  config.data.num_workers = 0
  config.text.update(max_length=64, width=64, num_layers=1, num_heads=4)
  config.model.text.width = 64
  config.model.levels = [
    common.level(
      16,
      channels=(32, 64),
      num_blocks=(1, 1),
      attention_layers=(0, 1),
      temporal_dim=128,
      num_groups=8,
    ),
    common.level(
      64,
      channels=(16, 32, 32),
      num_blocks=(1, 1, 1),
      temporal_dim=128,
      num_groups=8,
    ),
  ]
  training = {'batch_size': 8, 'learning_rate': 0.02, 'warmup_steps': 20}
  config.stages = [
    common.stage('16', 1, steps=500, **training),
    common.stage('64', 2, steps=2000, **training),
  ]
  config.optimizer.update(name='muon', decay='cosine', ema_decay=0.99)
  config.diffusion.loss_space = 'v'
  config.sampler.update(num_steps=25, guidance=1.0, threshold='clip')
  config.eval.update(loss_batches=2, batch_size=8)
  return config
