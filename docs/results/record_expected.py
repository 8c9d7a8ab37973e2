"""Records the curves of a run as what is expected of its recipe.

    python docs/results/record_expected.py shapes_64 runs/shapes_64
    python docs/results/record_expected.py shapes_64:long runs/shapes_64_long

It writes configs/expected/shapes_64_long.json: losses, gradient norms and
accuracies by step, and the config of the run, with which later runs are
compared. Run it at the commit of the training, and on its machine, after an
unchanged recipe has been trained to its end. docs/monitoring.md says how runs
are compared.
"""

import argparse
import datetime
import importlib
import json
import pathlib
import sys

from record import commit, machine

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mdm_jax.builders.config import has_config_of, read_config  # noqa: E402
from mdm_jax.runtime import files  # noqa: E402
from mdm_jax.training import expected  # noqa: E402


def main() -> None:
  """Writes the file that the arguments ask for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('recipe', help='such as shapes_64 or shapes_64:long')
  parser.add_argument('workdir', type=pathlib.Path, help='of the run')
  parser.add_argument('--note', help='what else matters')
  arguments = parser.parse_args()
  lines = files.read_json_lines(arguments.workdir / 'metrics.jsonl')
  config = read_config(arguments.workdir)
  name, *mode = arguments.recipe.split(':')
  recipe = importlib.import_module(f'configs.{name}').get_config(*mode)
  if not has_config_of(config, json.loads(recipe.to_json())):
    sys.exit(
      f'error: {arguments.workdir} has another config than '
      f'{arguments.recipe}: train the unchanged recipe of this commit.'
    )
  stages = [stage['name'] for stage in config['stages']]
  curves = {
    stage: curve
    for stage, curve in expected.curves_of(lines).items()
    if stage in stages
  }
  if missing := [stage for stage in stages if stage not in curves]:
    sys.exit(
      f'error: {arguments.workdir}/metrics.jsonl has nothing of stage '
      f'{missing[0]!r}: train the run to its end.'
    )
  document = {
    'recipe': arguments.recipe,
    'date': datetime.date.today().isoformat(),
    'machine': machine() | ({'note': arguments.note} if arguments.note else {}),
    'commit': commit(),
    'bands': expected.BANDS,
    'config': config,
    'curves': curves,
  }
  path = ROOT / 'configs/expected' / f'{"_".join([name, *mode])}.json'
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(document) + '\n')
  print(f'Wrote {path} ({path.stat().st_size:,} bytes).')


if __name__ == '__main__':
  main()
