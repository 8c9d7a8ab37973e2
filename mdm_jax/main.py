"""Trains a Matryoshka diffusion model, stage by stage.

python -m mdm_jax.main --config=configs/shapes_64.py
"""

import pathlib
import sys
import time
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from mdm_jax import cpu

_BEGAN = time.monotonic()
_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'A recipe, such as configs/shapes_64.py; ":smoke" appended '
  'to it makes a toy-sized run. --config.KEY=VALUE changes one key.',
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Receives checkpoints, samples and metrics; the same one '
  'continues a run. Default: runs/<name of the config>.',
)
_DISTRIBUTED = flags.DEFINE_boolean(
  'distributed',
  False,
  'This is one of several processes that train '
  'together. Cloud TPU, GKE, Slurm and Open MPI say which one; elsewhere '
  'give the next three.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'All of them.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Of this one, from 0.', lower_bound=0
)
_ARRIVAL = flags.DEFINE_integer(
  'arrival',
  300,
  'Seconds to wait for the other processes. Those that are '
  'missing are named every 30 s, and when it ends.',
  lower_bound=1,
)
_HEARTBEAT = flags.DEFINE_integer(
  'heartbeat',
  100,
  'Seconds without a sign of life after which a process '
  'counts as dead and the others end.',
  lower_bound=1,
)


def main(argv: list[str]) -> None:
  """Flags to one call."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  from mdm_jax import interrupt

  interrupt.exit_on_signals()
  # Slow to import, and not needed for --help.
  import jax

  from mdm_jax import (
    checkpoint,
    checks,
    compilation_cache,
    guard,
    metrics,
    processes,
    replicas,
    train,
  )
  from mdm_jax.data.pipeline import DataError

  config = _CONFIG.value
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  path, _, mode = name.partition(':')
  workdir = _WORKDIR.value or 'runs/' + '_'.join(
    filter(None, [pathlib.Path(path).stem, mode])
  )
  metrics.setup_logging()
  compilation_cache.enable()
  try:
    cpu.use_cores(checks.parts_of_batches(config))
    if _DISTRIBUTED.value:
      processes.join(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        arrival=_ARRIVAL.value,
        heartbeat=_HEARTBEAT.value,
      )
      if jax.process_index():  # One of them tells.
        logging.set_verbosity(logging.WARNING)
    mesh, frozen = train.setup(config, workdir)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')
  with processes.ending_together(_HEARTBEAT.value):
    try:
      finished = train.train(config, workdir, mesh, frozen, _BEGAN)
    except (
      checkpoint.CheckpointError,
      guard.Diverged,
      DataError,
      replicas.ReplicasDiffer,
    ) as error:
      processes.end(f'error: {error}')
  interrupt.ignore_signals()
  processes.end(0 if finished else interrupt.EXIT_CODE)


def _parse_flags(argv: list[str]) -> list[str]:
  """Absl's parser, with one line where it has a traceback for the user."""
  try:
    rest = app.parse_flags_with_usage(argv)
    _CONFIG.value.lock()  # Raises what kept the file from being read.
    return rest
  except OSError as error:
    sys.exit(f'error: {str(error).splitlines()[-1].strip()}')
  except (AttributeError, LookupError) as error:
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name == 'get_config' for frame in frames):
      raise  # A mistake in the recipe: the traceback says where.
    # Config dictionaries wrap the name in quotes, twice.
    reason = str(error).strip('"\'')
    changes = [word for word in argv if word.startswith('--config.')]
    sys.exit(
      f'error: {" ".join(changes)}: no such key ({reason}); '
      'configs/common.py has all keys.'
    )


if __name__ == '__main__':
  cpu.use_huge_pages()
  flags.mark_flag_as_required('config')
  app.run(main, flags_parser=_parse_flags)
