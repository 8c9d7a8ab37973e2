r"""Emoji: real images with captions, 32 px and then 32+64 px.

    python -m mdm_jax.main --config=configs/emoji_64.py \
        --config.data.path=data/emoji --config.text.tokenizer=data/emoji.model

docs/emoji.md has the commands that make the data: 7,000 images in two styles,
of which 5 % are combinations that are held out. Made for two CPU cores, on
which it takes an afternoon.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = common.get_config()
  config.data.name = 'captioned_images'
  # Captions say what faces right; letters and flags have no mirror image.
  config.data.flip = False
  config.text.update(max_length=32, width=128, num_layers=2, num_heads=4)
  config.model.text.update(width=128, num_heads=4)
  config.model.levels = _levels()
  config.stages = [
    common.stage(
      '32',
      1,
      steps=8000,
      batch_size=64,
      learning_rate=0.02,
      warmup_steps=200,
      shift_power=2.0,
    ),
    # With a power of 2 the noise hides as much of a 64 px image as of its
    # 32 px version.
    common.stage(
      '64',
      2,
      steps=5000,
      batch_size=32,
      learning_rate=0.01,
      warmup_steps=100,
      shift_power=2.0,
    ),
  ]
  config.diffusion.update(
    # At 32 px the schedule itself has too little noise: outlines are learned
    # where the noise hides all else.
    reference_resolution=12,
    # As in shapes_64.
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
    ema_decay=0.999,
  )
  config.sampler.update(
    name='dpm',
    num_steps=25,
    guidance=3.0,
    # Guided to the end, samples have speckles.
    guidance_interval=(0.5, 1.0),
    threshold='clip',
  )
  config.sample_every = 2000
  config.checkpoint_every = 500
  # 10 batches of 32, the last stage's, are all but 5 of the held-out images.
  config.eval.update(loss_batches=10, batch_size=32, loss_every=1000)
  return common.in_mode(config, mode)


def _levels() -> list[ConfigDict]:
  """Returns the 32 px transformer and, around it, the 64 px UNet."""
  return [
    common.level(
      32,
      kind='transformer',
      channels=(192,),
      num_blocks=(6,),
      attention_layers=(0,),
      num_heads=6,
      temporal_dim=128,
      patch_size=4,
    ),
    common.level(
      64,
      channels=(64, 64),
      num_blocks=(0, 0),
      attention_layers=(0, 1),
      attention_ffn=False,
      num_heads=2,
      num_groups=8,
      temporal_dim=128,
      position_waves=2,
      patch_size=4,
    ),
  ]
