"""Flags of all commands: what they refuse, in one line and before any work."""

import ast
import importlib
import multiprocessing
import os
import pathlib
import runpy
import sys

from absl import flags
import numpy as np
import pytest

from mdm_jax import inference
from mdm_jax.inference import evaluation
from mdm_jax.runtime import command, cpu, flag_types, value_types
from tests import commands, fuzzing

ROOT = pathlib.Path(flag_types.__file__).parents[1]
COMMANDS = sorted(
  str(path.relative_to(ROOT.parent).with_suffix('')).replace('/', '.')
  for path in ROOT.rglob('*.py')
  if "if __name__ == '__main__'" in path.read_text()
)
NUMBERS = (
  'nan -nan inf -inf 1e999 -1e999 0 -1 -0.5 1 7 0.5 1.5 1e3 4294967296 '
  '18446744073709551616 0x10 True None abc 1,2 (1,) []'
).split() + ['', ' ', '9' * 5000, '١', '1 2']


def define_all(pipe) -> None:
  """Sends what flags the commands define. It runs in a process of its own."""
  command.run = lambda *given: None
  cpu.use_huge_pages = lambda: None
  found = []
  for module in COMMANDS:
    _remove_flags()
    # Libraries that it imports have flags of their own.
    importlib.import_module(module)
    _remove_flags()
    runpy.run_module(module, run_name='__main__')
    for name in flags.FLAGS:
      flag = flags.FLAGS[name]
      kind = getattr(flag.parser, 'kind', None)
      found.append((module, name, kind, flag.default, bool(flag.boolean)))
  pipe.send(found)
  pipe.close()
  os._exit(0)


def _remove_flags() -> None:
  for name in list(flags.FLAGS):
    delattr(flags.FLAGS, name)
  # Imported again, it defines its flags again.
  if sys.modules.pop('mdm_jax.inference.run_flags', None):
    del inference.run_flags


@pytest.fixture(scope='module')
def defined() -> list[tuple]:
  """(command, flag, kind, default, is boolean) of all flags of all commands."""
  context = multiprocessing.get_context('fork')
  ours, theirs = context.Pipe(duplex=False)
  process = context.Process(target=define_all, args=(theirs,))
  process.start()
  theirs.close()
  found = ours.recv()
  process.join()
  assert {module for module, *_ in found} == set(COMMANDS)
  return found


@pytest.fixture(scope='module')
def typed(defined) -> list[tuple[str, str, flags.Flag]]:
  """(command, kind, flag) of those that have a kind."""
  return [
    (
      module,
      kind,
      flags.Flag(
        flag_types._Parser(kind), flags.ArgumentSerializer(), name, None, ''
      ),
    )
    for module, name, kind, *_ in defined
    if kind
  ]


def refusal(flag: flags.Flag, value: str) -> str | None:
  """Why a flag refuses a value; None if it accepts it."""
  try:
    flag.parse(value)
  except flags.IllegalFlagValueError as error:
    line = flag_types.reason(error)
    assert line.startswith(f'--{flag.name}='), line
    assert '\n' not in line and len(line) < 700, line
    return line
  return None


def test_there_are_all_commands():
  assert {
    f'mdm_jax.{name}' for name in ('main', 'sample', 'evaluate', 'demo')
  } < set(COMMANDS)
  assert len(COMMANDS) == 4 + 16


def test_every_flag_has_a_kind(defined):
  assert [
    (module, name)
    for module, name, kind, _, is_boolean in defined
    if not kind and not is_boolean and name != 'config'
  ] == []


def test_metrics_are_those_of_the_module(defined):
  (kind,) = (
    kind
    for module, name, kind, *_ in defined
    if (module, name) == ('mdm_jax.evaluate', 'metrics')
  )
  assert kind.element.names == evaluation.METRICS


def test_flags_are_defined_in_one_place():
  for path in ROOT.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      name = getattr(node, 'attr', '')
      # W&B has an error of this name, too.
      is_usage = name == 'UsageError' and ast.unparse(node) == 'app.UsageError'
      if name.startswith('DEFINE') or is_usage:
        assert path.stem in ('flag_types', 'recipes') or name in (
          'DEFINE_boolean',
          'DEFINE_bool',
        ), (path, name)


def test_a_default_is_in_the_range(defined):
  for *_, name, kind, default, _ in defined:
    if kind and default:
      assert kind.check(default) == default, name


def test_numbers_out_of_range_are_refused(typed):
  for module, kind, flag in typed:
    kind = getattr(kind, 'element', kind)
    if isinstance(kind, value_types.Number):
      wrong = ['nan', 'inf', '-inf', '1e999', 'x', '', '9' * 5000]
      wrong += [str(kind.high + 1), str(kind.low - 1)]
      wrong += ['1.5'] if kind.type is int else []
      for value in wrong:
        if value not in map(str, kind.also):
          assert refusal(flag, value), (module, flag.name, value)
      assert not refusal(flag, str(kind.type(kind.low + 1e-4)))
    for value in NUMBERS:
      refusal(flag, value)


def hostile_paths(directory: pathlib.Path) -> list[str]:
  """Paths that no flag may take as they are, whatever it is for."""
  (directory / 'file').write_text('')
  os.symlink('loop', directory / 'loop')
  return [
    '',
    ' ',
    'gs:/bucket/x',
    'file:///x',
    'file:/x',
    '$HOME/x',
    '${HOME}/x',
    'a/$USER',
    '~no_such_user/x',
    ' x',
    'x ',
    'x\n',
    'x\0y',
    'x\x1b[31m',
    'x\udcff',
    'n' * 256,
    'n/' * 2500,
    f'{directory}/file/below',
    f'{directory}/loop/below',
  ]


def test_paths_that_mean_nothing_are_refused(typed, tmp_path, monkeypatch):
  paths = hostile_paths(tmp_path)
  before = sorted(os.listdir(tmp_path))
  monkeypatch.chdir(tmp_path)
  found = [
    (module, kind, flag)
    for module, kind, flag in typed
    if isinstance(kind, value_types.Path)
  ]
  assert len(found) > 25
  for module, kind, flag in found:
    wrong = list(paths)
    if kind.kind in ('glob', 'input'):
      wrong = wrong[:-2]
    elif kind.kind == 'directory':
      wrong.append(f'{tmp_path}/file')
    else:
      wrong += [str(tmp_path), '/dev/zero']
    if not kind.schemes:
      wrong += ['gs://bucket/x', 's3://x', 'https://x/y']
    if not kind.output and kind.kind not in ('glob', 'input'):
      wrong.append('missing')
    for value in wrong:
      assert refusal(flag, value), (module, flag.name, value)
  assert sorted(os.listdir(tmp_path)) == before  # Nothing is written.


def test_a_path_is_what_the_shell_would_make_of_it(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'dir').mkdir()
  directory = value_types.Path('directory')
  assert directory.check('~/dir') == f'{tmp_path}/dir'
  assert directory.check('~') == str(tmp_path)
  output = value_types.Path('file', output=True)
  assert output.check('~/new/x.json') == f'{tmp_path}/new/x.json'
  assert output.check(f'{tmp_path}/a~b c.json') == f'{tmp_path}/a~b c.json'
  bucket = value_types.Path('glob', schemes=('*',))
  assert bucket.check('gs://a/*.tar') == 'gs://a/*.tar'
  assert bucket.check('~/*.tar') == f'{tmp_path}/*.tar'
  with pytest.raises(ValueError, match='write gs:// with two slashes'):
    bucket.check('gs:/a/*.tar')


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
  directory = value_types.Path('directory', output=True)
  assert directory.check(f'{tmp_path}/a/b') == f'{tmp_path}/a/b'
  # Tests may run as root, who may write anywhere.
  monkeypatch.setattr(os, 'access', lambda path, mode: mode == os.R_OK)
  with pytest.raises(ValueError, match=f'written to {tmp_path}'):
    directory.check(f'{tmp_path}/a/b')
  with pytest.raises(ValueError, match='cannot be written to'):
    directory.check(str(tmp_path))
  with pytest.raises(ValueError, match=f'{tmp_path}: .*cannot be written'):
    value_types.check_outputs(tmp_path, 'checkpoints')


def test_a_subdirectory_that_is_a_file_is_named(tmp_path):
  value_types.check_outputs(tmp_path, 'samples')
  (tmp_path / 'samples').write_text('')
  with pytest.raises(ValueError, match=f'{tmp_path}/samples: this is a file'):
    value_types.check_outputs(tmp_path, 'checkpoints', 'samples')


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_value_is_taken_or_refused(count, typed, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  parts = [*NUMBERS, *hostile_paths(tmp_path), 'true', '0/4', 'a:1', 'ddim,']

  def make(rng):
    text = ''.join(rng.choice(parts) for _ in range(rng.integers(1, 4)))
    if rng.random() < 0.5:
      data = fuzzing.damage(text.encode(errors='surrogateescape'), rng)
      text = data.decode(errors='surrogateescape')
    return int(rng.integers(len(typed))), text

  fuzzing.check(
    lambda case: refusal(typed[case[0]][2], case[1]), make, count, refuses=()
  )


def test_seeds_do_not_wrap():
  value_types.check_seeds('--seed', 2**32 - 4, 4)
  with pytest.raises(ValueError, match='--seed=4294967293 with 4 .* 0 to 4,29'):
    value_types.check_seeds('--seed', 2**32 - 3, 4)


@pytest.mark.parametrize(
  'kind, text',
  [
    (value_types.Number(int, 1, 1000), 'an integer from 1 to 1,000'),
    (value_types.Number(float, 0, 1, below=True), 'a number from 0 to below 1'),
    (
      value_types.Number(float, 1, 10**9, above=True, also=(0,)),
      'a number above 1 and up to 1,000,000,000, or 0',
    ),
  ],
)
def test_a_range_in_words(kind, text):
  assert str(kind) == text


def test_addresses_and_parts_and_names():
  for kind, right, wrong in (
    (
      value_types.ADDRESS,
      ['a:1', '[::1]:65535', '10.0.0.1:8476', 'x:60000'],
      ['a', 'a:', ':1', 'a:0', 'a:65536', 'a:99999', 'a:x', 'a b:1', 'a:1 '],
    ),
    (value_types.PART, ['0/1', '3/4'], ['', '1', 'a/b', '0/1 ', '-1/2']),
    (
      value_types.NAME,
      ['64', '64+256', 'a b', 'ä-1_x.y'],
      ['', '.', '..', '.x', 'a/b', ' a', 'a ', 'a\n', 'n' * 101, 'a\x1b', 64],
    ),
  ):
    for value in right:
      assert kind.check(value) == value
    for value in wrong:
      with pytest.raises(ValueError):
        kind.check(value)
  assert value_types.parse_part('3/4') == (3, 4)
  for value in ('4/4', '1/0', '0/0', 'x', ''):
    with pytest.raises(ValueError, match=f'--part={value}: give k/n'):
      value_types.parse_part(value)


def test_a_pipe_can_be_read_once(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  path = str(tmp_path / 'pipe')
  assert value_types.Path('text').check(path) == path
  for kind in (value_types.Path('file'), value_types.Path('file', output=True)):
    with pytest.raises(ValueError, match='no regular file'):
      kind.check(path)


def test_an_integer_is_a_number_and_true_is_none():
  share = value_types.Number(float, 0, 1)
  # As NumPy computes in a recipe or a notebook.
  for value in (1, 0.5, np.float64(0.5), np.float32(0.5), np.int64(1)):
    assert share.check(value) == value
    assert type(share.check(value)) in (int, float)
  for value in (True, '1', None, float('nan'), 10**400, [1]):
    with pytest.raises(ValueError, match='give a number from 0 to 1'):
      share.check(value)
  count = value_types.Number(int, 0, 9)
  assert type(count.check(np.uint8(3))) is int
  for value in (True, 3.0, '3', 10, np.float64(3), np.bool_(True)):
    with pytest.raises(ValueError, match='give an integer from 0 to 9'):
      count.check(value)


@pytest.mark.parametrize(
  'module, arguments, line',
  [
    (
      'mdm_jax.sample',
      ['--workdir=.', '--guidance=nan'],
      'error: --guidance=nan: give a number from 0 to 1,000.',
    ),
    ('mdm_jax.sample', [], 'error: --workdir is missing: give a value.'),
    (
      'mdm_jax.evaluate',
      ['--workdir=.', 'x\x1b[31m'],
      "error: 'x\\x1b[31m' is not expected: flags begin with --, and a value "
      'with spaces needs quotes.',
    ),
    (
      'mdm_jax.tools.train_tokenizer',
      ['--output=/dev/null/x'],
      'error: --output=/dev/null/x: /dev/null is a file, not a directory.',
    ),
    (
      'mdm_jax.demo',
      ['--workdir=.', '--best=2'],
      'error: --best=2: give true or false.',
    ),
  ],
)
def test_a_command_ends_in_one_line(module, arguments, line):
  result = commands.run(module, *arguments)
  assert (result.returncode, result.stdout) == (1, '')
  assert result.stderr == line + '\n'


def test_help_shows_the_flags_that_commands_share():
  result = commands.run('mdm_jax.sample', '--help')
  for name in ('prompt', 'workdir', 'steps', 'guidance', 'sampler', 'stage'):
    assert f'\n  --{name}: ' in result.stdout, name
