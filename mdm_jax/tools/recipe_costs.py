"""What a recipe costs: FLOPs and seconds of its steps, and its parameters."""

from collections.abc import Mapping
import copy
import hashlib
import json
import sys
import tempfile
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mdm_jax.builders.config import costs_and_learning
from mdm_jax.builders.stage import make_stage
from mdm_jax.models import target
from mdm_jax.report import console
from mdm_jax.runtime import files, peaks, sharding
from mdm_jax.tools import compile_ahead, run_commands

_TIMED = 10  # steps


def digest(config: ConfigDict) -> str:
  """SHA-256 of the keys that costs depend on, by which they are known again."""
  keys = costs_and_learning(json.loads(config.to_json()))
  text = json.dumps(keys, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def count(config: ConfigDict) -> dict[str, Any]:
  """Counts FLOPs as if for one CPU; nothing is compiled.

  What rematerialisation computes again, to save memory, does not count, nor do
  products with the zeros of packed levels.

  Args:
    config: of the recipe, which has been checked.

  Returns:
    'flops': by stage, those of a training step: forward, backward and update.
    'sampling_flops': see `sampling_flops`.
    'parameters': number of trained parameters of the last stage, and of the
      earlier ones that it needs.
  """
  config = copy.deepcopy(config)  # Copies the levels too.
  for level in config.model.levels:
    level.update(remat='none', lanes=1)
  # A CPU's program calls no libraries, whose work would not be counted.
  with target.planning('cpu'):
    flops = {}
    for index in range(len(config.stages)):
      stage = make_stage(config, index)
      traced = compile_ahead.trace_train(stage, sharding.one_cpu())
      flops[stage.name] = peaks.count_flops(traced)
    shapes = stage.param_shapes() | stage.earlier_params(
      lambda each: each.param_shapes()
    )
  return {
    'flops': flops,
    'sampling_flops': sampling_flops(config),
    'parameters': console.num_parameters(shapes),
  }


def sampling_flops(config: ConfigDict) -> float:
  """FLOPs of a sampling step for one image, of all networks that it calls.

  It is the mean of the recipe's steps. Guidance calls a network twice in a
  step, within an interval only in that share of the steps; Heun's method does
  so in all but the last. What is done once for all steps, such as the encoding
  of the prompt, does not count.

  Args:
    config: of the recipe, whose last stage is of diffusion.
  """

  def count_step(**changes):
    one, two = (
      peaks.count_flops(
        compile_ahead.trace_sample(stage, mesh, num_steps=num_steps, **changes)
      )
      for num_steps in (1, 2)
    )
    return (two - one) / config.eval.batch_size

  with target.planning('cpu'):
    # A cascade's last stage samples all levels, each in so many steps.
    stage = make_stage(config, len(config.stages) - 1)
    mesh = sharding.one_cpu()
    # Without an interval, as of a branch the more expensive side would count.
    flops = count_step(guidance_interval=(0.0, 1.0))
    share = stage.make_sampler(mesh).guided_share
    if share < 1:
      plain = count_step(guidance=1.0)
      flops = plain + share * (flops - plain)
  if config.sampler.name == 'heun':  # Counted as if the last were like all.
    flops *= 1 - 0.5 / config.sampler.num_steps
  return flops


def measure_seconds(
  name: str,
  words: list[str],
  config: ConfigDict,
  group: Mapping[str, str],
) -> dict[str, float]:
  """Times a few training steps of each stage on this machine's devices.

  `mdm_jax.tools.bench` does it in processes of its own, so that the devices are
  free afterwards.

  Args:
    name: of the recipe.
    words: the flags of its config.
    config: of the recipe.
    group: environment variables, see `run_commands.device_groups`.

  Returns:
    The median of the seconds of a step, by stage.

  Raises:
    ValueError: the command has failed.
  """
  found = {}
  for index, stage in enumerate(config.stages):
    with tempfile.TemporaryDirectory() as directory:
      path = epath.Path(directory) / 'bench.json'
      command = [
        *(sys.executable, '-m', 'mdm_jax.tools.bench', *words),
        *(f'--stage={index}', '--only=train', f'--steps={_TIMED}'),
        f'--output={path}',
      ]
      jobs = run_commands.Jobs([(name, [command])], [group])
      for ended in jobs.run():
        if ended.code:
          line = ended.line.removeprefix('error: ')
          raise ValueError(f"--recipe={name}, stage '{stage.name}': {line}")
      found[stage.name] = files.read_json(path)['train']['step_seconds']
  return found


def read(path: epath.Path) -> dict[str, dict[str, Any]]:
  """Costs that were counted before, by recipe; none if there is no such file.

  If it cannot be read, they are counted again.
  """
  if not path.exists():
    return {}
  try:
    return files.read_json(path)
  except files.UnreadableFile as error:
    logging.warning('%s: it is counted again.', error)
    return {}
