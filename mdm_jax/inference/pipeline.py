"""A trained model in memory: samples images, and measures itself.

`mdm_jax.load` returns a `Pipeline`. The commands `sample` and `evaluate` call
its methods.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import operator
import os
from typing import Any

from absl import logging
from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import tqdm

from mdm_jax import mixed_batch
from mdm_jax.builders import ranges
from mdm_jax.builders.config import naming, sampler_settings
from mdm_jax.builders.prompts import encode_prompts, unknown_words
from mdm_jax.builders.text import empty_text
from mdm_jax.inference import evaluation
from mdm_jax.inference.session import Model, Session, open_run
from mdm_jax.report import grid
from mdm_jax.report.evaluations import Evaluation
from mdm_jax.runtime import buckets, sharding, value_types
from mdm_jax.runtime.printable import printable
from mdm_jax.steps.sample import SampleFn, make_sample_batches
from mdm_jax.steps.sampler import SamplerSpec

_TEXT = value_types.Text("a text (also of a class, such as '207')")
_NUM_SAMPLES = ranges.EVALUATION['num_samples']
_SHOWN = 300  # characters of a wrong value in a message
_PROGRAMS = 8  # most samplers whose compiled programs are kept


class OutOfMemory(ValueError):
  """Memory does not suffice for a batch."""


def load(
  workdir: str | os.PathLike,
  *,
  stage: str | None = None,
  best: bool = False,
  sigma_rel: float | None = None,
  spatial: int = 1,
  any_prompt: bool = True,
  text_path: str | os.PathLike | None = None,
  tokenizer: str | os.PathLike | None = None,
  data_path: str | os.PathLike | None = None,
) -> 'Pipeline':
  """Loads a trained model, see `mdm_jax.load`."""
  session = open_run(
    _directory('workdir', workdir),
    any_prompt=any_prompt,
    text_path=text_path and os.fspath(text_path),
    tokenizer=tokenizer and os.fspath(tokenizer),
    data_path=data_path and os.fspath(data_path),
    spatial=spatial,
    stage=stage,
    best=best,
    sigma_rel=sigma_rel,
  )
  return Pipeline(session, session.restore())


@dataclasses.dataclass(frozen=True, eq=False)
class Samples(Sequence):
  """Sampled images: a sequence of PIL images of the finest level.

  A notebook shows it as a grid with the prompts. Of clips the images are the
  first frames; `levels` has all, and `save` writes the grid as it moves.

  Attributes:
    levels: uint8 [N, H_r, H_r, 3], or clips [N, T_r, H_r, H_r, 3], for each
      level, coarse to fine.
    prompts: of each image.
    seeds: of each image.
  """

  levels: tuple[np.ndarray, ...]
  prompts: tuple[str, ...]
  seeds: tuple[int, ...]

  def __len__(self) -> int:
    return len(self.prompts)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.images[index]
    level = self.levels[-1][operator.index(index)]
    return Image.fromarray(grid.frame_at(level, 0))

  @property
  def images(self) -> list[Image.Image]:
    """PIL images of the finest level."""
    return [self[i] for i in range(len(self))]

  def grid(self) -> Image.Image:
    """All images on one page, every level of each, with the prompts."""
    page = grid.grid(self.levels, self.prompts)
    return Image.fromarray(grid.frame_at(page, 0))

  def save(self, path: str | os.PathLike) -> None:
    """Writes the grid as a PNG file, which is animated if there are clips."""
    grid.save_png(path, grid.grid(self.levels, self.prompts))

  def _repr_png_(self) -> bytes:
    return self.grid()._repr_png_()

  def __repr__(self) -> str:
    sides = ', '.join(
      mixed_batch.level_name(level.shape[1:]) for level in self.levels
    )
    noun = 'sample' if len(self) == 1 else 'samples'
    return f'<{len(self)} {noun} at {sides} px>'


@dataclasses.dataclass(frozen=True)
class Request:
  """Images to sample, see `Pipeline.request`.

  Attributes:
    prompts: of each image.
    seeds: of each image.
    settings: what the images depend on beside prompt, seed and weights. JSON.
    sample: (rows, path) -> yields, for each of these rows, the images of its
      sampling steps if `path`, or of the last one alone: lists of levels, uint8
      [H_r, H_r, 3], coarse to fine.
  """

  prompts: Sequence[str]
  seeds: Sequence[int]
  settings: dict[str, Any]
  sample: Callable[[Sequence[int], bool], Iterator[list]]


class Pipeline:
  """A trained model with its sampler and its metrics.

  Attributes:
    model: the stage, its weights and the devices: `model.params` are the EMA
      parameters, `model.stage` has the network, the noise schedule and the
      config, see `session.Model`.
  """

  def __init__(self, session: Session, model: Model):
    """Compiles nothing before the first sample."""
    self.model = model
    self._session = session
    self._program = functools.lru_cache(_PROGRAMS)(self._make_program)
    self._guide = functools.lru_cache(1)(
      lambda workdir: session.restore_guide(model, workdir)
    )

  @property
  def config(self) -> ConfigDict:
    """The run's config."""
    return self.model.stage.config

  @property
  def resolutions(self) -> tuple[int, ...]:
    """Pixels a side of the levels, coarse to fine."""
    return self.model.stage.sampled_resolutions

  def __repr__(self) -> str:
    model = self.model
    return (
      f'<model of {model.workdir}: {model.stage.title}, step '
      f'{model.weights.step}, {model.weights.ema}>'
    )

  def sample(self, prompts: str | Sequence[str], **options: Any) -> Samples:
    """Samples images from prompts.

    An image depends on the weights, its prompt, its seed and the settings, and
    is that of the command `mdm_jax.sample` with the same ones. Images are
    sampled in batches: of 1, 2, 4, … images for each device, of which at most
    `batch_size` together. Fewer images are padded to the next of these sizes,
    more are sampled in several batches. A size is compiled once for each
    sampler, number of steps, guidance weight and threshold.

    Args:
      prompts: a prompt, or several; for class-conditional models class labels.
      **options: `num_samples` of each prompt (1) and their `seed` (0), `steps`,
        `guidance`, `sampler`, `threshold`, `level_offset`, `frames`,
        `negative_prompt`, `guide` and `batch_size`, see `request`.

    Returns:
      `num_samples` images of the first prompt, then of the second, …

    Raises:
      ValueError: an option is wrong, or memory does not suffice.
      FileNotFoundError: the guide has no weights.
    """
    request = self.request(prompts, **options)
    images = [steps[-1] for steps in request.sample(range(len(request.seeds)))]
    return Samples(
      tuple(map(np.stack, zip(*images))),
      tuple(request.prompts),
      tuple(request.seeds),
    )

  def request(
    self,
    prompts: str | Sequence[str],
    *,
    num_samples: int = 1,
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    threshold: str | None = None,
    level_offset: float | None = None,
    frames: int | None = None,
    negative_prompt: str = '',
    guide: str | os.PathLike | None = None,
    batch_size: int | None = None,
  ) -> Request:
    """Checks what is to be sampled, and encodes the prompts.

    Args:
      prompts: a prompt, or several.
      num_samples: images of each prompt.
      seed: of the first image, the next has seed + 1; or one for each prompt.
      steps, guidance, sampler, threshold, level_offset: as in `config.sampler`,
        `num_steps` and `name` for two of them; None for those of the config.
      frames: of each clip, at the finest level; None for as many as the model
        was trained with. Longer clips are sampled in parts, see `SamplerSpec`.
      negative_prompt: text that guidance leads away from.
      guide: working directory of a worse model, smaller or trained for shorter,
        that guidance leads away from instead (autoguidance).
      batch_size: images at once, over all devices, rounded up to a multiple of
        them; None for `eval.batch_size` of the config.

    Raises:
      ValueError, FileNotFoundError: see `sample`.
    """
    prompts, num_samples, first_seeds = _check(
      prompts, num_samples, seed, negative_prompt, guide
    )
    model = self.model.changed(
      _sampler(steps, guidance, sampler, threshold, level_offset),
      {'batch_size': batch_size},
    )
    if model.stage.config.text.encoder == 'precomputed':
      raise ValueError(
        'a model with any_prompt=False samples no prompts of its own: load it '
        'with any_prompt=True.'
      )
    text = encode_prompts(model.stage.config, prompts)
    _warn(model, prompts, negative_prompt, guide)
    (negative,) = encode_prompts(model.stage.config, [negative_prompt])
    guide = guide and _directory('guide', guide)
    guided_by = guide and self._guide(guide)
    spec = _with_frames(model, frames)
    params = model.params | ({'guide': guided_by.params} if guided_by else {})
    each = [prompt for prompt in prompts for _ in range(num_samples)]
    seeds = [seed + i for seed in first_seeds for i in range(num_samples)]
    size = _batch_size(model, len(each))

    def sample(rows, path=False):
      rows = np.asarray(rows, int)
      batches = self._program(spec, path, guide)(
        params,
        text[rows // num_samples],
        negative,
        np.array(seeds)[rows],
        size,
      )
      with (
        _naming_memory(size),
        tqdm.tqdm(
          total=len(rows), unit='image', smoothing=0, disable=len(rows) <= size
        ) as bar,
      ):
        for batch in batches:
          for steps in zip(*(zip(*levels) for levels in batch)):
            yield list(steps)
            bar.update()

    settings = _settings(model, negative_prompt, guided_by, frames)
    return Request(each, seeds, settings, sample)

  def evaluate(
    self,
    metrics: Sequence[str] | None = None,
    *,
    num_samples: int | None = None,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    threshold: str | None = None,
    level_offset: float | None = None,
    batch_size: int | None = None,
    loss_batches: int | None = None,
    output: str | None = None,
    **options: Any,
  ) -> Evaluation:
    """Measures the model, as the command `mdm_jax.evaluate` does.

    The first samples are written to `WORKDIR/eval/<stage>_<step>`, and the
    result is added to `output` as a line of JSON.

    Args:
      metrics: some of `evaluation.METRICS`; None for those that need no files.
      num_samples: images to sample; None for `eval.num_prompts` of the config.
      seed: sample i has seed + i; None for that of training.
      steps, guidance, sampler, threshold, level_offset, batch_size: see
        `request`.
      loss_batches: batches of the loss; None for `eval.loss_batches`.
      output: a file; None for `WORKDIR/eval/<stage>_<step>.jsonl`.
      **options: further fields of `evaluation.Options`, such as `inception`.

    Returns:
      The metrics by name, and the settings that they depend on; printed, it is
      a table.

    Raises:
      ValueError, FileNotFoundError: an option is wrong, or a file cannot be
        used.
    """
    for name in options.keys() - ranges.EVALUATION.keys():
      raise TypeError(f'evaluate() has no option {name!r}.')
    if isinstance(metrics, str):
      metrics = [name.strip() for name in metrics.split(',')]
    given = {
      name: _checked(name, ranges.EVALUATION[name], value)
      for name, value in {
        'metrics': metrics,
        'num_samples': num_samples,
        'seed': seed,
        'output': output,
        **options,
      }.items()
      if value is not None
    }
    output = given.pop('output', self.evaluations)
    model = self.model.changed(
      _sampler(steps, guidance, sampler, threshold, level_offset),
      {'batch_size': batch_size, 'loss_batches': loss_batches},
    )
    config = model.stage.config
    spec = model.stage.make_sampler(model.mesh).spec
    count = given.get('num_samples', config.eval.num_prompts)
    size = _batch_size(model, count)

    found = evaluation.evaluate_run(
      model,
      evaluation.make_options(given),
      self._make_sample_fn(spec, size),
      self.model.stage,
    )
    try:
      found.append_to(output)
    except buckets.errors():
      # They may have taken hours.
      logging.info('%s', found)
      raise
    return found

  @property
  def evaluations(self) -> epath.Path:
    """The file to which evaluations are added by default."""
    stage, step = self.model.stage.name, self.model.weights.step
    return epath.Path(self.model.workdir) / 'eval' / f'{stage}_{step}.jsonl'

  def _make_sample_fn(self, spec: SamplerSpec, size: int) -> SampleFn:
    """Samples any number of images, so many at once."""
    negative = empty_text(self.model.stage.config)

    def sample_fn(params, text, seeds):
      batches = self._program(spec, False, None)(
        params, text, negative, seeds, size
      )
      with _naming_memory(size):
        return tuple(
          map(np.concatenate, zip(*(batch[-1] for batch in batches)))
        )

    return sample_fn

  def _make_program(
    self, spec: SamplerSpec, path: bool, guide: str | None
  ) -> Callable[..., Iterator]:
    """Jits a sampler, see `make_sample_batches`."""
    model, params, network = self.model, self.model.params, None
    if guide:
      guided_by = self._guide(guide)
      params = params | {'guide': guided_by.params}
      network = guided_by.stage.model
    return make_sample_batches(
      model.stage.make_sampler(model.mesh, network, **dataclasses.asdict(spec)),
      jax.tree.map(lambda x: x.sharding, params),
      path=path,
    )


def _directory(name: str, path: str | os.PathLike) -> str:
  """A directory as a flag reads it; raises ValueError if there is none."""
  return _checked(name, value_types.RUN, path)


def _check(
  prompts: str | Sequence[str],
  num_samples: int,
  seed: int | Sequence[int],
  negative_prompt: str,
  guide: str | os.PathLike | None,
) -> tuple[list[str], int, list[int]]:
  """Checks arguments of `request`; returns the first three, seeds by prompt.

  Raises:
    ValueError: they make no sense.
  """
  if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
    prompts = [prompts]
  prompts = [_checked('prompts', _TEXT, prompt) for prompt in prompts]
  if not prompts:
    raise ValueError('nothing to sample: give a prompt.')
  _checked('negative_prompt', _TEXT, negative_prompt)
  num_samples = _checked('num_samples', _NUM_SAMPLES, num_samples)
  if np.ndim(seed) == 0:
    first = _checked('seed', value_types.SEED, seed)
    value_types.check_seeds('seed', first, len(prompts) * num_samples)
    seed = [first + k * num_samples for k in range(len(prompts))]
  seeds = [*seed]
  if len(seeds) != len(prompts):
    raise ValueError(
      f'seed has {len(seeds)} values: give one, or one for each of the '
      f'{len(prompts)} prompts.'
    )
  seeds = [_checked('seed', value_types.SEED, each) for each in seeds]
  value_types.check_seeds('seed', max(seeds), num_samples)
  if guide and negative_prompt:
    raise ValueError(
      'guidance leads away from one thing: give a guide or a negative prompt.'
    )
  return prompts, num_samples, seeds


def _warn(
  model: Model, prompts: Sequence[str], negative_prompt: str, guide: str | None
) -> None:
  """Warns of words that are unknown, and of what has no effect."""
  texts = [*prompts, negative_prompt]
  if unknown := unknown_words(model.stage.config, texts):
    logging.warning('The prompts have %s.', printable(unknown))
  away = negative_prompt or guide
  if away and model.stage.config.sampler.guidance == 1:
    logging.warning('Guidance is 1: %r has no effect.', printable(away))


def _checked(name: str, kind: Any, value: Any) -> Any:
  """The value as its kind has it; raises ValueError if it is of another."""
  if isinstance(value, os.PathLike):
    value = os.fspath(value)
  shown = repr(value)
  if len(shown) > _SHOWN:
    shown = f'{shown[:_SHOWN]}…'
  with naming(f'{name}={shown}'):
    return kind.check(value)


def _sampler(
  steps: int | None,
  guidance: float | None,
  sampler: str | None,
  threshold: str | None,
  level_offset: float | None,
) -> dict[str, Any]:
  """What these arguments change of `config.sampler`."""
  return {
    'num_steps': steps,
    'guidance': guidance,
    'name': sampler,
    'threshold': threshold,
    'level_offset': level_offset,
  }


def _with_frames(model: Model, frames: int | None) -> SamplerSpec:
  """The options of the sampler, for clips of a number of frames.

  Raises:
    ValueError: the model has images, or levels that cannot have so few.
  """
  if frames is None:
    return model.stage.make_sampler(model.mesh).spec
  frames = _checked('frames', ranges.FRAMES, frames)
  if len(model.stage.model.image_shapes[-1]) == 3:
    raise ValueError(
      f'frames={frames}: {model.stage.title} has images, not clips: leave it '
      'out.'
    )
  sampler = model.stage.make_sampler(model.mesh, frames=frames)
  spatial = model.mesh.shape['spatial']
  counts = {shape[0] for shape in sampler.model.level_shapes if len(shape) == 4}
  if any(count % spatial for count in counts):
    raise ValueError(
      f'frames={frames}: {spatial} devices, by --spatial, cannot share '
      f'{min(count for count in counts if count % spatial)} frames: change '
      'either number.'
    )
  return sampler.spec


def _batch_size(model: Model, count: int) -> int:
  """Images at once for so many: few sizes, as each is compiled."""
  size, most = (
    sharding.batch_shards(model.mesh),
    model.stage.config.eval.batch_size,
  )
  while size < min(count, most):
    size *= 2
  return min(size, most)


def _settings(
  model: Model, negative_prompt: str, guide: Model | None, frames: int | None
) -> dict[str, Any]:
  """What samples depend on beside prompt, seed and weights."""
  settings = {
    **sampler_settings(model.stage.config),
    'negative_prompt': negative_prompt,
  }
  # Samples of older versions, which were rounded and had all frames, go on
  # without these keys.
  if settings['pixels'] == 'round':
    del settings['pixels']
  if frames:
    settings['frames'] = frames
  return settings | ({'guide': guide.description} if guide else {})


@contextlib.contextmanager
def _naming_memory(size: int) -> Iterator[None]:
  """Turns XLA's error for too little memory into `OutOfMemory`."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise OutOfMemory(
      f'memory does not suffice for {size} images at once: give a smaller '
      'batch_size.'
    ) from error
