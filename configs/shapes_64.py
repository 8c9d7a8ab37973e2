"""The default: captioned procedural shapes, 32 px and then 32+64 px.

    python -m mdm_jax.main --config=configs/shapes_64.py

Made for two CPU cores, on which it takes about 20 minutes (docs/results.md says
what it learns); `:long` is made for two hours. The 32 px stage is cheap and
learns what the words mean: its transformer sees 64 patches and the caption in
one softmax, which is where attributes are given to the right one of two
objects. At 32 px it also sees patterns, of which 16 px would show none. The 64
px level makes both sharp. Both levels predict x0: a patch's noise has more
dimensions than the narrow channels of the 64 px level can carry.

`:single`, one UNet at 64 px, and `:scratch`, both levels at once without the
32 px stage, are there to be compared with: docs/compare_models.md.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(mode: str = ''):
  """Returns the recipe.

  Args:
    mode: 'long' trains a larger network for two hours, 'single' one level at 64
      px, 'scratch' both levels at once, 'cascade' two models, one after the
      other, 'autoencoder' only an autoencoder of the images, 'latent' the
      coarse level on its codes, 'latent_nest' both levels, of codes and pixels;
      'smoke' is a toy-sized run.
  """
  config = common.get_config()
  # Half of what can be asked for has two objects, and they are harder.
  config.data.two_objects = 0.4
  config.model.levels = _levels()
  config.stages = [
    common.stage(
      '32',
      1,
      steps=2600,
      batch_size=64,
      learning_rate=0.02,
      warmup_steps=100,
      shift_power=2.0,
    ),
    # With a power of 2 the noise hides as much of a 64 px image as of its
    # 32 px version.
    common.stage(
      '64',
      2,
      steps=2000,
      batch_size=32,
      learning_rate=0.01,
      warmup_steps=20,
      shift_power=2.0,
    ),
  ]
  config.text.max_length = 24
  config.diffusion.update(
    # At 32 px the schedule itself has too little noise: outlines are learned
    # where the noise hides all else.
    reference_resolution=10,
    parameterization='x0',
    # An image of little noise counts for up to 8 of much, so that patterns are
    # learned too.
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
  config.sample_every = 1000
  config.checkpoint_every = 250
  config.eval.update(loss_batches=4, batch_size=32, loss_every=180)
  return common.in_mode(
    config,
    mode,
    long=_long,
    single=_single,
    scratch=_scratch,
    cascade=_cascade,
    autoencoder=_autoencoder,
    latent=_latent,
    latent_nest=_latent_nest,
  )


def _levels() -> list[ConfigDict]:
  """Returns the 32 px transformer and, around it, the 64 px UNet."""
  return [
    common.level(
      32,
      kind='transformer',
      channels=(96,),
      num_blocks=(4,),
      attention_layers=(0,),
      num_heads=3,
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


def _autoencoder(config: ConfigDict) -> ConfigDict:
  """Images of 64 px to codes of 16 x 16 x 6, an eighth as many values.

  It takes about 460 seconds of CPU time, and ends at a held-out PSNR of about
  34.9 dB.
  """
  config.autoencoder.update(
    resolution=64,
    latent_channels=6,
    channels=(64,),
    num_blocks=(2,),
    num_groups=8,
    patch_size=4,
  )
  config.stages = [
    common.stage(
      'autoencoder',
      0,
      kind='autoencoder',
      steps=3000,
      # The gradients have little noise: many steps count for more.
      batch_size=8,
      learning_rate=0.02,
      warmup_steps=20,
    )
  ]
  config.eval.update(loss_batches=32, loss_every=300)
  return config


def _long(config: ConfigDict) -> ConfigDict:
  """Two hours on two cores."""
  config.model.levels[0].update(channels=(128,), num_blocks=(6,), num_heads=4)
  config.stages[0].update(steps=12_000, warmup_steps=200)
  config.stages[1].update(steps=10_000, batch_size=64, warmup_steps=100)
  config.optimizer.ema_decay = 0.999
  config.sample_every = 5000
  config.checkpoint_every = 500
  config.eval.loss_every = 1000
  return config


def _single(config: ConfigDict) -> ConfigDict:
  """One UNet of as many parameters at 64 px, which sees patches of 4 px."""
  config.model.levels = [
    common.level(
      64,
      channels=(48, 72),
      num_blocks=(1, 1),
      attention_layers=(1, 1),
      attention_ffn=False,
      num_heads=4,
      num_groups=8,
      temporal_dim=128,
      position_waves=2,
      patch_size=4,
    )
  ]
  config.stages = [config.stages[1]]
  config.stages[0].update(
    num_levels=1,
    loss_weights=(1.0,),
    mixed_ratio=(1.0,),
    steps=3070,
    warmup_steps=100,
  )
  return config


def _scratch(config: ConfigDict) -> ConfigDict:
  """Both levels in a single stage, for the compute of the two stages."""
  config.stages = [config.stages[1]]
  config.stages[0].update(steps=3900, warmup_steps=100)
  return config


def _cascade(config: ConfigDict) -> ConfigDict:
  """Both levels as models of their own, one after the other."""
  config = common.cascade(config)
  # Nothing of the 64 px model is trained when its stage begins.
  config.stages[1].warmup_steps = 100
  return config


def _latent(config: ConfigDict) -> ConfigDict:
  """The coarse level alone, on codes of the autoencoder (Rombach et al.)."""
  config = _on_codes(config)
  config.model.levels = config.model.levels[:1]
  config.stages = config.stages[:2]
  config.stages[1].steps = 9000
  # Codes have four times the variance of pixels, and so need as much more
  # noise to be hidden: half of the 14 that suits images of 16 px.
  config.diffusion.reference_resolution = 7
  return config


def _latent_nest(config: ConfigDict) -> ConfigDict:
  """Both levels, of which the coarse one denoises codes of 64 px images."""
  config = _on_codes(config)
  # As much noise of codes as above, and of pixels as around images of 16 px.
  config.diffusion.reference_resolution = 3
  for stage in config.stages[1:]:
    stage.shift_power = 1.0
  return config


def _on_codes(config: ConfigDict) -> ConfigDict:
  """Both levels, after a stage that trains an autoencoder for the first."""
  coarse, fine = config.stages
  config = _autoencoder(config)
  # Codes of 16 x 16 in as many patches as images of 32 px.
  config.model.levels[0].update(
    resolution=16, scale_condition=16, patch_size=2, downsample='encoder'
  )
  coarse.name = 'latent'
  config.stages = [*config.stages, coarse, fine]
  config.eval.update(loss_batches=4, loss_every=180)
  return config
