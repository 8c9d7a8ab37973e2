"""Restores weights of a run: the EMA, the best EMA, or a post-hoc EMA."""

import functools
import hashlib
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.config import AUTOENCODER, stage_directory
from mdm_jax.checkpoint import contents, manifest, restore, saved_steps
from mdm_jax.optim import post_hoc_ema
from mdm_jax.runtime import files, sharding
from mdm_jax.steps.state import Params

_REMEDIES = {
  'checkpoints': 'train longer first',
  'best': 'set eval.every and eval.best_metric when training',
  'averages': 'set averages.widths when training',
}


class Weights(NamedTuple):
  """EMA weights of a stage.

  Attributes:
    index: of the stage.
    step: of the stage.
    params: sharded over a mesh, or in host memory.
    fingerprint: hash of the checkpoint's files; None without a manifest.
    sigma_rel: width of a post-hoc EMA, or None.
    best: whether they were the best by `eval.best_metric`.
  """

  index: int
  step: int
  params: Params
  fingerprint: str | None = None
  sigma_rel: float | None = None
  best: bool = False

  @property
  def ema(self) -> str:
    """Which EMA they are, in words."""
    return _ema(self.sigma_rel, self.best)


class SavedWeights(NamedTuple):
  """EMA weights that a run has on disk, see `saved_weights`.

  Attributes:
    stage: name of the stage.
    step: of the stage.
    sigma_rel, best: which EMA, as for `restore_weights`.
  """

  stage: str
  step: int
  sigma_rel: float | None = None
  best: bool = False

  @property
  def ema(self) -> str:
    """Which EMA they are, in words."""
    return _ema(self.sigma_rel, self.best)


def saved_weights(
  config: ConfigDict, workdir: str, stage: str | None = None
) -> list[SavedWeights]:
  """Lists the EMA weights of a run, by the names of its directories.

  For each stage of diffusion, newest first: the EMA at the newest checkpoint,
  the best EMA, and the post-hoc EMAs whose widths were tracked in training (any
  other width can be reconstructed from them). The first is what
  `restore_weights` takes by default. A kind of which only damaged checkpoints
  are left is not listed.

  Args:
    config: of the run.
    workdir: of the run.
    stage: name of the only stage to look for; None for all.

  Raises:
    ValueError: there is no such stage.
  """
  widths = config.averages.widths
  found = []
  for index in _indices(config, stage):
    if config.stages[index].kind == AUTOENCODER:
      continue
    for kind, emas in (
      ('checkpoints', [(None, False)]),
      ('best', [(None, True)]),
      ('averages', [(width, False) for width in widths]),
    ):
      try:
        step = saved_steps.latest_step(
          stage_directory(workdir, config, index, kind)
        )
      except saved_steps.CheckpointError as error:
        logging.warning('%s', error)
        continue
      if step is not None:
        name = config.stages[index].name
        found += [SavedWeights(name, step, *ema) for ema in emas]
  return found


def restore_weights(
  config: ConfigDict,
  workdir: str,
  mesh: Mesh | None = None,
  *,
  stage: str | None = None,
  sigma_rel: float | None = None,
  best: bool = False,
) -> Weights:
  """Restores EMA weights of a stage.

  Args:
    config: of the run.
    workdir: of the run.
    mesh: devices to shard the weights over; None for host memory.
    stage: name of the stage; None for the newest one that has any.
    sigma_rel: width of a post-hoc EMA, reconstructed at the newest snapshot;
      see `post_hoc_ema`. None for the EMA with the optimizer's decay.
    best: the EMA that was best by `eval.best_metric`, not the last one.

  Raises:
    FileNotFoundError: nothing (of that kind) has been saved yet.
    ValueError: there is no such stage, both a width and the best are asked for,
      or the width is out of range.
    CheckpointError: the checkpoints are damaged.
  """
  if best and sigma_rel is not None:
    raise ValueError(
      'sigma_rel and best exclude each other: only the EMA that was the best '
      'has been saved, not its snapshots.'
    )
  kind = 'best' if best else 'checkpoints' if sigma_rel is None else 'averages'
  for index in _indices(config, stage):
    directory = stage_directory(workdir, config, index, kind)
    if saved_steps.latest_step(directory) is not None:
      break
  else:
    whose = '' if stage is None else f' of stage {stage!r}'
    raise FileNotFoundError(
      f'{workdir} has no {kind}{whose} yet: {_REMEDIES[kind]}.'
    )
  if sigma_rel is not None:
    step, params, fingerprint = _reconstruct(directory, sigma_rel)
    if mesh:
      params = sharding.place(
        params, sharding.tree_shardings(params, mesh, config.sharding_rules)
      )
    return Weights(index, step, params, fingerprint, sigma_rel=sigma_rel)

  def read(step):
    fingerprint = manifest.fingerprint(directory / str(step))
    shardings = mesh and sharding.tree_shardings(
      restore.abstract_item(directory, step, 'ema'), mesh, config.sharding_rules
    )
    params = restore.restore_item(directory, step, 'ema', shardings)
    return Weights(index, step, params, fingerprint, best=best)

  return restore.from_newest(directory, read)


def restore_earlier(
  stage: BaseStage, workdir: str, mesh: Mesh | None = None
) -> Params:
  """The EMAs of earlier stages, see `BaseStage.earlier_params`.

  Args:
    stage: to train, or to sample from.
    workdir: of the run.
    mesh: the devices; None for host memory.

  Raises:
    CheckpointError: an earlier stage has no good weights.
  """

  def params_of(each):
    try:
      return restore_weights(each.config, workdir, mesh, stage=each.name).params
    except FileNotFoundError as error:
      raise saved_steps.CheckpointError(
        f'{each.directory(workdir)} has no checkpoint, which '
        f'{stage.title} needs: restore it from a backup.'
      ) from error

  return stage.earlier_params(params_of)


def _add(factor: float, total: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Adds `factor * x` in place."""
  return np.add(total, np.multiply(factor, x, dtype=np.float64), out=total)


def _ema(sigma_rel: float | None, best: bool) -> str:
  if sigma_rel is not None:
    return f'post-hoc EMA, sigma_rel {sigma_rel}'
  return 'best EMA' if best else 'EMA'


def _indices(config: ConfigDict, stage: str | None) -> list[int]:
  """Stages in which to look for weights, newest first."""
  names = [each.name for each in config.stages]
  if stage is None:
    return [*reversed(range(len(names)))]
  if stage not in names:
    raise ValueError(
      f'The run has no stage {stage!r}: give one of '
      f'{", ".join(map(repr, names))}.'
    )
  return [names.index(stage)]


def _reconstruct(
  directory: epath.Path, sigma_rel: float
) -> tuple[int, Params, str]:
  """A post-hoc EMA at the newest snapshot.

  Returns:
    Its step, host arrays, and what identifies the snapshots that it is of.
  """
  post_hoc_ema.exponent(sigma_rel)  # Raises before anything is read.
  for _ in range(restore.TRIES):
    steps = saved_steps.good_steps(directory)
    try:
      return _reconstruct_from(directory, steps, sigma_rel)
    except contents.READ_ERRORS:
      # Another result without the snapshots that somebody has removed.
      if saved_steps.good_steps(directory) == steps:
        raise
  raise saved_steps.CheckpointError(
    f'{directory}: snapshots are being removed; try again.'
  )


def _reconstruct_from(
  directory: epath.Path, steps: list[int], sigma_rel: float
) -> tuple[int, Params, str]:
  snapshots = {}
  for step in steps:
    extra = restore.read_extra(directory, step)
    if not _is_snapshot(extra):
      logging.warning(
        '%s is no snapshot: it is not used.', directory / str(step)
      )
      continue
    # A snapshot after skipped steps alone has as many updates as the one
    # before, or none: each number of updates counts once.
    if count := extra['updates']:
      snapshots |= {(name, count): step for name in extra['widths']}
  if not snapshots:
    raise saved_steps.CheckpointError(
      f'{directory} has no intact snapshot: restore one from a backup.'
    )
  names, counts = zip(*snapshots)
  factors = post_hoc_ema.coefficients(
    list(map(float, names)), counts, sigma_rel, max(counts)
  )
  total = None
  for step, name, factor in zip(snapshots.values(), names, factors):
    params = restore.restore_item(directory, step, name)
    if total is None:
      total = jax.tree.map(lambda x: np.zeros(x.shape), params)
    total = jax.tree.map(functools.partial(_add, factor), total, params)
    del params  # Before the next ones are read.
  logging.info(
    'Post-hoc EMA of sigma_rel %g after %d updates, from %d snapshots.',
    sigma_rel,
    max(counts),
    len(snapshots),
  )
  used = sorted(set(snapshots.values()))
  digest = hashlib.blake2b(digest_size=8)
  for step in used:
    digest.update(str(manifest.fingerprint(directory / str(step))).encode())
  return used[-1], jax.tree.map(np.float32, total), digest.hexdigest()


def _is_snapshot(extra: dict[str, Any]) -> bool:
  """Whether these are the values that are saved with a snapshot."""
  widths = extra.get('widths')
  return (
    files.is_count(extra.get('updates'))
    and isinstance(widths, list)
    and all(isinstance(name, str) for name in widths)
  )
