"""A web page that samples images with a trained model.

  python -m mdm_jax.demo --workdir=runs/shapes_64

It needs Gradio: pip install -r requirements-demo.txt
"""

import importlib.util
import os
import sys
import threading

from absl import app, flags, logging

from mdm_jax.inference import run_flags
from mdm_jax.runtime import command, cpu

_PORT = flags.DEFINE_integer(
  'port', 7860, 'Port of the page.', lower_bound=1, upper_bound=65535
)
_HOST = flags.DEFINE_string(
  'host',
  '127.0.0.1',
  'Address to listen at; any but those of this machine itself needs '
  '--password_file.',
)
_PASSWORDS = flags.DEFINE_string(
  'password_file', None, 'File with a line NAME:PASSWORD for each user.'
)
_MAX_WAITING = flags.DEFINE_integer(
  'max_waiting',
  4,
  'Requests that may wait for the one being sampled.',
  lower_bound=0,
)


def main(argv: list[str]) -> None:
  """Restores a model, serves the page, and compiles meanwhile."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  from mdm_jax.serving import access

  # Turns Gradio's telemetry off; it is read when Gradio is imported.
  os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
  host, port = _HOST.value, _PORT.value
  try:
    users = None
    if _PASSWORDS.value:
      users = access.read_passwords(_PASSWORDS.value)
    if not users and not access.is_loopback(host):
      raise ValueError(
        f'--host={host} is open to others: give --password_file=FILE '
        'with a line NAME:PASSWORD for each user, or keep 127.0.0.1.'
      )
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  if importlib.util.find_spec('gradio') is None:
    sys.exit(
      'error: the demo needs Gradio: pip install -r requirements-demo.txt'
    )
  # Slow to import, and not needed for --help.
  from mdm_jax.inference import session
  from mdm_jax.report import console
  from mdm_jax.runtime import compilation_cache, preemption

  console.setup_logging()
  compilation_cache.enable()
  try:
    model = session.open_run(
      run_flags.workdir(), any_prompt=True, **run_flags.options()
    ).restore()
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')
  from mdm_jax.serving.page import launch, make_page
  from mdm_jax.serving.queue import SampleQueue

  queue = SampleQueue(model, _MAX_WAITING.value)
  page = make_page(queue)
  # It never waits for a compilation.
  preemption.StopHandler(queue.close, code=0)
  try:
    _, address, _ = launch(page, host, port, users)
  except OSError:
    sys.exit(
      f'error: {host}:{port} is taken, or not of this machine: give another '
      '--port or --host.'
    )
  logging.info('The page is at %s; Ctrl-C ends it.', address)
  queue.warm_up()
  threading.Event().wait()  # A signal ends it.


if __name__ == '__main__':
  cpu.use_huge_pages()
  flags.mark_flag_as_required('workdir')
  command.run(main)
