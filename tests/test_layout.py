"""Who may import whom: a module imports only from rows below its own."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / 'mdm_jax'
ROWS = (
  {'main', 'sample', 'evaluate', 'demo', 'tools'},
  {'train', 'figures'},
  {'trained', 'checks', 'kept', 'live'},
  {'build', 'stages'},
  {'inputs'},
  {'step', 'draw', 'features'},
  {
    'sharding',
    'state',
    'optim',
    'averages',
    'guard',
    'checkpoint',
    'metrics',
    'ledger',
    'watchdog',
    'replicas',
    'processes',
    'compilation_cache',
    'cpu',
    'hugging_face',
    'torch_files',
    'hlo',
  },
  {
    'diffusion',
    'models',
    'data',
    'eval',
    'manifest',
    'background',
    'interrupt',
  },
  {'mixed_batch'},
  {'__init__'},
)
LEAVES = 7
FORBIDDEN = (
  'configs',
  'tensorflow',
  'torch',
  'transformers',
  'clu.metric_writers',
  'clu.periodic_actions',
  'clu.checkpoint',
)
FILES = sorted(ROOT.rglob('*.py'))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imports(source: str) -> set[str]:
  """The dotted names that a module imports, inside functions too."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, 'imports are absolute'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def is_in(name: str, package: str) -> bool:
  return name == package or name.startswith(package + '.')


def part(path: pathlib.Path) -> str:
  """A folder of mdm_jax, or a module directly in it."""
  return path.relative_to(ROOT).with_suffix('').parts[0]


def row(part: str) -> int:
  rows = [index for index, names in enumerate(ROWS) if part in names]
  assert rows, f'{part} is in no row of the table: give it one'
  return rows[0]


def test_imports_are_found():
  assert imports("""
import jax.numpy as jnp
from mdm_jax import step as steps, train
def f():
  from mdm_jax.data import shapes
  with lazy():
    import clu.metric_writers
""") == {
    'jax.numpy',
    'mdm_jax.step',
    'mdm_jax.train',
    'mdm_jax.data.shapes',
    'clu.metric_writers',
  }
  assert len(FILES) > 30


@pytest.mark.parametrize('path', FILES, ids=NAMES)
def test_imports_only_from_rows_below(path):
  own = part(path)
  for name in imports(path.read_text()):
    if not is_in(name, 'mdm_jax'):
      continue
    other = name.split('.')[1]
    same_leaf = other == own and row(own) == LEAVES
    assert same_leaf or row(other) > row(own), name


@pytest.mark.parametrize('path', FILES, ids=NAMES)
def test_forbidden_imports(path):
  source = path.read_text()
  for name in imports(source):
    assert not any(is_in(name, other) for other in FORBIDDEN), name
  if row(part(path)) > 4:
    assert 'ConfigDict' not in source
    assert not any(is_in(name, 'ml_collections') for name in imports(source))
