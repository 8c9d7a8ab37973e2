"""Records a run of this version for tests/test_versions.py.

python tests/data/runs/record.py tests/data/runs/NAME

The directory has a `recipe.py`. Its run is trained to the end, and packed into
`run.tar.xz` as if it had been killed at its last checkpoint but one.
`sample.png` is what was sampled from that checkpoint, and `expected.json` has
the losses that followed. Run it in a checkout of the commit that is to be
recorded.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

PROMPT = 'a red ring'


def command(module: str, *arguments: str) -> None:
  """Runs a command of this version."""
  subprocess.run([sys.executable, '-m', module, *arguments], check=True)


def cut(workdir: pathlib.Path) -> int:
  """Takes a finished run back to its last checkpoint but one, and says which.

  The run has one stage, and checkpoints, snapshots of post-hoc EMAs or both.
  """
  (stage,) = (workdir / 'checkpoints').iterdir()
  *_, step, _ = sorted(int(path.name) for path in stage.glob('[0-9]*'))
  (stage / 'finished.json').unlink()
  for path in workdir.glob('*/*/[0-9]*'):
    # One state is enough, but all snapshots are needed.
    if int(path.name) > step or path.parent == stage and int(path.name) < step:
      shutil.rmtree(path)
  for name in ('samples', 'eval', 'tensorboard'):
    shutil.rmtree(workdir / name, ignore_errors=True)
  (workdir / 'metrics.jsonl').unlink()
  return step


def main(directory: pathlib.Path) -> None:
  """Trains, packs and says what was measured."""
  with tempfile.TemporaryDirectory() as scratch:
    workdir = pathlib.Path(scratch, 'run')
    command(
      'mdm_jax.main',
      f'--config={directory / "recipe.py"}',
      f'--workdir={workdir}',
    )
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    step = cut(workdir)
    output = pathlib.Path(scratch, 'samples')
    command(
      'mdm_jax.sample',
      f'--workdir={workdir}',
      f'--prompt={PROMPT}',
      '--num_samples=1',
      f'--output={output}',
    )
    shutil.copy(output / '0000_16.png', directory / 'sample.png')
    with tarfile.open(directory / 'run.tar.xz', 'w:xz', preset=9) as tar:
      tar.add(workdir, 'run')
  expected = {
    'step': step,
    'prompt': PROMPT,
    'losses': {
      line['step']: line['loss']
      for line in metrics
      if 'loss' in line and line['step'] > step
    },
    'held_out': {
      key: value
      for line in metrics
      for key, value in line.items()
      if key.startswith('held_out')
    },
  }
  text = json.dumps(expected, indent=2)
  (directory / 'expected.json').write_text(text + '\n')
  print(text)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]).absolute())
