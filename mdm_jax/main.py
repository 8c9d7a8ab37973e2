"""Trains a Matryoshka diffusion model, stage by stage.

python -m mdm_jax.main --config=configs/shapes_64.py
"""

import contextlib
import os
import sys
import time

from absl import flags, logging
from ml_collections import config_flags

from mdm_jax.builders import recipes
from mdm_jax.runtime import command, cpu, flag_types, value_types

_BEGAN = time.monotonic()
_CONFIG = recipes.define(
  'Recipe: a file such as configs/shapes_64.py, or the name of a shipped one '
  'such as shapes_64; ":smoke" appended to it makes a toy-sized run. '
  '--config.KEY=VALUE changes one key.',
)
_WORKDIR = flag_types.define(
  'workdir',
  None,
  value_types.NEW_RUN,
  'Directory for checkpoints, samples and metrics; the same one continues a '
  'run. Default: runs/<name of the config>.',
)
_PRINT_CONFIG = flags.DEFINE_boolean(
  'print_config',
  False,
  'Print the configuration instead of training: all keys and values, which of '
  'them the command line changes, and how they differ from the defaults and '
  'from the run in --workdir.',
)
_DISTRIBUTED = flags.DEFINE_boolean(
  'distributed',
  False,
  'Train together with other processes. Cloud TPU, GKE, Slurm and Open MPI '
  'tell how to find them; elsewhere give --coordinator, --num_processes and '
  '--process_id.',
)
_COORDINATOR = flag_types.define(
  'coordinator',
  None,
  value_types.ADDRESS,
  'Address of process 0, as HOST:PORT.',
)
_NUM_PROCESSES = flag_types.integer(
  'num_processes', None, 1, 10**6, 'Number of processes.'
)
_PROCESS_ID = flag_types.integer(
  'process_id', None, 0, 10**6, 'Index of this process, from 0.'
)
_ARRIVAL = flag_types.integer(
  'arrival',
  300,
  1,
  10**6,
  'Seconds to wait for the other processes to start. Missing ones are logged '
  'every 30 s, and at the end.',
)
_HEARTBEAT = flag_types.integer(
  'heartbeat',
  100,
  1,
  10**6,
  'Seconds after which a silent process counts as dead, and the others end.',
)


def _check_is_distributed() -> None:
  """Raises ValueError if flags of several processes are given to one."""
  if _DISTRIBUTED.value:
    return
  for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID, _ARRIVAL, _HEARTBEAT):
    if flags.FLAGS[flag.name].present:
      raise ValueError(f'--{flag.name} needs --distributed: give both.')


def main(_: list[str]) -> None:
  """Trains the run that the flags describe."""
  config = _CONFIG.value
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  path, *mode = recipes.split(name)
  # A recipe may have a mode of any name.
  name = '_'.join(
    filter(None, [os.path.splitext(os.path.basename(path))[0], *mode])
  )
  workdir = _WORKDIR.value or 'runs/' + name.replace('/', '_')
  if _PRINT_CONFIG.value:
    recipes.print_config(config, workdir)
    return
  # Slow to import, and not needed for --help.
  import jax

  from mdm_jax.builders.check_levels import parts_of_batches
  from mdm_jax.checkpoint import saved_steps
  from mdm_jax.data.pipeline import DataError
  from mdm_jax.optim import skip_step
  from mdm_jax.report import console
  from mdm_jax.runtime import (
    compilation_cache,
    distributed,
    preemption,
    replica_check,
  )
  from mdm_jax.training import loop

  console.setup_logging()
  compilation_cache.enable()
  with contextlib.ExitStack() as open_run:
    try:
      cpu.use_cores(parts_of_batches(config))
      _check_is_distributed()
      if _DISTRIBUTED.value:
        distributed.join(
          _COORDINATOR.value,
          _NUM_PROCESSES.value,
          _PROCESS_ID.value,
          arrival=_ARRIVAL.value,
          heartbeat=_HEARTBEAT.value,
        )
        if jax.process_index():  # Process 0 logs for all.
          logging.set_verbosity(logging.WARNING)
      open_run.enter_context(distributed.writing_alone(workdir))
      mesh, frozen = loop.setup(config, workdir)
    except (ValueError, OSError) as error:
      sys.exit(f'error: {error}')
    open_run.enter_context(distributed.naming_the_dead(_HEARTBEAT.value))
    try:
      finished = loop.train(config, workdir, mesh, frozen, _BEGAN)
    except (
      saved_steps.CheckpointError,
      skip_step.Diverged,
      DataError,
      replica_check.ReplicasDiffer,
    ) as error:
      sys.exit(f'error: {error}')
  sys.exit(0 if finished else preemption.EXIT_CODE)


if __name__ == '__main__':
  cpu.use_huge_pages()
  command.run(main, recipes.parse_flags)
