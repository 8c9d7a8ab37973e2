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

SIGTERM and Ctrl-C are passed on to the command; it is then not started again.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import threading

MAX_PAUSE = 300.0  # seconds


def progress(workdir: pathlib.Path) -> tuple[int, int]:
  """Returns the newest (stage, step) with a checkpoint; (-1, -1) if none."""
  found = [
    (int(path.parent.name.split('_')[0]), int(path.name))
    for path in workdir.glob('checkpoints/*_*/*')
    if path.name.isdigit()
  ]
  return max(found, default=(-1, -1))


def main() -> int:
  """Runs the command until it is finished; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    '--workdir',
    type=pathlib.Path,
    required=True,
    help='--workdir of the command',
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
      child.send_signal(number)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)

  failures, crashes, best = 0, 0, progress(args.workdir)
  while True:
    # The command gets its own process group, so that Ctrl-C in a terminal
    # reaches it once, through `stop`, and not twice.
    child = subprocess.Popen(args.command, process_group=0)
    if stopped.is_set():  # The signal came while the command was starting.
      child.terminate()
    code = child.wait()
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
      print(
        f'supervise: exit code {code}, and no newer checkpoint after '
        f'{failures} attempts: giving up.',
        file=sys.stderr,
      )
      return code
    crashes += code != os.EX_TEMPFAIL
    pause = 0.0
    if code != os.EX_TEMPFAIL:
      pause = min(args.pause * 2 ** (crashes - 1), MAX_PAUSE)
    print(
      f'supervise: exit code {code}, starting again in {pause:g} s.',
      file=sys.stderr,
      flush=True,
    )
    if stopped.wait(pause):
      return os.EX_TEMPFAIL


if __name__ == '__main__':
  sys.exit(main())
