"""Every configuration key, its default and its unit.

A recipe starts from `get_config()`, adds levels and stages, and changes what
it needs. Configs are locked: a key that is not here is an error.
docs/configuration.md describes each key in full.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns all keys but `model.levels` and `stages`, which recipes set."""
  return ConfigDict(
    {
      'seed': 0,
      'dtype': 'float32',  # of activations; 'bfloat16': mixed precision
      # Number of devices along each axis; one axis may be -1, which takes all
      # remaining devices.
      'mesh': {'data': -1, 'fsdp': 1, 'spatial': 1},
      # Pairs (regular expression on a parameter's path, mesh axes of its last
      # dimensions). The first match wins; a parameter that matches no rule is
      # replicated.
      'sharding_rules': (
        (r'level_\d+/conv_(in|out)/', ()),
        (r'coder/(to_code|conv_out)/', ()),
        (r'/kernel$', ('fsdp',)),
      ),
      'data': _data(),
      'text': _text(),
      'model': {
        # How the text enters the network: models.conditioning.TextSpec.
        'text': {
          'width': 64,
          'num_layers': 0,
          'num_heads': 8,
          'masked_attention': True,
        },
        'levels': [],  # coarse to fine, each a level()
        # Each level is a model of its own, trained in a stage of its own, that
        # is given the next coarser image; see cascade().
        'cascade': False,
      },
      'autoencoder': _autoencoder(),
      'diffusion': _diffusion(),
      'stages': [],  # in order, each a stage()
      'optimizer': _optimizer(),
      # Post-hoc EMA: an EMA of any sigma_rel, computed after training from
      # stored snapshots. See docs/post_hoc_ema.md.
      'averages': {
        # sigma_rel of each EMA that is tracked, such as (0.05, 0.1); each
        # takes as much memory as the parameters.
        'widths': (),
        'snapshot_every': 1000,  # steps between two stored snapshots
      },
      # A step with a NaN, an Inf or a spike is skipped.
      'guard': {
        # A loss or gradient norm above this multiple of its running mean is a
        # spike; 0: nothing is.
        'spike_factor': 10.0,
        # Accepted steps in the running mean; there are no spikes before a
        # stage has made as many.
        'window': 100,
        'max_skipped': 10,  # consecutive skipped steps that end the run
      },
      'sampler': _sampler(),
      'log_every': 50,  # steps between two progress lines
      # Where to follow a run: 'tensorboard', 'wandb', or both.
      'trackers': ('tensorboard',),
      'sample_every': 1000,  # steps between two sample grids
      'checkpoint_every': 1000,  # steps between two checkpoints
      # Minutes since the last checkpoint after which another is saved,
      # whichever of this and checkpoint_every is due first; 0: by steps alone.
      'checkpoint_minutes': 0.0,
      'checkpoints_to_keep': 2,  # newest ones of each stage
      'save_failures': 3,  # consecutive failed saves that end the run
      # Steps between two comparisons of all devices' copies of the state; 0:
      # never.
      'replicas_every': 0,
      # Steps between two traces of a few steps, for TensorBoard and
      # ui.perfetto.dev; 0: never.
      'profile_every': 0,
      'watchdog': _watchdog(),
      'eval': _eval(),
    }
  ).lock()


def _data() -> dict[str, Any]:
  """The data set, and how it is read."""
  return {
    # Or 'captioned_images', made by prepare_data; 'tars', indexed by
    # index_tars; or 'tfds:NAME', built by TFDS as ArrayRecords.
    'name': 'shapes',
    # Directory of the data set or the index; for TFDS its data_dir.
    'path': '',
    # A set of images, 'shapes', 'captioned_images' or 'tars', on which levels
    # of one frame are trained beside clips; '': on the clips' first frames.
    'image_set': '',
    'image_path': '',  # its directory
    # The next five are for TFDS. A nested feature is a path, 'a/b'.
    'image': 'image',
    'caption': 'caption',  # one text, or several
    'label': 'label',  # read instead, where text.encoder is 'label'
    'train_split': 'train',
    'validation_split': 'validation',  # '': use the training split
    'size': 1_000_000,  # records of the procedural set, 'shapes'
    'two_objects': 0.25,  # share of its training scenes; others show one
    'flip': False,  # mirror half of the training images
    'random_crop': False,  # crop the square anywhere, not at the centre
    # Largest image file: what 256 MB hold in each loader process.
    'max_pixels': 30_000_000,
    # Which frames of a longer clip are trained on: 'first', 'centre' or
    # 'random'.
    'clip_start': 'random',
    'max_bad_fraction': 0.01,  # of the records; more end the run
    'may_change': False,  # continue although the data set has changed
    'num_workers': 0,  # loader processes; 0: threads of this process
    'num_threads': 1,  # of each loader process
    'prefetch': 4,  # batches buffered by each loader process
  }


def _text() -> dict[str, Any]:
  """Captions, and the encoder that reads them."""
  return {
    # 'learned': trained with the network; 't5': frozen; 'precomputed': T5
    # features that precompute_text stored beside the data set; 'label':
    # class numbers instead of captions.
    'encoder': 'learned',
    'path': '',  # directory of the T5, in Hugging Face's layout
    'tokenizer': '',  # a SentencePiece model; '': the encoder's own
    # How text becomes tokens: by 'sentencepiece', or by the 'release' of MDM,
    # with the same model's pieces.
    'tokenizer_rules': 'sentencepiece',
    'max_length': 32,  # tokens, </s> included
    # What the network sees as the length of a text: 'max_length', or 'longest':
    # that of the longest text of the batch, as the released models need.
    'padding': 'max_length',
    'long_captions': 'cut',  # or 'leave_out': not used in training
    'num_classes': 0,  # with 'label'
    'class_names': '',  # file with one name a line, usable as prompts
    'width': 64,  # features of the learned encoder, or of a class
    'num_layers': 1,  # of the learned encoder
    'num_heads': 4,  # of the learned encoder
    'caption_dropout': 0.1,  # share trained on the empty caption
  }


def _autoencoder() -> dict[str, Any]:
  """What a stage of kind='autoencoder' trains.

  All keys are fields of models.autoencoder.AutoencoderSpec.
  """
  return {
    'resolution': 0,  # of its images, in pixels a side; 0: none
    'kind': 'plain',  # a code is a point; 'kl': a normal distribution
    # With kl, of the mean KL divergence of a code's value.
    'kl_weight': 1e-6,
    'latent_channels': 4,  # of the code
    'channels': (128, 256, 512, 512),  # at each resolution, fine to coarse
    'num_blocks': (2, 2, 2, 2),  # of the encoder, and of the decoder
    'num_groups': 32,  # of group norms
    'patch_size': 1,  # pixels a side folded into channels
  }


def _diffusion() -> dict[str, Any]:
  """The objective; docs/objectives.md says what to choose."""
  return {
    'schedule': 'deepfloyd',  # or ddpm, cosine; linear: rectified flow
    'num_steps': 1000,  # T, the number of noising steps
    # Pixels a side of images whose schedule is not shifted by a stage's
    # shift_power; 0: the coarsest level's.
    'reference_resolution': 0,
    # What the network predicts: v, eps, x0, velocity.
    'parameterization': 'v',
    # Where the error is measured: v, eps, x0, velocity.
    'loss_space': 'eps',
    # With x0 prediction, the least noise that its error is divided by.
    'noise_floor': 0.0,
    # Or 'vdm', those of the variational bound; 'min_snr', 'sigmoid', 'p2'.
    'time_weights': 'none',
    'min_snr_gamma': 5.0,  # of min_snr
    'sigmoid_bias': 0.0,  # of sigmoid, in nats of logSNR
    'p2': (1.0, 1.0),  # gamma and k of p2
    # Divide them by their mean over the batch, as the release does.
    'normalize_time_weights': False,
    'time_density': 'uniform',  # of the times; or 'logit_normal'
    'logit_normal': (0.0, 1.0),  # mean, std of the logit; 1 is noise
    'stratified_times': False,  # spread evenly over each batch
    # Times of the levels: 'shared'; 'independent' of each other;
    # 'coarse_first', each level less noisy than the next finer one.
    'level_times': 'shared',
    'level_offset': 0.0,  # of coarse_first: nats of logSNR between levels
    # Of a cascade: the coarser image is noised up to a random step, at most
    # this share of T.
    'augmentation': 0.5,
  }


def _sampler() -> dict[str, Any]:
  """Sampling of images, during training and after."""
  return {
    'name': 'ddim',  # or ddpm, heun, dpm, dpm_sde
    'num_steps': 50,
    'eta': 0.0,  # DDIM's share of fresh noise, 0 to 1
    'guidance': 7.5,  # classifier-free guidance (CFG); 1: none
    'guidance_rescale': 0.0,  # to the unguided contrast, 0 to 1
    # First and last noising step that is guided, as shares of T.
    'guidance_interval': (0.0, 1.0),
    'threshold': 'dynamic_if',  # of x0; or none, clip, dynamic
    'pixels': 'round',  # to 8 bits; or 'truncate', as in the release
    # Nats of logSNR by which each level is ahead of the next finer one; for
    # networks that were trained with independent times.
    'level_offset': 0.0,
    # Of a cascade: noise on the sampled coarser image, as a share of T.
    'augmentation': 0.1,
  }


def _optimizer() -> dict[str, Any]:
  """The optimizer, and the EMA of its parameters."""
  return {
    'name': 'adamw',  # or 'muon'
    'b1': 0.9,
    'b2': 0.999,
    'epsilon': 1e-8,
    # Of the stored first moment; 'bfloat16' takes 2 bytes a parameter less.
    'mu_dtype': 'float32',
    'weight_decay': 0.0,  # decoupled, times the learning rate
    'clip_norm': 2.0,  # largest global norm of a gradient
    # With muon: AdamW's learning rate over the stage's.
    'adam_scale': 0.15,
    'decay': 'constant',  # after the warm-up; or 'cosine', to 0
    'ema_decay': 0.9999,  # a step
  }


def _watchdog() -> dict[str, Any]:
  """Seconds after which a hanging process is ended; 0: never."""
  return {
    'start_up': 3600,  # opening the data, restoring, compiling
    'step': 900,  # a step, or the wait for its batch
    'save': 1800,  # while training waits for a checkpoint
    'evaluate': 7200,  # an evaluation, or a sample grid
  }


def _eval() -> dict[str, Any]:
  """Evaluation during training and at its end."""
  return {
    'num_prompts': 256,  # prompts whose images are scored, for shapes
    'loss_batches': 8,  # held-out batches of the loss
    'batch_size': 16,  # images sampled at once
    'every': 0,  # steps; 0: only at the end of the run
    'loss_every': 1000,  # steps between two held-out losses; 0: by `every`
    # Metric by which each stage's best EMA is kept, such as
    # 'held_out_loss_64' or 'accuracy_shape'; '': none is kept.
    'best_metric': '',
  }


def level(resolution: int, **changes) -> ConfigDict:
  """Returns a level of the pyramid: its resolution and its architecture.

  All keys but `resolution` are fields of models.unet.LevelSpec. The defaults
  are those of an outer level of the released models; `channels`, `num_blocks`
  and `attention_layers` run from fine to coarse.

  Args:
    resolution: pixels a side.
    **changes: values of other keys.
  """
  config = ConfigDict(
    {
      'resolution': resolution,  # pixels a side
      'frames': 1,  # of a clip; 1: images
      # How the level's images come from the next finer ones. 'encoder', for the
      # coarsest level: they are codes of the autoencoder.
      'downsample': 'average',
      # 'unet', or for the coarsest level 'transformer', with channels=(width,),
      # num_blocks=(depth,) and attention_layers=(0,).
      'kind': 'unet',
      'channels': (64, 128, 256),  # at each resolution inside the level
      'num_blocks': (2, 2, 1),  # residual blocks down; one more, up
      'attention_layers': (0, 0, 0),  # after each of those blocks
      'attention_ffn': True,  # feed-forward block after attention
      # Layers of temporal attention, between the frames of a clip, which follow
      # those of attention_layers; (): none.
      'frame_attention': (),
      # 'divided': each position sees itself in all frames; 'joint': all
      # positions.
      'frame_attention_kind': 'divided',
      'temporal_dim': 1024,  # width of the time embedding
      'scale_condition': resolution,  # cap of the original size, in pixels
      'normalize_input': False,  # divide the noisy input by its std
      'num_heads': 8,  # of attention
      'num_groups': 32,  # of group norms
      'position_waves': 0,  # frequencies of a positional encoding
      'patch_size': 1,  # pixels a side folded into channels
      # What the backward pass recomputes: 'none', 'block' or 'level'.
      'remat': 'none',
      # Channels up to which neighbouring pixels are packed side by side; 1: no
      # packing; 0: the vector width of the device, 128 on a TPU, 1 elsewhere.
      'lanes': 0,
      # Use weights of the next coarser level: 'none'; 'blocks': at the
      # resolution where the levels meet; 'all': also embeddings, first and last
      # layers. Where shapes are equal.
      'share': 'none',
    }
  )
  config.lock().update(changes)
  return config


def stage(name: str, num_levels: int, **changes) -> ConfigDict:
  """Returns a stage of training: the first `num_levels` levels, for `steps`.

  Args:
    name: part of the names of its checkpoints and sample grids.
    num_levels: levels that it trains, from the coarsest; 0 with
      kind='autoencoder'.
    **changes: values of other keys.
  """
  config = ConfigDict(
    {
      'name': name,
      # Or 'autoencoder', for a first stage that trains that of the section
      # autoencoder.
      'kind': 'diffusion',
      'num_levels': num_levels,
      'steps': 100_000,
      'batch_size': 64,  # images a step, over all devices
      'accumulate': 1,  # gradient accumulation: parts of the batch
      'learning_rate': 5e-5,  # after the warm-up
      'warmup_steps': 10_000,  # linear, from 0
      'max_frames': 0,  # of its levels; 1: they train on images; 0: all
      'shift_power': 1.0,  # SNR / (resolution / reference) ** power
      # The same for the frames: SNR / (frames / those of level 0) ** power.
      'frame_shift_power': 0.0,
      'loss_weights': (1.0,) * num_levels,  # coarse to fine
      # Shares of the batch by the finest level that sees the image, coarse to
      # fine.
      'mixed_ratio': (0.0,) * (num_levels - 1) + (1.0,),
    }
  )
  config.lock().update(changes)
  return config


def cascade(config: ConfigDict) -> ConfigDict:
  """Returns the same levels as a cascade instead of a nest.

  Each level is a model of its own, trained in a stage of its own: the coarsest
  is sampled first, each next one is given the image so far (Ho et al., arXiv
  2106.15282).
  """
  config.model.cascade = True
  for stage in config.stages:
    stage.update(loss_weights=(1.0,), mixed_ratio=(1.0,))
  return config


def in_mode(
  config: ConfigDict, mode: str, **modes: Callable[[ConfigDict], ConfigDict]
) -> ConfigDict:
  """Returns the recipe itself, or one of its variants.

  Args:
    config: the recipe.
    mode: what follows the colon in --config=FILE:MODE; '' is the recipe
      itself, 'smoke' the toy-sized run that every recipe has.
    **modes: further variants, or another 'smoke', as functions of the recipe.

  Raises:
    ValueError: an unknown mode.
  """
  modes = {'': lambda config: config, 'smoke': smoke, **modes}
  if mode not in modes:
    raise ValueError(
      f'Unknown mode {mode!r} after the config: use one of {sorted(modes)}.'
    )
  return modes[mode](config)


def smoke(config: ConfigDict) -> ConfigDict:
  """Returns the same run, stage by stage, at toy size on procedural shapes."""
  # It imports JAX, which reading a recipe at full size does not need.
  from mdm_jax.mixed_batch import least_batch

  is_video = any(level.frames > 1 for level in config.model.levels)
  config.data.name = 'moving_shapes' if is_video else 'shapes'
  config.data.path = ''
  config.data.num_workers = 0
  config.dtype = 'float32'
  config.text.update(
    encoder='learned',
    tokenizer='',
    max_length=32,
    width=16,
    num_layers=1,
    num_heads=2,
  )
  config.model.text.update(width=16, num_heads=2)
  for i, level in enumerate(config.model.levels):
    resolution = 8 * 2**i
    level.update(
      resolution=resolution,
      scale_condition=resolution,
      temporal_dim=32,
      # Joint attention has heads of 8 channels.
      num_heads=1 if level.frame_attention_kind == 'joint' else 2,
      patch_size=1,
    )
    has_frames = any(level.frame_attention)
    if level.kind == 'transformer':
      level.update(channels=(8,), num_blocks=(1,))
      level.frame_attention = (1,) if has_frames else ()
    else:
      level.update(
        channels=(8, 8),
        num_blocks=(1, 0),
        num_groups=4,
        attention_layers=(0, 0 if i else 1),
        frame_attention=(0, 1) if has_frames else (),
      )
  if config.autoencoder.resolution:
    config.autoencoder.update(
      resolution=16,
      latent_channels=2,
      channels=(8,),
      num_blocks=(1,),
      num_groups=4,
      patch_size=2,
    )
  for stage in config.stages:
    # One whole pattern of a mixed batch on each of 8 devices.
    stage.update(
      steps=6,
      batch_size=8 * least_batch(stage.mixed_ratio),
      warmup_steps=2,
      learning_rate=1e-3,
    )
  config.sampler.num_steps = 4
  config.log_every = 2
  config.sample_every = 3
  config.checkpoint_every = 3
  config.averages.snapshot_every = 3
  config.eval.update(
    num_prompts=16,
    loss_batches=1,
    batch_size=8,
    every=min(config.eval.every, 3),
    loss_every=min(config.eval.loss_every, 3),
  )
  return config
