"""Progressive growing: which stage is next, and its network's first weights."""

from collections.abc import Sequence
from typing import Any

from etils import epath
from flax import traverse_util

from mdm_jax.checkpoint import saved_steps


def next_stage(directories: Sequence[epath.Path]) -> int:
  """Index of the stage to train now; the number of stages if all are finished.

  Stages before one that has a checkpoint count as finished: weights may have
  been imported into a later stage.
  """
  for index in reversed(range(len(directories))):
    if saved_steps.finished_step(directories[index]) is not None:
      return index + 1
    if saved_steps.latest_step(directories[index]) is not None:
      return index
  return 0


def grow(fresh: Any, trained: Any) -> Any:
  """Parameters of a larger network with the smaller, trained one inside it.

  The new level acts on the coarser ones through zero-initialised adapters, so
  that at first their output equals that of the trained network, bit for bit
  (MDM, arXiv 2310.15111, section 3.3). Layers of attention between frames,
  which a stage of images does not have, begin with an output of zero too.

  Args:
    fresh: initialised parameters of the larger network.
    trained: parameters of the smaller one.

  Returns:
    `trained` where it has a parameter, else `fresh`.

  Raises:
    CheckpointError: a trained parameter has no place or another shape, or a
      parameter outside the new levels and layers is missing. The message names
      them.
  """
  fresh = traverse_util.flatten_dict(fresh, sep='/')
  trained = traverse_util.flatten_dict(trained, sep='/')
  problems = [f'{name} has no place' for name in trained.keys() - fresh.keys()]
  problems += [
    f'{name} is {trained[name].shape}, not {fresh[name].shape}'
    for name in trained.keys() & fresh.keys()
    if trained[name].shape != fresh[name].shape
  ]
  blocks = {_block(name) for name in trained}
  problems += [
    f'{name} is missing'
    for name in fresh.keys() - trained.keys()
    if _block(name) in blocks and '/frame_attention_' not in name
  ]
  if problems:
    raise saved_steps.CheckpointError(
      'The last stage does not fit into this one: '
      + '; '.join(sorted(problems))
    )
  return traverse_util.unflatten_dict({**fresh, **trained}, sep='/')


def _block(name: str) -> str:
  """'unet/level_1/conv_in/kernel' -> 'unet/level_1'."""
  return '/'.join(name.split('/')[:2])
