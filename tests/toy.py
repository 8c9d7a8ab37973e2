"""Runs of the real command on recipes that compile fast."""

import functools
import hashlib
import inspect
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mdm_jax.builders.autoencoder_stage import AutoencoderStage
from mdm_jax.builders.config import _ADDED, stage_directory, write_config
from mdm_jax.builders.stage import Stage
from mdm_jax.builders.text import load_frozen
from mdm_jax.checkpoint import restore
from mdm_jax.checkpoint.manager import Checkpoints
from mdm_jax.runtime import sharding
from mdm_jax.training import loop


def shrink(config):
  """Makes the network of a smoke run as small as can be: it compiles faster."""
  config.text.num_layers = 0
  config.eval.loss_every = 0
  for level, channels in zip(config.model.levels, ((8,), (8, 8))):
    # A transformer's blocks are its depth, and it has at least one.
    zeros = (0,) * len(channels)
    depth = (1,) if level.kind == 'transformer' else zeros
    level.update(channels=channels, num_blocks=depth, attention_layers=zeros)
    if any(level.frame_attention):
      level.frame_attention = (0,) * (len(channels) - 1) + (1,)
  return config


def recipe(num_stages: int, steps: int, **changes) -> str:
  """The text of a recipe of one or two stages, of 8 and 8+16 px.

  Args:
    num_stages: 1 or 2.
    steps: of each.
    changes: values of keys; a dot in a key is two underscores.
  """
  changes = {key.replace('__', '.'): value for key, value in changes.items()}
  return f"""
from configs import common

{inspect.getsource(shrink)}

def get_config():
  config = common.get_config()
  config.model.levels = [common.level(8), common.level(16)][:{num_stages}]
  config.stages = [common.stage('8', 1), common.stage('16', 2)][:{num_stages}]
  config = shrink(common.smoke(config))
  for stage in config.stages:
    stage.update(steps={steps}, batch_size=8)
  config.eval.num_prompts = 8
  config.update_from_flattened_dict({changes!r})
  return config
"""


def run(config, workdir, count_work: bool = False) -> None:
  """What the command does, on one device: a mesh is tested elsewhere.

  Args:
    config: of the run.
    workdir: of the run.
    count_work: whether to estimate the time of later stages as the command
      does, which traces the networks of all stages; tested elsewhere.
  """
  loop.setup(config, str(workdir))
  mesh = sharding.make_mesh(config.mesh, devices=jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    if not count_work:
      for kind in (Stage, AutoencoderStage):
        patch.setattr(kind, 'forward_flops', lambda *given: None)
    loop.train(config, str(workdir), mesh, load_frozen(config, mesh))


def digest(workdir, config, index: int) -> str:
  """SHA-256 of the contents of a stage's last checkpoint."""
  directory = stage_directory(workdir, config, index)
  sha = hashlib.sha256()
  for key in ('step', 'params', 'ema', 'opt_state', 'guard', 'lags'):
    item = restore.restore_item(directory, None, key)
    for path, leaf in jax.tree_util.tree_leaves_with_path(item):
      sha.update(jax.tree_util.keystr(path).encode())
      sha.update(np.ascontiguousarray(leaf).tobytes())
  return sha.hexdigest()


def stop_at(step: int, config, workdir, stage: str = '8') -> None:
  """A run that is interrupted when it is about to save a step."""
  save = Checkpoints.save

  def interrupt(self, at, state, extra, force=False):
    if at == step + 1 and extra.get('stage') == stage:
      raise KeyboardInterrupt
    return save(self, at, state, extra, force)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Checkpoints, 'save', interrupt)
    with pytest.raises(KeyboardInterrupt):
      run(config, workdir)


def stage_anew(workdir, target, config, index: int) -> None:
  """A copy of a run in which a stage, and all that follows, has not begun."""
  shutil.copytree(workdir, target)
  for later in range(index, len(config.stages)):
    shutil.rmtree(stage_directory(target, config, later))
  shutil.rmtree(target / 'eval')


def without(values, key: str):
  """A config as JSON without a key; [] leads into each section of a list."""
  if isinstance(values, list):
    return [without(part, key) for part in values]
  name, _, below = key.partition('.')
  name = name.removesuffix('[]')
  rest = {other: x for other, x in values.items() if other != name}
  return rest | {name: without(values[name], below)} if below else rest


def make_older(workdir) -> None:
  """Takes from a run's config the keys that it had not always."""
  path = pathlib.Path(workdir, 'config.json')
  config = without(json.loads(path.read_text()), 'version')
  path.write_text(json.dumps(functools.reduce(without, _ADDED, config)))


def save_run(workdir, config, index: int, step: int, params) -> None:
  """What commands need of a run: its config and a stage's average."""
  write_config(workdir, json.loads(config.to_json()))
  checkpoints = Checkpoints(
    stage_directory(workdir, config, index),
    save_interval=1,
    max_to_keep=1,
  )
  checkpoints.save(step, {'ema': params}, {}, force=True)
  checkpoints.close()
