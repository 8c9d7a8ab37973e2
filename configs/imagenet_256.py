"""ImageNet by class, 64 px and then 64+256 px.

    tfds build imagenet2012 --file_format=array_record
    python -m mdm_jax.main --config=configs/imagenet_256.py
    python -m mdm_jax.sample --workdir=runs/imagenet_256 --prompt=207

The first command needs TensorFlow and ImageNet's own archives, see
https://www.tensorflow.org/datasets/catalog/imagenet2012. If it is given
--data_dir=DIR, give --config.data.path=DIR to the second. A prompt is the
number of a class, 0 to 999, or with --config.text.class_names=FILE a line of
that file.

The UNets are those of cc12m_256; a learned vector for each class takes the
place of the text. The paper trained its ImageNet model on eight A100s. Batch
sizes, steps, learning rate and guidance are our choice. The recipe has not been
trained at full size; `:smoke` runs.
"""

from configs import cc12m_256, common


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = cc12m_256.get_config()
  config.data.update(name='tfds:imagenet2012', flip=True)
  config.text.update(
    encoder='label',
    tokenizer_rules='sentencepiece',
    padding='max_length',
    num_classes=1000,
    width=1024,
  )
  config.model.text.width = 1024
  training = {'learning_rate': 1e-4, 'warmup_steps': 10_000}
  config.stages = [
    common.stage('64', 1, steps=400_000, batch_size=512, **training),
    # As in cc12m_256, two of three images are trained at 256 px.
    common.stage(
      '256',
      2,
      steps=300_000,
      batch_size=384,
      mixed_ratio=(1.0, 2.0),
      **training,
    ),
  ]
  config.sampler.guidance = 2.0
  return common.in_mode(config, mode, smoke=_smoke)


def _smoke(config):
  config = common.smoke(config)
  # The class of a procedural image is the shape of its first object.
  config.text.update(encoder='label', num_classes=6)
  return config
