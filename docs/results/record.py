"""Records what a command measured as docs/results/NAME.json.

    python docs/results/record.py NAME --command='python -m …' FILE…

Run it after the command, at the same commit and on the same machine. Each FILE
is JSON or JSON lines that the command wrote. CONTRIBUTING.md, "Add a result to
the docs", says how a page shows the numbers.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess

import jax

HERE = pathlib.Path(__file__).parent
PACKAGES = 'jax', 'jaxlib', 'flax', 'optax', 'numpy'


def machine() -> dict:
  """The devices, CPU and memory of this machine."""
  devices = jax.devices()
  path = pathlib.Path('/proc/cpuinfo')
  text = path.read_text() if path.exists() else ''
  names = re.findall(r'^model name\s*: (.*)', text, re.MULTILINE)
  return {
    'devices': f'{len(devices)} x {devices[0].device_kind}',
    'cpu': names[0] if names else platform.processor(),
    'cores': os.cpu_count(),
    'memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
  }


def commit() -> str:
  """The commit that is checked out."""
  git = ('git', 'rev-parse', '--short=12', 'HEAD')
  found = subprocess.run(
    git, cwd=HERE, capture_output=True, check=True, text=True
  )
  return found.stdout.strip()


def read(path: pathlib.Path):
  """A JSON document, or the last one of JSON lines."""
  text = path.read_text()
  if path.suffix == '.json':
    return json.loads(text)
  return json.loads(text.splitlines()[-1])


def main() -> None:
  """Writes the file that the arguments ask for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('name', help='NAME of docs/results/NAME.json')
  parser.add_argument('--command', required=True, help='what was run')
  parser.add_argument(
    '--note', help='what else matters, such as programs that ran beside'
  )
  parser.add_argument(
    'files', nargs='+', type=pathlib.Path, help='JSON files that it wrote'
  )
  arguments = parser.parse_args()
  found = [read(path) for path in arguments.files]
  document = {
    'command': arguments.command,
    'date': datetime.date.today().isoformat(),
    'machine': machine() | ({'note': arguments.note} if arguments.note else {}),
    'versions': {each: importlib.metadata.version(each) for each in PACKAGES},
    'commit': commit(),
    'results': found[0]
    if len(found) == 1
    else {path.stem: each for path, each in zip(arguments.files, found)},
  }
  path = HERE / f'{arguments.name}.json'
  path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
  main()
