"""Sampling: from prompts and seeds to images, in batches on a mesh."""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from mdm_jax.diffusion import guidance, samplers
from mdm_jax.runtime import sharding
from mdm_jax.steps.sampler import Sampler

# (params, text [N, ...], seeds [N]) -> uint8 images [N, H_r, H_r, 3], coarse to
# fine. Text is the text encoder's input: tokens, labels or features.
SampleFn = Callable[[Any, np.ndarray, Sequence[int]], tuple[np.ndarray, ...]]


def jit_sample(
  sampler: Sampler, param_shardings: Any, *, continues: bool = False
) -> Callable:
  """Jits `Sampler.sample`; its batch is sharded, its images replicated.

  Args:
    sampler: the functions to jit.
    param_shardings: shardings of the parameters.
    continues: whether the function also takes `earlier` and `part`.
  """
  return jax.jit(
    sampler.sample,
    in_shardings=_in_shardings(sampler, param_shardings, continues),
    out_shardings=sharding.replicated(sampler.mesh),
    compiler_options=sharding.compiler_options(sampler.mesh),
  )


def _in_shardings(sampler: Sampler, params: Any, continues: bool) -> tuple:
  """Shardings of the arguments of `Sampler.prepare` and `Sampler.sample`."""
  # One sharding for arrays of any rank.
  batch = sharding.batch_sharding(sampler.mesh, 1)
  whole = sharding.replicated(sampler.mesh)
  further = (whole, whole, *([whole] if sampler.coarser else []))
  return params, batch, batch, batch, *(further if continues else ())


def _place(
  mesh: Mesh, text: np.ndarray, negative: np.ndarray, seeds: Sequence[int]
) -> tuple[jax.Array, ...]:
  """Shards this process's part of a batch over the devices."""
  placed = sharding.shard_batch(
    {
      'text': text,
      'negative': negative.astype(text.dtype),
      'seeds': np.asarray(seeds, np.uint32),
    },
    mesh,
  )
  return placed['text'], placed['negative'], placed['seeds']


def make_sample_batches(
  sampler: Sampler, param_shardings: Any, *, path: bool = False
) -> Callable[..., Iterator[list[tuple[np.ndarray, ...]]]]:
  """Jits a sampler for batches of a fixed size, sharded over its mesh.

  Each batch size is compiled once, when it is first used.

  Args:
    sampler: the functions to jit.
    param_shardings: shardings of the parameters.
    path: whether to return the images of all steps, as `make_sample_steps`
      does, or only the last ones.

  Returns:
    (params, text [N, ...], negative [...], seeds [N], batch_size) -> an
    iterator over batches. `negative` is the negative prompt of all images; the
    last batch is padded to the batch size. A batch is a list of steps, which
    with `path=False` has the last step only. A step is uint8 images
    [B, H_r, H_r, 3], coarse to fine.
  """
  spec, mesh, clip_parts = sampler.spec, sampler.mesh, sampler.parts
  if path:
    sample_steps = make_sample_steps(sampler, param_shardings)

    def sample_part(params, inputs, *earlier):
      steps = spec.num_steps, spec.guidance
      return sample_steps(params, *inputs, *steps, *earlier)
  else:
    begin, proceed = (
      jit_sample(sampler, param_shardings, continues=continues)
      for continues in (False, True)
    )

    def sample_part(params, inputs, *earlier):
      run = proceed if earlier else begin
      return [run(params, *_place(mesh, *inputs), *earlier)]

  def sample_batch(params, *inputs):
    earlier, parts = (), []
    for part in range(1, clip_parts.count + 1):
      parts.append(
        [
          tuple(map(np.asarray, levels))
          for levels in sample_part(params, inputs, *earlier)
        ]
      )
      earlier = parts[-1][-1][-1], np.uint32(part)
    return map(clip_parts.join, zip(*parts)) if len(parts) > 1 else parts[0]

  def sample_batches(params, text, negative, seeds, batch_size):
    local = batch_size // jax.process_count()
    for start in range(0, len(text), batch_size):
      first = start + jax.process_index() * local
      rows = np.arange(first, first + local) % len(text)
      remaining = len(text) - start
      yield [
        tuple(level[:remaining] for level in images)
        for images in sample_batch(
          params,
          text[rows],
          np.broadcast_to(negative, (local, *negative.shape)),
          np.asarray(seeds)[rows],
        )
      ]

  return sample_batches


def make_sample_fn(
  sampler: Sampler, negative: np.ndarray, batch_size: int, param_shardings: Any
) -> SampleFn:
  """Jits a sampler for any number of images, sampled in batches.

  Args:
    sampler: the functions to jit.
    negative: [...], one negative prompt for all images.
    batch_size: images sampled at once.
    param_shardings: shardings of the parameters.
  """
  sample_batches = make_sample_batches(sampler, param_shardings)

  def sample_fn(params, text, seeds):
    batches = [
      batch[-1]
      for batch in sample_batches(params, text, negative, seeds, batch_size)
    ]
    return tuple(map(np.concatenate, zip(*batches)))

  return sample_fn


def make_sample_steps(
  sampler: Sampler,
  param_shardings: Any,
  *,
  with_inputs: bool = False,
) -> Callable[..., Iterator[Any]]:
  """Jits a sampler step by step, for live previews.

  Args:
    sampler: the functions to jit.
    param_shardings: shardings of the parameters.
    with_inputs: whether a step also has x_t, what the network was given.

  Returns:
    (params, text [B, ...], negative [B, ...], seeds [B], num_steps, w, ...) ->
    an iterator over the steps. A step is uint8 images [B, H_r, H_r, 3], coarse
    to fine, of the predicted x0. The last step has the samples, equal to those
    of `make_sample_fn` up to rounding. With `with_inputs` a step is a pair: the
    images of x_t, and those. The steps of a cascade are those of its finest
    level, before which the others are sampled. `num_steps` and the guidance
    weight `w` may change without compiling again, but for a weight of 1, which
    needs half of the network's work. Further arguments are
    `earlier` and `part` of `Sampler.prepare`.
  """
  options = sharding.compiler_options(sampler.mesh)
  begin, proceed = (
    jax.jit(
      sampler.prepare,
      in_shardings=_in_shardings(sampler, param_shardings, continues),
      compiler_options=options,
    )
    for continues in (False, True)
  )
  sample_coarser = _make_coarser_steps(sampler, param_shardings)
  start = jax.jit(sampler.start, compiler_options=options)
  guided, plain = (
    jax.jit(step, donate_argnums=2, compiler_options=options)
    for step in (sampler.step, functools.partial(sampler.step, w=1.0))
  )
  to_uint8 = jax.jit(
    sampler.to_uint8, out_shardings=sharding.replicated(sampler.mesh)
  )

  def sample_steps(params, text, negative, seeds, num_steps, w, *earlier):
    step = functools.partial(guided, w=np.float32(w))
    if guidance.is_none(w):
      negative, step = text, plain
    coarse = sample_coarser(params, text, negative, seeds, num_steps, w)
    if coarse:
      earlier = None, np.uint32(0), coarse[-1]
    prepare = proceed if earlier else begin
    placed = _place(sampler.mesh, text, negative, seeds)
    prepared = prepare(params, *placed, *earlier)
    steps = list(zip(*samplers.steps(num_steps, sampler.schedule)))
    _, _, t, _ = steps[0]
    # Two separate buffers, since both are donated.
    state = start(prepared, t), start(prepared, t)
    for one in steps:
      # Before its donation.
      noisy = (*coarse, *to_uint8(params, state[0])) if with_inputs else None
      x_t, x0 = state = step(params, prepared, state, one)
      images = *coarse, *to_uint8(params, x_t if one is steps[-1] else x0)
      yield (noisy, images) if with_inputs else images

  return sample_steps


def _make_coarser_steps(
  sampler: Sampler, param_shardings: Any
) -> Callable[..., tuple[jax.Array, ...]]:
  """Jits the coarser levels of a cascade, step by step.

  Returns:
    With the arguments of `make_sample_steps`, the samples of these levels;
    none without a cascade.
  """
  if sampler.coarser is None:
    return lambda *_: ()
  sample_steps = make_sample_steps(
    sampler.coarser, sampler.coarser_params(param_shardings)
  )

  def sample_coarser(params, *arguments):
    for images in sample_steps(sampler.coarser_params(params), *arguments):
      # With many steps in flight, collectives on a CPU have deadlocked.
      last = jax.block_until_ready(images)
    return last

  return sample_coarser
