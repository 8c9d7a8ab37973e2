"""Numbers in the docs that were measured are those of docs/results/*.json.

CONTRIBUTING.md, "Add a result to the docs", says how to write them.
"""

import ast
import datetime
import json
import pathlib
import re
import runpy
import sys
from typing import NamedTuple

import pytest

from configs import common
from mdm_jax.data import shapes

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'docs' / 'results'
PAGES = [
  ROOT / 'README.md',
  ROOT / 'CONTRIBUTING.md',
  *sorted((ROOT / 'docs').glob('*.md')),
]
UNITS = {
  **{'s': 1, 'seconds': 1, 'ms': 1e-3, 'µs': 1e-6},
  **{'min': 60, 'minutes': 60, 'h': 3600, 'hours': 3600},
  **{'kB': 1e3, 'MB': 1e6, 'GB': 1e9, 'TB': 1e12},
  **{'KiB': 2**10, 'MiB': 2**20, 'GiB': 2**30, 'TiB': 2**40},
  **{'GFLOP': 1e9, 'TFLOP': 1e12, 'GFLOP/s': 1e9, 'TFLOP/s': 1e12},
  **{'%': 1e-2, 'points': 1e-2, 'times': 1, 'GB/s': 1e9},
  **{'images/s': 1, 'captions/s': 1, 'steps/s': 1, 'it/s': 1},
  **{'chip-hours': 1},
}
_UNIT = '|'.join(map(re.escape, sorted(UNITS, key=len, reverse=True)))
# 3, 0.25, 1,200 or 4.2e-6, with or without a unit, or 2 min 28 s, or 2m28s.
# Not the digits of v5e-16, 4x4, #12, 1.2.3 or 2026-11-26.
QUANTITY = re.compile(
  r'(?<![\w.,:/#^-])(?:'
  r'(?P<minutes>\d+)(?: min |m)(?P<seconds>\d+) ?s'
  r'|(?P<number>\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?)'
  rf'(?:[ \n]?(?P<unit>{_UNIT}))?)'
  r'(?![\w/^]|[.,:-]\d)'
)
# Headers of columns of numbers that have no unit of their own.
GIVEN = re.compile(r'default|tolerance')
MEASURED = re.compile(
  r'measured|\btimes?\b|seconds|memory|\bpeak|differen|accurac|distance'
  rf'|ratio\b|\b(?:{_UNIT})(?!\w)'
)
KEYS = ['command', 'date', 'machine', 'versions', 'commit', 'results']
COMMENT = re.compile(r'\s*<!--(.*?)-->', re.DOTALL)


class Quantity(NamedTuple):
  text: str  # As it stands on the page, such as '2.5 GB'.
  value: float
  digit: float  # What its last digit counts: 0.1 for 2.5.
  unit: str | None


class Block(NamedTuple):
  """A paragraph, list, table or fenced code, and the comments before it."""

  line: int
  comments: list[str]
  text: str


def blocks(page: str) -> list[Block]:
  """The blocks of a page, which blank lines separate outside of fences."""
  found, lines, fenced = [], [], False
  for number, line in enumerate([*page.splitlines(), ''], 1):
    if line.lstrip().startswith('```'):
      fenced = not fenced
    if line.strip() or fenced:
      lines.append(line)
    elif lines:
      text, comments = '\n'.join(lines), []
      while match := COMMENT.match(text):
        comments.append(' '.join(match[1].split()))
        text = text[match.end() :].lstrip('\n')
      found.append(Block(number - len(lines), comments, text))
      lines = []
  return found


def quantities(text: str) -> list[Quantity]:
  found = []
  for match in QUANTITY.finditer(text):
    shown = ' '.join(match[0].split())
    if match['number'] is None:
      value = 60.0 * int(match['minutes']) + int(match['seconds'])
      found.append(Quantity(shown, value, 1.0, 's'))
      continue
    number = match['number'].replace(',', '')
    mantissa, _, exponent = number.partition('e')
    decimals = len(mantissa.partition('.')[2])
    digit = 10.0 ** (int(exponent or 0) - decimals)
    found.append(Quantity(shown, float(number), digit, match['unit']))
  return found


def prose(block: Block) -> str:
  """Without code and addresses; all of fenced code that shows results."""
  if block.text.lstrip().startswith('```'):
    return block.text
  text = re.sub(r'`[^`]*`', '`', block.text)
  return re.sub(r'\]\([^)]*\)', ']', text)


def cells(row: str) -> list[str]:
  return [cell.strip(' *') for cell in row.strip().strip('|').split('|')]


def looks_measured(block: Block) -> list[Quantity]:
  """Numbers with a unit, and cells of tables that are numbers."""
  if re.match(r'\s*```\w', block.text):  # Commands, Python.
    return []
  text = prose(block)
  found = [each for each in quantities(text) if each.unit]
  rows = text.splitlines()
  if len(rows) > 2 and re.fullmatch(r'[|\s:-]+', rows[1]):
    headers = cells(rows[0])
    for row in rows[2:]:
      for header, cell in list(zip(headers, cells(row)))[1:]:
        numbers = [each for each in quantities(cell) if not each.unit]
        is_number = [each.text for each in numbers] == [cell]
        starts_with_one = re.match(r'\d', cell) and MEASURED.search(header)
        if (is_number or starts_with_one) and not GIVEN.search(header):
          found += numbers
  return found


def leaves(tree) -> list[float]:
  """The numbers among the values of a JSON document."""
  if isinstance(tree, dict):
    tree = list(tree.values())
  if isinstance(tree, list):
    return [leaf for each in tree for leaf in leaves(each)]
  is_number = isinstance(tree, int | float) and not isinstance(tree, bool)
  return [tree] if is_number else []


class Source(NamedTuple):
  """What a file of results, or a part of it, may confirm."""

  values: list[float]  # All numbers of the results.
  names: set[float]  # Those in its names, command and machine: settings.


def read_source(name: str, directory: pathlib.Path) -> Source:
  """Reads NAME, or only the part NAME/KEY/KEY of its results."""
  name, *keys = name.split('/')
  path = directory / f'{name}.json'
  assert path.exists(), f'{path} does not exist'
  document = json.loads(path.read_text())
  results = document['results']
  for key in keys:
    assert key in results, f'{path}: no {key} in results'
    results = results[key]
  text = json.dumps([results, document['command'], document['machine']])
  names = re.findall(r'\d+(?:\.\d+)?(?:e-?\d+)?', text)
  return Source(leaves(results), set(map(float, names)))


def is_in(quantity: Quantity, source: Source, units: set) -> bool:
  """Whether a number, rounded as it is shown, is in a file of results.

  Results are in seconds, bytes, FLOP and shares of 1, or in the unit shown. A
  number without a unit may be in any unit of its block, or a setting.
  """
  for unit in {quantity.unit} if quantity.unit else units:
    for scale in {1.0, UNITS.get(unit, 1.0)}:
      value, half = quantity.value * scale, quantity.digit * scale / 2
      for leaf in source.values:
        if abs(leaf - value) <= half * (1 + 1e-9) + 1e-12 * abs(leaf):
          return True
  return quantity.unit is None and quantity.value in source.names


def problems(page: str, directory: pathlib.Path = RESULTS) -> list[str]:
  """What is wrong with the numbers of a page, a line for each."""
  found = []
  for block in blocks(page):
    sources, settings = [], ()
    for comment in block.comments:
      kind, _, names = comment.partition(': ')
      names = re.split(r'; |, ', names)
      if kind == 'results':
        sources += [read_source(name, directory) for name in names]
      elif kind == 'settings':
        settings = names
      else:
        found.append(f'{block.line}: what is <!-- {comment} -->?')
    numbers = looks_measured(block)
    units = {None, *(each.unit for each in numbers)}
    if sources:
      units.update(re.findall(rf'(?<!\w)(?:{_UNIT})(?!\w)', prose(block)))
      numbers = quantities(prose(block))
      if not numbers:
        found.append(f'{block.line}: results, but no number of them')
    unknown = {
      each.text: None
      for each in numbers
      if not any(is_in(each, source, units) for source in sources)
    }
    for name in settings:
      if name not in unknown:
        found.append(f'{block.line}: a setting that the block lacks: {name}')
    found += [
      f'{block.line}: {text} is in no file of results, and no setting'
      for text in unknown
      if text not in settings
    ]
  return found


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_measured_numbers_are_those_of_the_results(page):
  found = problems(page.read_text())
  assert not found, '\n'.join(
    [f'{page.relative_to(ROOT)} (see CONTRIBUTING.md, Add a result)', *found]
  )


def test_every_file_of_results_is_shown_and_says_where_it_is_from():
  comments = [
    comment.removeprefix('results: ')
    for page in PAGES
    for block in blocks(page.read_text())
    for comment in block.comments
    if comment.startswith('results: ')
  ]
  shown = {
    name.split('/')[0] for comment in comments for name in comment.split(', ')
  }
  files = {path.stem: path for path in RESULTS.glob('*.json')}
  assert shown == files.keys()
  for name, path in files.items():
    document = json.loads(path.read_text())
    assert list(document) == KEYS, name
    assert document['command'].strip() and leaves(document['results']), name
    datetime.date.fromisoformat(document['date'])
    assert {'devices', 'cpu'} <= document['machine'].keys(), name
    assert document['versions'], name
    assert re.fullmatch('[0-9a-f]{7,40}', document['commit']), name


@pytest.fixture
def run_json(tmp_path):
  results = {'seconds': 0.4289, 'total_seconds': 715.2, 'peak_bytes': 1.84e9}
  results |= {'accuracy': {'shape': 0.703}, 'speed': 1204.6, 'gap': 4.21e-6}
  document = {'command': 'x --steps=50', 'machine': {}, 'results': results}
  (tmp_path / 'run.json').write_text(json.dumps(document))
  return tmp_path


@pytest.mark.parametrize(
  'page',
  (
    '<!-- results: run -->\nA step takes 429 ms, `7 s`, on [1](1.md) v5e-16.',
    '<!-- results: run -->\n| | |\n|-|-|\n| 50 steps | 11 min 55 s | 4.2e-6 |',
    '<!-- results: run -->\n| | peak, GB |\n|---|---|\n| 50 | 1.8 |',
    '<!-- results: run/accuracy -->\n70 %, or 0.70, or 70.3 %.',
    '<!-- results: run -->\n<!-- settings: 7 s,\n9 -->\n1,205 images/s; 7 s, 9',
    '<!-- settings: 7 s -->\n```\n7 s\n\n```',
    '```sh\nsleep 7 s\n```\nThe 3 levels of 64 px are 2x2, since `7 s`.',
    '| steps | default |\n|-|-|\n| 5 | 463 |',
  ),
)
def test_what_is_accepted(page, run_json):
  assert problems(page, run_json) == []


@pytest.mark.parametrize(
  'page, problem',
  (
    ('A step takes 429 ms.', '1: 429 ms is in no'),
    ('```\n\n2m03s\n```', '1: 2m03s is in no'),
    ('| | seconds |\n|-|-|\n| a | 3 to 4 |', '1: 4 is in no'),
    ('| steps | dpm |\n|-|-|\n| 5 | 463 |', '1: 463 is in no'),
    ('<!-- results: run -->\n428 ms', '1: 428 ms is in no'),
    ('<!-- results: run -->\n429 s', '1: 429 s is in no'),
    ('<!-- results: run -->\n70.4 %', '1: 70.4 % is in no'),
    ('<!-- results: run -->\n50 s', '1: 50 s is in no'),
    ('<!-- results: run -->\n429 ms with 51 steps', '1: 51 is in no'),
    ('<!-- results: run/accuracy -->\n429 ms', '1: 429 ms is in no'),
    ('<!-- results: run -->\n429 ms\n\n429 ms', '4: 429 ms is in no'),
    ('<!-- results: run -->\n\n429 ms', '1: results, but no number'),
    ('<!-- settings: 7 s -->\n7 s or 8 s', '1: 8 s is in no'),
    ('<!-- settings: 7 s -->\n| | a |\n|-|-|\n|7 s|3|', '1: 3 is in no'),
    ('<!-- settings: 7 s -->\n8 min', '1: a setting that the block lacks: 7'),
    ('<!-- result: run -->\n3', '1: what is <!-- result: run -->?'),
  ),
)
def test_what_is_refused(page, problem, run_json):
  assert problem in '\n'.join(problems(page, run_json))


def test_a_result_is_recorded_with_where_it_is_from(tmp_path, monkeypatch):
  path = tmp_path / 'new.json'
  path.write_text('{"step_seconds": 0.25}')
  lines = tmp_path / 'lines.jsonl'
  lines.write_text('{"fid": 9.5}\n{"fid": 8.5}\n')
  record = runpy.run_path(str(RESULTS / 'record.py'))['main']
  monkeypatch.setitem(record.__globals__, 'HERE', tmp_path)
  monkeypatch.setitem(record.__globals__, 'commit', lambda: '0123abc')
  for name, files in (('one', [path]), ('two', [path, lines])):
    argv = ['record.py', name, '--command=x', '--note=busy', *map(str, files)]
    monkeypatch.setattr(sys, 'argv', argv)
    record()
  document = json.loads((tmp_path / 'one.json').read_text())
  assert list(document) == KEYS
  assert document['results'] == {'step_seconds': 0.25}
  assert (document['command'], document['commit']) == ('x', '0123abc')
  assert document['machine']['note'] == 'busy'
  assert document['machine']['devices'].endswith('x cpu')
  assert problems('<!-- results: one -->\nA step takes 250 ms.', tmp_path) == []
  both = json.loads((tmp_path / 'two.json').read_text())['results']
  assert both == {'new': {'step_seconds': 0.25}, 'lines': {'fid': 8.5}}


# Private words, and those of the field. `draw` is for the procedural shapes.
WORDS = {
  r'dr(?:aw|aws|awn|ew)': 'sample, generate',
  r'(?:picture|paint)\w*': 'image, sampler',
  'figures': 'metrics, results',
  r'(?:best|tracked|stored|other|decaying) averages?|average decaying': 'EMA',
  'lags': 'EMA minus parameters',
  'let go|wish(?:es|ed)? to stop': 'preemptible, stop request',
  '(?:left|leaves?|leaving) out': 'skipped, replaced, not shown',
  r'offer(?:s|ed|ing)?|owe[ds]?': 'say what is done',
  'those who|likewise|see there': 'a sentence that stands alone',
  'rooms?': 'folder',
}


def private_words(page: str) -> list[str]:
  found = []
  for block in blocks(page):
    text = ' '.join(prose(block).split())
    if text.startswith('```'):
      continue
    for pattern, better in WORDS.items():
      for match in re.finditer(rf'\b(?:{pattern})\b', text, re.IGNORECASE):
        drawn = match[0].lower().startswith('dr')
        if not (drawn and re.search('shapes?|scenes?', text)):
          found.append(f'{block.line}: {match[0]} (better: {better})')
  return found


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_words_are_those_of_the_field(page):
  assert private_words(page.read_text()) == []


def test_private_words_are_found():
  page = """
The painter draws pictures; figures of the best average.

Procedural shapes are drawn. `draw` and `leave_out` are code, the figure
is a diagram, on average. Records are left
out.

```sh
draw figures
```
"""
  assert [line.partition(' (')[0] for line in private_words(page)] == [
    *('2: draws', '2: painter', '2: pictures', '2: figures', '2: best average'),
    '4: left out',
  ]


def test_commands_in_docstrings_can_be_pasted():
  # In a string that is not raw, \ at the end of a line joins it with the next.
  modules = [*ROOT.glob('mdm_jax/**/*.py'), *ROOT.glob('configs/*.py')]
  for path in modules:
    text = ast.get_docstring(ast.parse(path.read_text())) or ''
    assert not re.search(r'\S {4,}-', text), path


def anchors(page: pathlib.Path) -> set[str]:
  """The anchors that GitHub gives the headings of a page."""
  text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)
  return {
    re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
    for heading in re.findall(r'^#+ (.*)', text, re.MULTILINE)
  }


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)
  for link in re.findall(r'\]\(([^)\s]+)\)', text):
    if '://' not in link:
      path, _, anchor = link.partition('#')
      target = page.parent / path if path else page
      assert target.exists(), link
      assert not anchor or anchor in anchors(target), link


def test_each_promise_names_a_test_that_exists():
  tests = '\n'.join(x.read_text() for x in (ROOT / 'tests').rglob('test_*.py'))
  defined = set(re.findall(r'^ *def (test_\w+)', tests, re.MULTILINE))
  page = (ROOT / 'docs/reliability.md').read_text()
  named = set(re.findall(r'\b(test_\w+)\b(?!\.py)', page))
  assert len(named) > 30
  assert not named - defined


def rows_of_keys() -> dict[str, str]:
  """The keys that docs/configuration.md has rows for, and their defaults."""
  found, prefix = {}, None
  for line in (ROOT / 'docs/configuration.md').read_text().splitlines():
    if not line.startswith('|'):
      prefix = None
      continue
    names, default, *_ = cells(line)
    names = re.findall('`([^`]+)`', names)
    if prefix is None:
      prefix = names[0] if names else ''
    else:
      defaults = default.split(', ') if len(names) > 1 else [default]
      found |= {prefix + name: each for name, each in zip(names, defaults)}
  return found


def flatten(tree: dict, prefix: str = ''):
  for key, value in tree.items():
    if isinstance(value, dict) and key != 'mesh':
      yield from flatten(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def as_shown(value) -> str:
  if isinstance(value, tuple):
    return ', '.join(map(str, value)) or '()'
  if isinstance(value, float):
    return str(value).replace('e-0', 'e-')
  return f'{value:,}' if type(value) is int and value > 9999 else str(value)


def test_every_key_has_a_row_with_its_default():
  values = dict(flatten(common.get_config().to_dict()))
  del values['stages']  # Lists, whose elements have tables of their own.
  for prefix, section in (
    ('model.levels[i].', common.level(64)),
    ('stages[i].', common.stage('64', 2)),
  ):
    values |= {prefix + key: value for key, value in section.items()}
  rows = rows_of_keys()
  assert rows.keys() == values.keys()
  in_words = {
    *('mesh', 'sharding_rules', 'model.levels', 'sampler.guidance_interval'),
    *('model.levels[i].resolution', 'model.levels[i].scale_condition'),
    *('stages[i].name', 'stages[i].num_levels', 'stages[i].loss_weights'),
    *('stages[i].mixed_ratio', 'diffusion.logit_normal', 'diffusion.p2'),
  }
  for key, value in values.items():
    if key not in in_words:
      assert rows[key] == as_shown(value), key


@pytest.mark.parametrize(
  'name, terms',
  (
    ('configuration', 'CFG; gradient accumulation; mixed precision; EMA; fsdp'),
    ('how_it_works', 'CFG; inference; mixed precision; gradient accumulation'),
    ('weights', 'fine-tun; inference; mixed precision; LoRA'),
    ('tpu', 'gradient accumulation; fsdp; Spot'),
    ('video', 'temporal attention; joint space-time attention'),
    ('tpu_memory', 'gradient checkpointing; inference'),
    ('reference', 'classifier-free guidance; inference'),
    ('benchmarks', 'inference; MFU; CFG'),
    ('sampling', 'guidance; EMA; seed'),
    ('evaluation', 'CFG; FID; CLIP; standard error; EMA'),
    ('data', 'validation split; webdataset; Parquet'),
    ('monitoring', 'TensorBoard; wandb; validation split; MFU'),
  ),
)
def test_a_page_is_found_by_the_words_of_the_field(name, terms):
  text = (ROOT / 'docs' / f'{name}.md').read_text()
  for term in terms.split('; '):
    assert re.search(term.replace(' ', r'\s+'), text, re.IGNORECASE), term


def test_the_words_of_shapes_are_listed():
  text = (ROOT / 'docs/data.md').read_text()
  for words in (
    shapes.SHAPES,
    shapes.COLORS,
    shapes.PATTERNS,
    shapes.SIZES,
    shapes.BACKGROUNDS,
    shapes.PLACES,
    shapes.INVERSE,
  ):
    assert f'| {", ".join(words)} |' in text


def test_a_newcomer_reads_few_words_before_the_first_sample():
  text = (ROOT / 'README.md').read_text()
  command = 'python -m mdm_jax.sample --workdir=runs/shapes_64'
  before = text[: text.index(command)]
  shown = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', before)
  assert 100 < len(re.findall(r'\w[\w\'-]*', shown)) <= 300
