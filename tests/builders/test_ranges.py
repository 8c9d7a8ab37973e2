"""Every key has a type and a range; recipes and changed keys are explained."""

import math

from ml_collections import ConfigDict, config_dict
import numpy as np
import pytest

from configs import common
from mdm_jax.builders import ranges, recipes
from mdm_jax.builders.check import check
from mdm_jax.diffusion import samplers
from mdm_jax.models.unet import FRAME_ATTENTION, KINDS, REMAT, SHARE
from mdm_jax.optim import post_hoc_ema
from mdm_jax.runtime import sharding
from mdm_jax.runtime.value_types import Choice, Number, Path, Tuple
from tests import commands, fuzzing

VALUES = (
  None,
  True,
  False,
  '',
  'x',
  ' ',
  '\0',
  '\udcff',
  'a/b',
  '..',
  '~no_such_user/x',
  'gs://x',
  '/dev/null',
  0,
  1,
  -1,
  2**31,
  2**63,
  10**400,
  0.5,
  -0.5,
  1e30,
  1e-300,
  math.nan,
  math.inf,
  -math.inf,
  np.int64(3),
  (),
  (1,),
  (math.nan, 1.0),
  (0.5, 0.5),
  ('x',),
  (True, True),
  (2**70,),
  [1],
  {},
  {'a': 1},
  b'x',
)


def leaves(section: ConfigDict, path: str = '') -> dict[str, tuple]:
  """(section, name) of every key, by its path."""
  found = {}
  for name, value in section.items():
    key = f'{path}.{name}' if path else name
    if isinstance(value, ConfigDict):
      found |= leaves(value, key)
    elif key in ('stages', 'model.levels'):
      for i, child in enumerate(value):
        found |= leaves(child, f'{key}[{i}]')
    else:
      found[key] = section, name
  return found


def put(section: ConfigDict, name: str, value) -> None:
  """Puts any value at a key, as a recipe may."""
  object.__getattribute__(section, '_fields')[name] = value


def test_the_table_has_every_key(make_config):
  assert {ranges.pattern(key) for key in leaves(make_config())} == set(
    ranges.KEYS
  )


def test_every_number_has_a_range_and_every_path_is_checked(make_config):
  for key, (section, name) in leaves(make_config()).items():
    kind, value = ranges.KEYS[ranges.pattern(key)], section[name]
    element = kind.element if isinstance(kind, Tuple) else kind
    if isinstance(value, int | float) and not isinstance(value, bool):
      assert element.type is type(value), key
    if isinstance(element, Number):
      assert -30 <= element.low < element.high <= 2**32
    is_path = name in ('path', 'image_path', 'tokenizer', 'class_names')
    assert isinstance(kind, Path) == is_path, key


def test_numbers_of_numpy_become_those_of_python(make_config):
  """JSON has no others."""
  config = make_config()
  put(config.sampler, 'num_steps', np.int64(3))
  config.stages = [
    stage.to_dict() | {'steps': np.int32(20)} for stage in config.stages
  ]
  ranges.check(config)
  assert type(config.sampler.num_steps) is int
  assert [type(stage['steps']) for stage in config.stages] == [int, int]


def test_names_are_those_of_the_modules():
  def names(key):
    return set(ranges.KEYS[key].names)

  assert names('sampler.name') == set(samplers.SAMPLERS)
  assert names('sampler.threshold') == set(samplers.THRESHOLDS)
  assert names('model.levels[].remat') == set(REMAT)
  assert names('model.levels[].frame_attention_kind') == set(FRAME_ATTENTION)
  assert names('model.levels[].kind') == set(KINDS)
  assert names('model.levels[].share') == set(SHARE)
  assert ranges.SIGMA_REL.high == post_hoc_ema.MAX_SIGMA_REL
  post_hoc_ema.exponent(ranges.SIGMA_REL.low)


def test_values_out_of_range_are_named(make_config):
  config = make_config()
  for key, (section, name) in leaves(config).items():
    kind, right = ranges.KEYS[ranges.pattern(key)], section[name]
    wrong = [None, {}, b'x', math.nan]
    if isinstance(kind, Number):
      wrong += [math.inf, -math.inf, True, '1', (1,)]
      wrong += [kind.high + 1, kind.low - 3]
      wrong += [kind.low + 0.5] if kind.type is int else []
    elif isinstance(kind, Tuple):
      wrong += [1, 'x', [1], ('x',), (math.nan,) * 2, (True,) * 2, (-99,) * 2]
    elif isinstance(kind, Choice):
      wrong += ['none ', 1, 'tfds:', 'NAME']
      wrong += [] if '' in kind.names else ['']
    elif isinstance(kind, Path):
      wrong += ['gs://x', 'gs:/x', '$HOME', ' x', '~no_such_user/x', 'x\0']
    else:
      wrong += [5]
    for value in wrong:
      put(section, name, value)
      with pytest.raises(ValueError) as error:
        ranges.check(config)
      line = str(error.value)
      assert line.startswith(key) and '\n' not in line, (key, value)
      assert line.startswith(f'{key}={value!r}: '), line
    put(section, name, right)


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_value_is_taken_or_refused(count, make_config):
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'spatial': 1})
  keys = list(leaves(make_config()))

  def make(rng):
    return [
      (str(rng.choice(keys)), VALUES[rng.integers(len(VALUES))])
      for _ in range(rng.integers(1, 3))
    ]

  def read(changes):
    config = make_config()
    found = leaves(config)
    for key, value in changes:
      put(*found[key], value)
    try:
      check(config, mesh)
    except (ValueError, FileNotFoundError) as error:
      assert '\n' not in str(error), error

  fuzzing.check(read, make, count, refuses=())


def test_home_directories_are_found(make_config, monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  config = make_config().lock()
  config.data.path = '~/data'
  config.text.tokenizer = '~'
  with pytest.raises(ValueError, match=r"text.tokenizer='~': this is a dir"):
    ranges.check(config)
  config.text.tokenizer = ''
  ranges.check(config)
  assert config.data.path == f'{tmp_path}/data'


def test_sections_that_are_something_else(make_config):
  config = make_config()
  del config.sampler.eta
  with pytest.raises(ValueError, match='^sampler.eta is missing'):
    ranges.check(config)
  config = make_config()
  with config.stages[1].unlocked():
    del config.stages[1].steps
  with pytest.raises(ValueError, match=r'^stages\[1\].steps is missing'):
    ranges.check(config)
  for section, name in (('', 'stages'), ('model', 'levels')):
    config = make_config()
    del (config[section] if section else config)[name]
    with pytest.raises(ValueError, match=f'{name} is missing: start from'):
      ranges.check(config)
  config = make_config()
  config.stages = [*config.stages, 3]
  with pytest.raises(ValueError, match=r'^stages\[2\]=3: give a section'):
    ranges.check(config)
  config = make_config()
  config.data.new = 1
  with pytest.raises(ValueError, match='^data.new: no such key'):
    ranges.check(config)
  config = make_config()
  config.data.new = config  # It would never end.
  with pytest.raises(ValueError, match='^data.new: no such key'):
    ranges.check(config)
  config = make_config()
  config.text.path = config_dict.placeholder(str)
  with pytest.raises(ValueError, match='^text.path=None: give the path'):
    ranges.check(config)
  with pytest.raises(ValueError, match='is missing'):
    ranges.check(ConfigDict())
  config = common.get_config()  # Without levels: `check_stages` says so.
  ranges.check(config)


RECIPES = {
  'no Python': ('get config', 'line 1: SyntaxError'),
  'a binary': ('\0\x01', 'SyntaxError'),
  'no function': ('x = 1', 'it has no function get_config()'),
  'a value': ('get_config = 3', 'it has no function get_config()'),
  'another type': ('def get_config():\n  return {}', 'returns dict: return a'),
  'nothing': ('def get_config(): pass', 'returns NoneType'),
  'no variants': ('def get_config(): pass', 'it has no variants', ':x'),
  'needs one': ('def get_config(mode): pass', 'it needs a variant'),
  'an error': ('def get_config():\n  1 / 0', 'line 2: ZeroDivisionError'),
  'at import': ('import no_such_module', 'line 1: ModuleNotFoundError'),
  'an exit': ('raise SystemExit(3)', 'line 1: SystemExit: 3'),
  'a loop': ('def get_config(): return get_config()', 'RecursionError'),
  'no keys': (
    'from ml_collections import ConfigDict\n'
    'def get_config(): return ConfigDict()',
    'seed is missing: start from configs/common.py',
  ),
}


@pytest.mark.parametrize('case', RECIPES)
def test_a_recipe_that_is_wrong(case, tmp_path):
  text, message, *mode = RECIPES[case]
  path = tmp_path / 'mine.py'
  path.write_text(text)
  with pytest.raises(ValueError) as error:
    ranges.check(recipes._RecipeParser().parse(f'{path}{"".join(mode)}'))
  assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
  'line, message',
  [
    (
      'config.model.levles = []',
      'no such key (model.levles): did you mean model.levels?',
    ),
    (
      'config.sampler.update(guidence=3)',
      'no such key (sampler.guidence): did you mean sampler.guidance?',
    ),
    (
      "config.update({'data': {'pth': 'x'}})",
      'no such key (data.pth): did you mean data.path?',
    ),
    (
      'common.level(16, chanels=(8,))',
      'no such key (model.levels[].chanels): did you mean '
      'model.levels[].channels?',
    ),
    (
      "common.stage('a', 1, stepss=3)",
      'no such key (stages[].stepss): did you mean stages[].steps?',
    ),
    # It is a key of another section.
    (
      'config.learning_rate = 1',
      'no such key (learning_rate): did you mean stages[].learning_rate?',
    ),
    (
      'config.num_heads = 1',
      'no such key (num_heads): did you mean text.num_heads or '
      'model.text.num_heads or model.levels[].num_heads?',
    ),
    ('print(config.smpler)', 'no such key (smpler): did you mean sampler?'),
    ("config['text']['xyz'] = 1", 'no such key (text.xyz); configs/common.py'),
    ('config.text.model = 3', 'no such key (text.model); configs/common.py'),
    (
      'config.eval.update(seed=3)',
      'no such key (eval.seed): did you mean seed?',
    ),
    (
      "config.update_from_flattened_dict({'optimiser.name': 'muon'})",
      'no such key (optimiser.name): did you mean optimizer.name?',
    ),
    ('config.update({3: 4})', 'no such key (3); configs/common.py'),
    ('del config.eval.every', 'eval.every cannot be deleted: give it another'),
    (
      "common.ConfigDict({'stages': []}).seed",
      'seed is missing: start from common.get_config(); ',
    ),
    (
      "config.stages = common.stage('a', 1)",
      'stages=accumulate: 1 ',
    ),
    (
      'config.model.levels = {}',
      'model.levels={}: give a list of sections; common.level() returns one.',
    ),
    ("config.seed = 'x'", "seed='x': give an integer from 0 to"),
    ('config.data = 3', 'data=3: change one of its keys instead.'),
    ("config['sampler.eta'] = 3", 'ValueError: ConfigDict does not '),
    ('config.data.items(3, 4)', 'TypeError: '),
    ('{}.x', "AttributeError: 'dict' object has no attribute 'x'"),
    ("{'a': 1}['b']", "KeyError: 'b'"),
  ],
)
def test_a_wrong_key_in_a_recipe(line, message, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from configs import common\ndef get_config():\n'
    f'  config = common.get_config()\n  {line}\n  return config\n'
  )
  with pytest.raises(ValueError) as error:
    recipes._RecipeParser().parse(str(path))
  text = str(error.value)
  assert text.startswith(f'{path}, line 4: {message}') and '\n' not in text


def test_paths_of_no_recipe(tmp_path):
  parse = recipes._RecipeParser().parse
  for path, message in (
    (tmp_path, 'this is a directory'),
    (tmp_path / 'missing.py', 'there is no such file'),
    ('shapes_65', 'or one of captioned_images, cc12m_1024, '),
    ('', 'give the path'),
    (':smoke', 'give the path'),
    ('shapes_64:large', "Unknown mode 'large'"),
  ):
    with pytest.raises(ValueError) as error:
      parse(str(path))
    assert message in str(error.value)
  assert parse('shapes_64:smoke').stages[0].steps == 6


@pytest.mark.parametrize(
  'flag, message',
  [
    ('stages.0.steps=3', 'did you mean stages[0].steps?'),
    ('stages[7].steps=3', 'stages has 2 elements'),
    ('sampler.guidence=3', 'did you mean sampler.guidance?'),
    ('stages=3', '--config.stages: change one of its keys'),
    ('eval=3', '--config.eval: change one of its keys'),
    (
      'model.levels[0].channels[0]=8',
      'change all of model.levels[0].channels: give a tuple, each an integer',
    ),
    ('stages[0].steps=x', 'give an integer from 1 to 1,000,000,000'),
    ('optimizer.b1=nan', 'optimizer.b1=nan: give a number from 0 to'),
    ('stages[0].learning_rate=-1', 'learning_rate=-1.0: give a number from 0'),
    ('data={}', 'data.name is missing'),
    ('stages[0:1].steps=3', 'no such key'),
    ('((=3', 'no such key'),
  ],
)
def test_a_changed_key_that_is_wrong(flag, message, tmp_path):
  result = commands.run(
    'mdm_jax.main',
    '--config=shapes_64:smoke',
    f'--config.{flag}',
    f'--workdir={tmp_path}/run',
  )
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ') and message in line
  assert not (tmp_path / 'run').exists()
