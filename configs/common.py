"""Every configuration key, its default and its unit.

A recipe starts from `get_config()`, adds levels and stages, and changes what
it must. Configs are locked: a key that is not here is an error.
"""

from collections.abc import Callable

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """All keys but `model.levels` and `stages`, which each recipe sets."""
  return ConfigDict(
    {
      'seed': 0,
      'dtype': 'float32',  # of activations; 'bfloat16' on TPU and GPU
      # Devices along each axis; one may be -1, for all that are left.
      'mesh': {'data': -1, 'fsdp': 1, 'spatial': 1},
      # First match wins: (regular expression on a parameter's path, mesh axes
      # of its last dimensions). What matches none is replicated.
      'sharding_rules': (
        (r'level_\d+/conv_(in|out)/', ()),
        (r'/kernel$', ('fsdp',)),
      ),
      'data': {
        # Or 'captioned_images', made by prepare_data; 'tars', indexed by
        # index_tars; or 'tfds:NAME', built by TFDS as ArrayRecords.
        'name': 'shapes',
        'path': '',  # of the data set or the index; TFDS's data_dir
        # Of a TFDS data set; of a nested feature, the path 'a/b'.
        'image': 'image',
        'caption': 'caption',  # a text or several
        'label': 'label',  # instead, where text.encoder is 'label'
        'train_split': 'train',
        'validation_split': 'validation',  # '': train
        'size': 1_000_000,  # records of the drawn data set
        'flip': False,  # mirror half of the images
        'random_crop': False,  # the square lies anywhere
        'max_bad_fraction': 0.01,  # of the records; more end the run
        'may_change': False,  # the data set, from run to run
        'num_workers': 0,  # processes that decode; 0: a thread of this one
        'num_threads': 1,  # of each worker
        'prefetch': 4,  # batches
      },
      'text': {
        # 'learned', trained with the network; 't5', frozen; 'precomputed',
        # what precompute_text has stored of it beside the data set; 'label',
        # class numbers instead of captions.
        'encoder': 'learned',
        'path': '',  # T5's directory, as Hugging Face's
        'tokenizer': '',  # spiece.model; '': the encoder's own
        'max_length': 32,  # tokens, </s> included
        'long_captions': 'cut',  # or 'leave_out' of training
        'num_classes': 0,  # of labels
        'class_names': '',  # a file with a name a line, for prompts
        'width': 64,
        'num_layers': 1,
        'num_heads': 4,
        'caption_dropout': 0.1,  # share trained on the empty caption
      },
      'model': {
        # How the text enters the network: models.conditioning.TextSpec.
        'text': {
          'width': 64,
          'num_layers': 0,
          'num_heads': 8,
          'masked_attention': True,
        },
        'levels': [],  # coarse to fine, each a level()
      },
      'diffusion': {
        'schedule': 'deepfloyd',  # or 'ddpm', 'cosine'
        'num_steps': 1000,  # T
        'parameterization': 'v',  # what the network predicts: v, eps, x0
        'loss_space': 'eps',  # where the error is measured: v, eps, x0
        'time_weights': 'none',  # or 'vdm', the variational bound's
      },
      'stages': [],  # in order, each a stage()
      'optimizer': {
        'name': 'adamw',  # or 'muon'
        'b1': 0.9,
        'b2': 0.999,
        'epsilon': 1e-8,
        'weight_decay': 0.0,
        'clip_norm': 2.0,
        'adam_scale': 0.15,  # with muon, AdamW's learning rate over it
        'decay': 'constant',  # after the warm-up; or 'cosine' to 0
        'ema_decay': 0.9999,
      },
      # Of which one of any width is made after training: docs/averages.md.
      'averages': {
        'widths': (),  # sigma_rel, such as (0.05, 0.1); none: no memory
        'snapshot_every': 1000,  # steps between two that are kept
      },
      # A NaN, an Inf or a spike leaves that one step out.
      'guard': {
        'spike_factor': 10.0,  # times the running mean of loss, gradient
        'window': 100,  # good steps in that mean, and before a spike
        'max_skipped': 10,  # in a row; then the run stops
      },
      'sampler': {
        'name': 'ddim',  # or ddpm, heun, dpm, dpm_sde
        'num_steps': 50,
        'eta': 0.0,  # DDIM's share of fresh noise
        'guidance': 7.5,  # 1 is none
        'guidance_rescale': 0.0,  # to the unguided contrast, 0 to 1
        # Noising steps that are guided, as shares of all of them.
        'guidance_interval': (0.0, 1.0),
        'threshold': 'dynamic_if',  # of x0: none, clip, dynamic
      },
      'log_every': 50,  # steps between two progress lines
      'sample_every': 1000,  # steps between two sample grids
      'checkpoint_every': 1000,  # steps
      'checkpoints_to_keep': 2,  # of each stage
      'save_failures': 3,  # in a row that end the run
      'replicas_every': 0,  # steps between two comparisons; 0: never
      # Seconds after which a hanging process ends; 0: never.
      'watchdog': {
        'start_up': 3600,  # also restoring and compiling
        'step': 900,  # data included
        'save': 1800,
        'evaluate': 7200,  # or a grid of samples
      },
      'eval': {
        'num_prompts': 256,  # whose pictures are marked
        'loss_batches': 8,  # held-out batches
        'batch_size': 16,  # prompts drawn at once
        'every': 0,  # steps; 0: only at the run's end
        # Of each stage, the average with the best of it so far is kept:
        # 'held_out_loss_64' or 'accuracy_shape', for example; '': none.
        'best_metric': '',
      },
    }
  )


def level(resolution: int, **changes) -> ConfigDict:
  """One level of the pyramid: models.unet.LevelSpec, and its resolution.

  The defaults are those of an outer level of the released models; `channels`,
  `num_blocks` and `attention_layers` run from fine to coarse.
  """
  config = ConfigDict(
    {
      'resolution': resolution,  # pixels a side
      'channels': (64, 128, 256),
      'num_blocks': (2, 2, 1),
      'attention_layers': (0, 0, 0),
      'attention_ffn': True,
      'temporal_dim': 1024,
      'scale_condition': resolution,  # pixels
      'normalize_input': False,
      'num_heads': 8,
      'num_groups': 32,
      'position_waves': 0,
      'patch_size': 1,
      'remat': 'none',  # or 'block', 'level': computed again, not kept
      # Channels that neighbouring pixels fill together; 1: none. 0: as many
      # as the device's vectors hold, 128 on a TPU and 1 elsewhere.
      'lanes': 0,
    }
  )
  config.lock().update(changes)
  return config


def stage(name: str, num_levels: int, **changes) -> ConfigDict:
  """One stage of training: the first `num_levels` levels, for `steps`."""
  config = ConfigDict(
    {
      'name': name,
      'num_levels': num_levels,
      'steps': 100_000,
      'batch_size': 64,  # over all devices
      'accumulate': 1,  # parts of it, one after the other
      'learning_rate': 5e-5,
      'warmup_steps': 10_000,
      'shift_power': 1.0,  # SNR / (resolution ratio) ** power
      'loss_weights': (1.0,) * num_levels,  # coarse to fine
      # Shares of the batch whose finest level is each, coarse to fine.
      'mixed_ratio': (0.0,) * (num_levels - 1) + (1.0,),
    }
  )
  config.lock().update(changes)
  return config


def in_mode(
  config: ConfigDict, mode: str, **modes: Callable[[ConfigDict], ConfigDict]
) -> ConfigDict:
  """The recipe itself, or what a mode makes of it; every recipe has 'smoke'.

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
  """The same run, stage by stage, at toy size on the drawn data set."""
  config.data.name = 'shapes'
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
      channels=(8, 8),
      num_blocks=(1, 0),
      num_heads=2,
      num_groups=4,
      attention_layers=(0, 0 if i else 1),
      patch_size=1,
    )
  for stage in config.stages:
    # The pattern of a mixed batch once on each of 8 devices.
    stage.update(
      steps=6,
      batch_size=8 * int(sum(stage.mixed_ratio)),
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
  )
  return config
