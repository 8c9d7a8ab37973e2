"""The order of modules: each imports only from rows below its own."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1] / 'mdm_jax'
# Rows of modules, not packages, so that cycles within a package are found too.
# A module imports only from rows below its own.
ROWS = (
  'main sample evaluate demo',
  'tools.compare_models',
  'tools.recipe_costs',
  'tools.plan tools.bench tools.bench_data tools.compare_samplers '
  'tools.compare_with_data tools.emoji_tars tools.nearest_images '
  'tools.export_weights tools.import_ml_mdm tools.index_tars '
  'tools.precompute_text tools.prepare_clips tools.prepare_data tools.sweep '
  'tools.train_tokenizer',
  'tools.compile_ahead tools.conversion tools.sweep_training '
  'tools.sweep_evaluation',
  'tools.hlo tools.tfds_writer',
  'tools.worker_pool tools.run_commands',
  'serving.page',
  'serving.html serving.access',
  'serving.queue serving.model_card serving.assets',
  'serving.film',
  'training.loop',
  'training.summary',
  'training.hooks training.initial_state',
  'training.monitor',
  'training.stage_checkpoints training.run training.grow training.expected',
  'inference.pipeline',
  'inference.evaluation',
  'inference.sample_metrics',
  'inference.shapes_features inference.labelled_features',
  'inference.classifier_features',
  'inference.references',
  'inference.session inference.validation inference.feature_extractors '
  'inference.split_images',
  'inference.weights inference.run_flags',
  'builders.check',
  'builders.check_levels',
  'builders.stage builders.prompts builders.equal_compute',
  'builders.autoencoder_stage',
  'builders.base_stage',
  'builders.model builders.data',
  'builders.text builders.sweep_grid',
  'builders.recipes',
  'builders.listing',
  'builders.config',
  'builders.ranges',
  'steps.autoencoder',
  'steps.train steps.evaluate steps.sample',
  'steps.objective steps.sampler',
  'steps.state steps.clip_parts',
  'checkpoint.manager',
  'checkpoint.restore',
  'checkpoint.saved_steps',
  'checkpoint.contents',
  'checkpoint.manifest',
  'checkpoint.identity',
  'report.comparison',
  'report.sweep_results',
  'report.sample_directory report.progress report.metric_writer '
  'report.goodput report.evaluations report.training_curve report.plots',
  'report.background report.console report.gallery report.trackers '
  'report.layouts',
  'report.grid',
  'interop.hugging_face interop.ml_mdm',
  'interop.torch_checkpoint',
  'interop.torch_pickle interop.file_types',
  'optim.optimizer optim.ema optim.post_hoc_ema optim.skip_step',
  'data',
  'runtime.command',
  'runtime.distributed runtime.flag_types runtime.compilation_cache '
  'runtime.remote_reads',
  'runtime.preemption runtime.watchdog runtime.directory_lock',
  'runtime.bucket_lock',
  'runtime.ending runtime.rendezvous runtime.lock_holder '
  'runtime.replica_check runtime.cpu runtime.peaks runtime.sharding '
  'runtime.appending runtime.value_types runtime.printable',
  'runtime.files',
  'runtime.buckets runtime.google_storage',
  'runtime.environment',
  # Packages without order, as data is: their own modules may import each other.
  'diffusion models eval',
  'mixed_batch child_process',
)
LEAVES = 'diffusion', 'models', 'data', 'eval'
CONFIG_DICT = (
  'main sample evaluate demo tools serving training inference builders'
)
FORBIDDEN = (
  'configs',
  'tensorflow',
  'torch',
  'transformers',
  'clu.metric_writers',
  'clu.periodic_actions',
  'clu.checkpoint',
)
# Modules that may use what knows the disk alone: pathlib, os, shutil, open. All
# others open paths with epath or `runtime.files`, as they may be in a bucket,
# and `pathlib.Path('gs://a')` is the local directory gs:/a.
ON_DISK = {
  'builders.recipes': 'the shipped recipes',
  'data.folders': 'folders of images on the disk; links and pipes in them',
  'data.images': 'names of files',
  'data.inputs': 'folders of images on the disk',
  'data.parquet': 'whether there is a tar beside a file of img2dataset',
  'data.sources': 'ArrayRecord, which is refused in a bucket',
  'data.tar_index': 'tars on the disk',
  'inference.feature_extractors': 'a named pipe, which epath takes for a file',
  'interop.file_types': 'local copies of weights',
  'report.background': 'lines that are appended on the disk',
  'report.console': "this package's own directory",
  'report.sample_directory': 'samples on the disk',
  'report.trackers': 'event files on the disk',
  'runtime.directory_lock': 'locks of the kernel',
  'runtime.ending': '/dev/null',
  'runtime.environment': '/proc and /dev',
  'runtime.lock_holder': '/proc',
  'runtime.files': 'temporary files and local copies',
  'runtime.remote_reads': 'files on the disk, where nothing is requested',
  'runtime.value_types': 'checks of paths on the disk',
  'tools.bench': 'traces, which the profiler writes to the disk',
  'tools.compile_ahead': "this package's own source",
  'tools.precompute_text': 'the local copy of a data set',
  'training.hooks': 'traces, which the profiler writes to the disk',
}
OF_OS = (
  'access chmod link listdir lstat makedirs mkdir open remove removedirs '
  'rename renames replace rmdir scandir stat symlink truncate unlink utime walk'
)
# Also those that ask for the current directory.
OF_OS_PATH = (
  'abspath exists getatime getctime getmtime getsize isdir isfile islink '
  'ismount lexists realpath samefile'
)
FILES = sorted(path for path in ROOT.rglob('*.py') if path.stem != '__init__')
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


def module_of(path: pathlib.Path) -> str:
  """'report.grid' of mdm_jax/report/grid.py."""
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


def row(name: str) -> int:
  """The row of a module, or of a name in it, without 'mdm_jax.'."""
  found = [
    index
    for index, modules in enumerate(ROWS)
    if any(is_in(name, module) for module in modules.split())
  ]
  assert len(found) == 1, f'{name} is in rows {found} of the table'
  return found[0]


def leaf(name: str) -> str | None:
  return next((leaf for leaf in LEAVES if is_in(name, leaf)), None)


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
  own = module_of(path)
  for name in imports(path.read_text()):
    if not is_in(name, 'mdm_jax') or name == 'mdm_jax':  # Imports nothing.
      continue
    other = name.removeprefix('mdm_jax.')
    same_leaf = leaf(own) and leaf(own) == leaf(other)
    assert same_leaf or row(other) > row(own), name


def uses_disk(source: str) -> set[str]:
  """What a module uses that opens or asks for files of the disk alone."""
  found = imports(source) & {'pathlib', 'shutil'}
  for node in ast.walk(ast.parse(source)):
    name = ast.unparse(node) if isinstance(node, ast.Attribute) else ''
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
      name = node.func.id
    module, _, function = name.rpartition('.')
    names = {'': 'open', 'os': OF_OS, 'os.path': OF_OS_PATH}.get(module, '')
    if function in names.split():
      found.add(name)
  return found


def test_paths_that_may_be_in_a_bucket_are_opened_by_epath():
  assert uses_disk(
    'import os, pathlib\nopen(os.path.join(a, b))\nos.path.exists(a)'
    '\nos.stat(a)\nepath.Path(a).open()\nparquet.open(a)\nos.open'
  ) == {'pathlib', 'open', 'os.path.exists', 'os.stat', 'os.open'}
  found = {
    module_of(path): used
    for path in FILES
    if (used := uses_disk(path.read_text()))
  }
  assert found.keys() - ON_DISK.keys() == set(), found
  assert ON_DISK.keys() - found.keys() == set(), 'these need it no longer'


def test_leaves_have_no_cycles():
  arrows = {
    module_of(path): {
      name.removeprefix('mdm_jax.')
      for name in imports(path.read_text())
      if is_in(name, 'mdm_jax')
    }
    for path in FILES
    if leaf(module_of(path))
  }
  while arrows:
    free = [
      name
      for name, others in arrows.items()
      if not any(is_in(other, rest) for other in others for rest in arrows)
    ]
    assert free, f'{sorted(arrows)} import each other'
    for name in free:
      del arrows[name]


@pytest.mark.parametrize('path', FILES, ids=NAMES)
def test_forbidden_imports(path):
  source = path.read_text()
  for name in imports(source):
    assert not any(is_in(name, other) for other in FORBIDDEN), name
  if not any(is_in(module_of(path), room) for room in CONFIG_DICT.split()):
    assert 'ConfigDict' not in source
    assert not any(is_in(name, 'ml_collections') for name in imports(source))


def test_a_package_is_described_and_imports_nothing():
  inits = list(ROOT.rglob('__init__.py'))
  assert {path.parent for path in FILES} == {path.parent for path in inits}
  for path in inits:
    tree = ast.parse(path.read_text())
    if path.parent != ROOT:
      assert len(ast.get_docstring(tree)) > 60, path
    # Importing a module must not import its whole package. `mdm_jax.load`
    # imports what it needs when it is called.
    now = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    assert not imports(ast.unparse(now)), path


def test_the_table_of_modules_is_complete():
  page = (ROOT.parent / 'docs' / 'how_it_works.md').read_text()
  linked = set(re.findall(r'\]\(\.\./mdm_jax/([\w/]+\.py)\)', page))
  assert linked == {str(path.relative_to(ROOT)) for path in FILES}


def test_a_run_is_opened_in_one_place():
  assert [
    module_of(path)
    for path in FILES
    if 'mdm_jax.builders.config.load_config' in imports(path.read_text())
  ] == ['inference.session']


def opens_images(source: str) -> bool:
  """Whether a module lets Pillow, or another package, read image files."""
  readers = 'imageio', 'cv2', 'skimage', 'PIL.Image.open'
  if any(is_in(name, reader) for name in imports(source) for reader in readers):
    return True
  attributes = [
    ast.unparse(node)
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Attribute)
  ]
  return any(
    name.endswith(('Image.open', 'ImageFile.Parser', '.imread'))
    for name in attributes
  )


def test_image_files_are_opened_in_one_place():
  """Which lists the formats: of all that Pillow knows, some start programs."""
  for source in (
    'from PIL import Image\nImage.open(path)',
    'import PIL.Image\nopen = PIL.Image.open',
    'from PIL.Image import open',
    'from PIL import ImageFile\nImageFile.Parser()',
    'import imageio.v3',
    'from matplotlib import pyplot\npyplot.imread(path)',
  ):
    assert opens_images(source)
  assert not opens_images('from PIL import Image\nopen(path)\nImage.new()')
  folders = ('mdm_jax', 'configs', 'launch')
  paths = [
    path for name in folders for path in ROOT.parent.glob(f'{name}/**/*.py')
  ]
  found = [path for path in paths if opens_images(path.read_text())]
  assert found == [ROOT / 'data' / 'images.py']
  assert found[0].read_text().count('Image.open(file, formats=formats)') == 1


def test_no_owner_is_looked_up():
  """As `epath.Path.stat` does, which fails for users without a name."""
  asking = [
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob('*.py')
    if '.stat()' in path.read_text()
  ]
  assert asking == ['runtime/files.py']  # Of buckets.


def test_functions_are_short():
  folders = ('mdm_jax', 'configs', 'launch', 'tests')
  for path in (
    path for folder in folders for path in ROOT.parent.glob(f'{folder}/**/*.py')
  ):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        length = node.end_lineno - node.lineno + 1
        assert length <= 80, f'{path}: {node.name} has {length} lines'
