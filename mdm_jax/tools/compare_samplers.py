"""Which sampler, and how many steps, a model of shapes is best drawn with.

  python -m mdm_jax.tools.compare_samplers --workdir=runs/shapes_64

Draws the same held-out prompts with each sampler at each number of steps. Marks
the pictures by their prompts, and measures the Fréchet distance to drawn
held-out images in the features of a small classifier that is trained here.
"""

import itertools
import json
import pathlib
import sys
import time

from absl import app, flags, logging

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of a training run on shapes.', required=True
)
_SAMPLERS = flags.DEFINE_list(
  'samplers', ['ddim', 'dpm', 'heun', 'ddpm', 'dpm_sde'], 'To compare.'
)
_STEPS = flags.DEFINE_list(
  'steps', ['5', '10', '20', '50', '250'], 'Of each sampler.'
)
_NUM_IMAGES = flags.DEFINE_integer(
  'num_images', 512, 'Drawn with each.', lower_bound=2
)
_CLASSIFIER_IMAGES = flags.DEFINE_integer(
  'classifier_images',
  8192,
  'That it learns from. Half as many held-out '
  'ones are what pictures are compared with.',
  lower_bound=8,
)
_CLASSIFIER_STEPS = flags.DEFINE_integer(
  'classifier_steps', 1500, 'Of training the classifier.', lower_bound=1
)
_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'Receives the figures. What it has already, of the same '
  'model and settings, is not measured again. Default: '
  'WORKDIR/samplers.json.',
)
_PLOT = flags.DEFINE_string(
  'plot', None, 'Receives a picture of them, .svg or .png.'
)

_BATCH = 128


def main(argv: list[str]) -> None:
  """Flags to figures."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  from mdm_jax import (
    build,
    checkpoint,
    checks,
    compilation_cache,
    inputs,
    metrics,
    sharding,
    trained,
  )

  metrics.setup_logging()
  compilation_cache.enable()
  if _PLOT.value:
    try:
      import matplotlib  # noqa: F401
    except ImportError:
      sys.exit('error: --plot needs matplotlib: pip install matplotlib.')
  try:
    config = build.load_config(checkpoint.read_config(_WORKDIR.value))
    if config.data.name != 'shapes' or config.text.encoder == 'label':
      raise ValueError(
        f'{_WORKDIR.value} was not trained on captions of shapes, whose '
        'pictures alone can be marked.'
      )
    config.mesh.update(data=-1, fsdp=1, spatial=1)
    mesh = sharding.make_mesh(config.mesh)
    cases = [
      (name, int(steps))
      for steps, name in itertools.product(_STEPS.value, _SAMPLERS.value)
    ]
    for name, steps in cases:
      config.sampler.update(name=name, num_steps=steps)
      checks.check(config, mesh)
    average = trained.restore_average(config, _WORKDIR.value, mesh)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')

  path = pathlib.Path(
    _OUTPUT.value or pathlib.Path(_WORKDIR.value) / 'samplers.json'
  )
  # As JSON has it: sequences are lists there.
  settings = {
    **trained.describe(config, _WORKDIR.value, average),
    'images': _NUM_IMAGES.value,
    'classifier': [_CLASSIFIER_IMAGES.value, _CLASSIFIER_STEPS.value],
    **{
      name: list(value) if isinstance(value, tuple) else value
      for name, value in config.sampler.items()
      if name not in ('name', 'num_steps')
    },
  }
  found, others = [], []
  for one in json.loads(path.read_text()) if path.exists() else ():
    (found if one | settings == one else others).append(one)
  done = {(one['sampler'], one['steps']) for one in found}
  prompts = inputs.make_prompts(config, _NUM_IMAGES.value)
  reference, distance = _make_distance(
    build.resolutions(config, config.stages[average.index])[-1], config.seed
  )
  logging.info('Between two halves of the held-out images: %.2f.', reference)
  for name, steps in cases:
    if (name, steps) in done:
      continue
    config.sampler.update(name=name, num_steps=steps)
    params = average.params
    draw = trained.make_draw(config, average.index, mesh, params)
    draw(
      params,
      prompts.text[: config.eval.batch_size],
      range(config.eval.batch_size),
    )  # Compiles.
    begin = time.monotonic()
    pictures = draw(params, prompts.text, range(_NUM_IMAGES.value))[-1]
    seconds = (time.monotonic() - begin) / _NUM_IMAGES.value
    found.append(
      {
        'sampler': name,
        'steps': steps,
        **settings,
        'seconds_per_image': seconds,
        'frechet': distance(pictures),
        **_accuracy(pictures, prompts),
      }
    )
    # After each, as the whole takes long.
    path.write_text(json.dumps(others + found, indent=1) + '\n')
    logging.info(
      '%s, %d steps: accuracy %.1f %%, distance %.2f, %.2f s an image.',
      name,
      steps,
      100 * found[-1]['accuracy'],
      found[-1]['frechet'],
      seconds,
    )
  found.sort(
    key=lambda one: (
      cases.index((one['sampler'], one['steps']))
      if (one['sampler'], one['steps']) in cases
      else len(cases)
    )
  )
  print(
    metrics.table(
      [
        [
          one['sampler'],
          one['steps'],
          f'{one["accuracy"]:.1%}',
          f'{one["color"]:.1%}',
          f'{one["shape"]:.1%}',
          f'{one["frechet"]:.2f}',
          f'{one["seconds_per_image"]:.2f}',
        ]
        for one in found
      ],
      ['sampler', 'steps', 'accuracy', 'color', 'shape', 'distance', 's/image'],
    )
  )
  if _PLOT.value:
    _plot(found, _PLOT.value)


def _accuracy(pictures, prompts) -> dict[str, float]:
  """Shares of attributes that are right, and their mean, without `all`."""
  import numpy as np

  from mdm_jax import inputs
  from mdm_jax.eval import prompt_accuracy

  marks = prompt_accuracy.accuracy(
    pictures, prompts.statements, inputs.make_vocabulary()
  )
  attributes = [value for name, value in marks.items() if name != 'all']
  return {'accuracy': float(np.mean(attributes)), **marks}


def _make_distance(resolution: int, seed: int):
  """Trains the classifier and looks at held-out images with it.

  Returns:
    The distance between two halves of them, and a function that gives that
    between uint8 [N, H, W, 3] pictures and all of them.
  """
  import jax
  import numpy as np

  from mdm_jax.data import shapes
  from mdm_jax.eval import classifier, fid

  words = {}  # of each attribute, in the order of the classes

  def images_and_labels(split, count):
    source = shapes.ShapesSource(seed, split, count, resolution)
    scenes = [source.scene(i)[0] for i in range(count)]
    images = np.stack([shapes.draw(scene, resolution) for scene in scenes])
    values = {
      'count': [len(scene.objects) for scene in scenes],
      'background': [scene.background for scene in scenes],
      'layout': [scene.layout for scene in scenes],
      **{
        name: [getattr(scene.objects[0], name) for scene in scenes]
        for name in ('color', 'shape', 'pattern', 'size')
      },
    }
    for name, each in values.items():
      if name not in words:  # One more, for what training has not shown.
        words[name] = [*sorted(set(each)), None]
    return images, {
      name: np.array(
        [
          words[name].index(value if value in words[name] else None)
          for value in each
        ]
      )
      for name, each in values.items()
    }

  images, labels = images_and_labels('train', _CLASSIFIER_IMAGES.value)
  network, params = classifier.train(
    images, labels, num_steps=_CLASSIFIER_STEPS.value
  )
  apply = jax.jit(lambda images: network.apply({'params': params}, images))

  def batches(images):
    for start in range(0, len(images), _BATCH):
      yield apply(images[start : start + _BATCH])

  def statistics(images):
    found = fid.Statistics(classifier.FEATURES)
    for features, _ in batches(images):
      found.update(np.asarray(features))
    return found

  half = _CLASSIFIER_IMAGES.value // 4
  images, labels = images_and_labels('held_out', 2 * half)
  for name, expected in labels.items():
    right = (
      np.concatenate([logits[name].argmax(-1) for _, logits in batches(images)])
      == expected
    )
    logging.info(
      'The classifier sees the %s of %.1f %%.', name, 100 * right.mean()
    )
  reference = statistics(images)
  halves = fid.frechet_distance(
    statistics(images[:half]), statistics(images[half:])
  )
  return halves, lambda pictures: fid.frechet_distance(
    statistics(pictures), reference
  )


def _plot(found: list[dict], path: str) -> None:
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
  for axis, key, factor, label in (
    (axes[0], 'accuracy', 100, 'prompt accuracy, %'),
    (axes[1], 'frechet', 1, 'Fréchet distance'),
  ):
    for name in dict.fromkeys(one['sampler'] for one in found):
      points = sorted(
        (one['steps'], factor * one[key])
        for one in found
        if one['sampler'] == name
      )
      axis.plot(*zip(*points), marker='o', markersize=4, label=name)
    axis.set(xscale='log', xlabel='steps', ylabel=label)
    axis.set_xticks(ticks := sorted({one['steps'] for one in found}), ticks)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
  axes[1].set_yscale('log')
  axes[0].legend()
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)


if __name__ == '__main__':
  app.run(main)
