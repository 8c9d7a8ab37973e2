#!/usr/bin/env python3
"""Runs a training command, again and again, until training is finished.

  launch/supervise.py --workdir=runs/mine -- \\
    python -m mdm_jax.main --config=configs/shapes_64.py --workdir=runs/mine

Exit code 0 of the command means that training is finished. After 75, which
means that the run was stopped and can be continued, the command is started
again at once. Any other exit code is a crash; the command is started again
after a pause that doubles with each crash. After --attempts consecutive
attempts without a newer checkpoint in WORKDIR/checkpoints it gives up and
returns the command's exit code.

SIGTERM, Ctrl-C and SIGHUP are passed on to the command, as are SIGQUIT,
SIGUSR1, SIGUSR2 and SIGXCPU; it is then not started again. Those that are
ignored when this script starts, as SIGHUP under nohup, stay ignored. The
command never outlives this script: if the script is killed by SIGKILL, the
command receives SIGTERM, and saves a checkpoint. Both hold for all processes of
its process group, so that the command may be a script that starts the training.
"""

import argparse
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).parents[1]
MAX_PAUSE = 300.0  # seconds
LOOK_LIMIT = 120.0  # seconds to list the checkpoints in a bucket
# Lists them, in a process of its own, which may hang or lack a package.
LOOK = """
import sys
sys.path.insert(0, sys.argv[1])
from mdm_jax.runtime import buckets
try:
  files = buckets.file_system(sys.argv[2])
  for name in files.glob('/'.join(sys.argv[2:])):
    print(name)
except (OSError, ValueError) as error:
  sys.exit(f'supervise: {sys.argv[2]} cannot be listed: {error}')
"""
# Seconds for the rest of a command to end by SIGTERM, once its first process
# has ended; then SIGKILL follows.
REST = 60.0
SIGNALS = (
  signal.SIGHUP,
  signal.SIGINT,
  signal.SIGQUIT,
  signal.SIGTERM,
  signal.SIGUSR1,
  signal.SIGUSR2,
  signal.SIGXCPU,
)
# Reads process groups, an empty line for none. When this script has ended,
# however it has, nothing more can come: then the last group is to stop.
GUARD = """
trap '' HUP INT QUIT TERM
while read -r line; do group=$line; done
[ -z "$group" ] || kill -s TERM -- "-$group" 2> /dev/null
"""


def progress(workdir: str) -> tuple[int, int]:
  """Returns the newest (stage, step) with a checkpoint; (-1, -1) if none.

  Args:
    workdir: of the run, also in a bucket. If that cannot be listed, standard
      error says so, and there is none.
  """
  # A manifest is written last.
  pattern = 'checkpoints/*_*/*/manifest.json'
  workdir = workdir.rstrip('/')  # Names in buckets may have empty parts.
  if '://' in workdir:
    names = []
    try:
      names = subprocess.run(
        [sys.executable, '-c', LOOK, ROOT, workdir, pattern],
        stdout=subprocess.PIPE,
        text=True,
        timeout=LOOK_LIMIT,
        process_group=0,  # Ctrl-C in a terminal does not reach it.
      ).stdout.splitlines()
    except subprocess.TimeoutExpired:
      say(f'{workdir} cannot be listed: no answer in {LOOK_LIMIT:g} s')
  else:
    names = pathlib.Path(workdir).glob(pattern)
  found = [(-1, -1)]
  for name in names:
    *_, stage, step, _ = str(name).split('/')
    index = stage.split('_')[0]
    if step.isdigit() and index.isdigit():
      found.append((int(index), int(step)))
  return max(found)


def send(group: int, number: int) -> bool:
  """Signals a process group; returns whether it has any process."""
  try:
    os.killpg(group, number)
  except ProcessLookupError:
    return False
  return True


def end_rest(group: int) -> None:
  """Ends what is left of a command after its first process has ended."""
  end = time.monotonic() + REST
  number = signal.SIGTERM
  while send(group, number) and time.monotonic() < end:
    number = 0  # Only asks: a second SIGTERM would not let it save.
    time.sleep(0.1)
    with contextlib.suppress(ChildProcessError):
      os.waitpid(-group, os.WNOHANG)  # In a container it may be ours.
  send(group, signal.SIGKILL)


def start(command: list[str]) -> tuple[subprocess.Popen, subprocess.Popen]:
  """Starts the command in its own process group, and the guard of the group.

  So Ctrl-C in a terminal reaches the command once, passed on, and not twice.
  """
  guard = subprocess.Popen(
    ['/bin/sh', '-c', GUARD], stdin=subprocess.PIPE, process_group=0
  )

  def tell_guard():
    # In the child: the guard learns of it even if this script is killed now.
    os.write(guard.stdin.fileno(), b'%d\n' % os.getpid())

  child = subprocess.Popen(command, process_group=0, preexec_fn=tell_guard)
  return child, guard


def say(text: str) -> None:
  """Writes a line to standard error, which may have vanished."""
  # Not through sys.stderr: what that cannot write makes the exit code 120.
  with contextlib.suppress(OSError):
    os.write(2, f'supervise: {text}\n'.encode())


def main() -> int:
  """Runs the command until it is finished; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    '--workdir',
    required=True,
    help='--workdir of the command, also in a bucket (gs://...)',
  )
  parser.add_argument(
    '--attempts',
    type=int,
    default=5,
    help='consecutive attempts without a newer checkpoint after which it '
    'gives up (default: 5)',
  )
  parser.add_argument(
    '--pause',
    type=float,
    default=5.0,
    help='seconds of the pause after the first crash (default: 5)',
  )
  parser.add_argument('command', nargs='+', help='the command, after --')
  args = parser.parse_args()

  stopped, child = threading.Event(), None

  def stop(number, frame):
    stopped.set()
    if child and child.poll() is None:
      send(child.pid, number)

  for number in SIGNALS:
    if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, stop)

  failures, crashes, best = 0, 0, progress(args.workdir)
  while True:
    child, guard = start(args.command)
    if stopped.is_set():  # The signal came while the command was starting.
      send(child.pid, signal.SIGTERM)
    code = None
    while code is None:
      # A signal that comes just before it waits is handled only afterwards.
      with contextlib.suppress(subprocess.TimeoutExpired):
        code = child.wait(1.0)
    end_rest(child.pid)
    guard.communicate(b'\n')
    # A command ended by signal n has -n here and 128 + n in a shell.
    code = 128 - code if code < 0 else code
    if code == 0 or stopped.is_set():
      return code
    now = progress(args.workdir)
    if now > best:
      failures, crashes, best = 0, 0, now
    else:
      failures += 1
    if failures >= args.attempts:
      say(
        f'exit code {code}, and no newer checkpoint after {failures} attempts: '
        'giving up.'
      )
      return code
    crashes += code != os.EX_TEMPFAIL
    pause = 0.0
    if code != os.EX_TEMPFAIL:
      pause = min(args.pause * 2 ** (crashes - 1), MAX_PAUSE)
    say(f'exit code {code}, starting again in {pause:g} s.')
    if stopped.wait(pause):
      return os.EX_TEMPFAIL


if __name__ == '__main__':
  sys.exit(main())
