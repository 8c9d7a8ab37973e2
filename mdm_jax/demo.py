"""A web page that samples images with a trained model.

  python -m mdm_jax.demo --workdir=runs/shapes_64

It needs Gradio: pip install -r requirements-demo.txt
"""

import importlib.util
import os
import sys
import threading

from absl import flags, logging

from mdm_jax.inference import run_flags
from mdm_jax.runtime import command, cpu, flag_types, value_types

_PORT = flag_types.integer('port', 7860, 1, 65535, 'Port of the page.')
_HOST = flag_types.define(
  'host',
  '127.0.0.1',
  value_types.Text('a host name or address', r'[\w.:%-]+', 255),
  'Address to listen at; any but those of this machine itself needs '
  '--password_file.',
)
_PASSWORDS = flag_types.define(
  'password_file',
  None,
  value_types.Path('text'),
  'File with a line NAME:PASSWORD for each user.',
)
_MAX_WAITING = flag_types.integer(
  'max_waiting',
  4,
  0,
  10**4,
  'Requests that may wait for the one being sampled.',
)


def main(_: list[str]) -> None:
  """Restores a model, serves the page, and compiles meanwhile."""
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
  from mdm_jax.inference import session, weights
  from mdm_jax.report import console
  from mdm_jax.runtime import compilation_cache, preemption

  console.setup_logging()
  compilation_cache.enable()
  try:
    opened = session.open_run(
      run_flags.workdir(), any_prompt=True, **run_flags.options()
    )
    model = opened.restore()
    others = {
      saved: opened.of(saved).restore
      for saved in weights.saved_weights(opened.config, opened.workdir)
    }
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  from mdm_jax.serving.model_card import make_model_card
  from mdm_jax.serving.page import launch, make_page
  from mdm_jax.serving.queue import SampleQueue

  queue = SampleQueue(model, _MAX_WAITING.value, others, run_flags.moved())
  listeners = access.Listeners()
  page = make_page(queue, listeners, make_model_card(model))
  # It never waits for a compilation.
  preemption.StopHandler(queue.close, code=0)
  try:
    _, address, _ = launch(page, listeners, host, port, users)
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
