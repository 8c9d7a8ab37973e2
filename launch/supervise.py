#!/usr/bin/env python3
"""Runs a training command again until it is finished.

  launch/supervise.py --workdir=runs/mine -- \\
    python -m mdm_jax.main --config=configs/shapes_64.py --workdir=runs/mine

Exit code 0 of the command is the end. After 75, a run that was stopped and can
go on, it is started again at once; after any other, a crash, following a pause
that doubles with each one. It gives up, with the command's exit code, after
--attempts in a row that left no newer step in WORKDIR/checkpoints.

SIGTERM and Ctrl-C are passed on to the command, and then nothing is started
again.
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
  """The newest (stage, step) that has a checkpoint; (-1, -1) for none."""
  found = [
    (int(path.parent.name.split('_')[0]), int(path.name))
    for path in workdir.glob('checkpoints/*_*/*')
    if path.name.isdigit()
  ]
  return max(found, default=(-1, -1))


def main() -> int:
  """Supervises; returns the exit code."""
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
    help='in a row without progress (default: 5)',
  )
  parser.add_argument(
    '--pause',
    type=float,
    default=5.0,
    help='seconds after a first crash (default: 5)',
  )
  parser.add_argument('command', nargs='+', help='after --')
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
    # In a group of its own: Ctrl-C in a terminal reaches it through `stop`
    # alone, and not twice.
    child = subprocess.Popen(args.command, process_group=0)
    if stopped.is_set():  # It came while the command was being started.
      child.terminate()
    code = child.wait()
    code = 128 - code if code < 0 else code  # As a shell has it for signals.
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
