"""Trains a Matryoshka diffusion model, stage by stage.

python -m mdm_jax.main --config=configs/shapes_64.py
"""

import contextlib
import pathlib
import sys
import time

from absl import app, flags, logging
from ml_collections import config_flags

from mdm_jax.builders import recipes
from mdm_jax.runtime import command, cpu

_BEGAN = time.monotonic()
_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Recipe: a file such as configs/shapes_64.py, or the name of a shipped one '
  'such as shapes_64; ":smoke" appended to it makes a toy-sized run. '
  '--config.KEY=VALUE changes one key.',
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Directory for checkpoints, samples and metrics; the same one continues a '
  'run. Default: runs/<name of the config>.',
)
_DISTRIBUTED = flags.DEFINE_boolean(
  'distributed',
  False,
  'Train together with other processes. Cloud TPU, GKE, Slurm and Open MPI '
  'tell how to find them; elsewhere give --coordinator, --num_processes and '
  '--process_id.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'Address of process 0, as HOST:PORT.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Index of this process, from 0.', lower_bound=0
)
_ARRIVAL = flags.DEFINE_integer(
  'arrival',
  300,
  'Seconds to wait for the other processes to start. Missing ones are logged '
  'every 30 s, and at the end.',
  lower_bound=1,
)
_HEARTBEAT = flags.DEFINE_integer(
  'heartbeat',
  100,
  'Seconds after which a silent process counts as dead, and the others end.',
  lower_bound=1,
)


def main(argv: list[str]) -> None:
  """Trains the run that the flags describe."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  # Slow to import, and not needed for --help.
  import jax

  from mdm_jax.builders.check import parts_of_batches
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

  config = _CONFIG.value
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  path, _, mode = name.partition(':')
  workdir = _WORKDIR.value or 'runs/' + '_'.join(
    filter(None, [pathlib.Path(path).stem, mode])
  )
  console.setup_logging()
  compilation_cache.enable()
  with contextlib.ExitStack() as open_run:
    try:
      cpu.use_cores(parts_of_batches(config))
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
    except (ValueError, FileNotFoundError) as error:
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
  flags.mark_flag_as_required('config')
  command.run(main, flags_parser=recipes.parse_flags)
