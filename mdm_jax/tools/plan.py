r"""Plans a run on TPUs or GPUs: does it fit, how fast, and what does it cost?

  python -m mdm_jax.tools.plan --config=configs/cc12m_1024.py \
      --topology=v5e:4x4 --config.mesh.fsdp=16
  python -m mdm_jax.tools.plan … --stage=2 --batch_per_chip=8
  python -m mdm_jax.tools.plan … --stage=2 --search --quick
  python -m mdm_jax.tools.plan … --price=1.2

A host of GPUs is h100:1, :2, :4, :8 or h200. Needs no TPU and no GPU, but their
compilers on an x86 machine: `pip install libtpu` or `"jax[cuda12]"`.
Step times are lower bounds from the roofline model: arithmetic, memory and
links overlap and run at their peaks. Of several microbatches or sampling steps
on a TPU they are not: what runs once, as the optimizer, counts as often.
A large step takes many minutes to compile, with --quick a third of that;
results are cached.
"""

from collections.abc import Mapping, Sequence
import copy
import itertools
import sys
import tempfile
from typing import Any

from absl import flags
from etils import epath
import jax
from ml_collections import ConfigDict

from mdm_jax import mixed_batch
from mdm_jax.builders import ranges, recipes
from mdm_jax.builders.config import AUTOENCODER
from mdm_jax.builders.model import require_stage
from mdm_jax.models.unet import REMAT
from mdm_jax.report import console
from mdm_jax.runtime import (
  command,
  compilation_cache,
  flag_types,
  sharding,
  value_types,
)
from mdm_jax.runtime.peaks import Chip
from mdm_jax.tools.compile_ahead import find_devices, measure, prepare

_GIB = 2**30
_WORTH = 1.05  # least gain in images/s for which the search doubles the batch


def roofline(weight: Mapping[str, Any], chip: Chip) -> dict[str, float]:
  """Seconds of each part of a step at its peak.

  A step takes at least as long as its longest part (roofline model).

  Args:
    weight: from `compile_ahead.weigh`.
    chip: peaks of the chip.
  """
  return {
    'arithmetic': weight['flops'] / chip.flops,
    'memory': weight['bytes'] / chip.bandwidth,
    'links': sum(weight['collectives'].values()) / chip.links,
  }


def chip_hours(
  images: float, images_per_second: float, num_chips: int
) -> float:
  """Chip-hours that a slice takes to train on a number of images."""
  return images / images_per_second * num_chips / 3600


def report(
  measured: Mapping[str, Any], chip: Chip, images: int, num_chips: int
) -> tuple[list[list[str]], float | None]:
  """Table rows about a step, and the images/s of the slice.

  Args:
    measured: from `measure`.
    chip: peaks of the slice's chips.
    images: images of a step, over all chips.
    num_chips: number of chips in the slice.

  Returns:
    Rows of two texts, and at most so many images/s; None if the step does not
    fit into memory, which a GPU's compiler does not refuse.
  """

  def gib(size):
    return f'{size / _GIB:.2f} GiB'

  used = measured.get('needed') or measured['memory'] / _GIB
  left = chip.memory - used
  fits = 'needed' not in measured and left >= 0
  rows = [
    [
      'fits',
      f'{"yes" if fits else "no"}: {used:.2f} of {chip.memory} GiB, '
      + (f'{left:.2f} left' if fits else f'{-left:.2f} too much'),
    ]
  ]
  if 'needed' in measured:
    return rows, None
  rows += [
    [f'memory: {kind}', gib(size)]
    for kind, size in measured['state'].items()
    if size
  ]
  per_chip = images / num_chips
  rows += [
    ['memory: activations', gib(measured['activations'])],
    [
      'arithmetic',
      f'{measured["flops"] / 1e12:.2f} TFLOP, '
      f'{measured["flops"] / per_chip / 1e12:.2f} an image',
    ],
    [
      'memory moved',
      f'{measured["bytes"] / 1e9:.1f} GB, '
      f'{measured["bytes"] / per_chip / 1e9:.1f} an image',
    ],
  ]
  rows += [
    [f'{kind}', f'{size / 1e9:.3f} GB']
    for kind, size in sorted(measured['collectives'].items())
  ]
  parts = roofline(measured, chip)
  seconds = max(parts.values())
  rows.append(
    [
      'roofline',
      f'{seconds * 1e3:.0f} ms ('
      + ', '.join(f'{name} {part * 1e3:.0f}' for name, part in parts.items())
      + ')',
    ]
  )
  if not fits:
    return rows, None
  rows.append(['images/s', f'at most {images / seconds:.1f}'])
  return rows, images / seconds


def _caveats(measured: Mapping[str, Any]) -> list[str]:
  """Says so if times are no lower bounds, see `compile_ahead.weigh`."""
  turns = measured.get('turns', 1)
  if turns == 1:
    return []
  return [
    f'What runs once, as the optimizer or the decoder, counts {turns} times, '
    'with the loop: the times may be too long, and are no lower bounds.'
  ]


def plan(
  config: ConfigDict,
  topology: str,
  stages: Sequence[int],
  batch_per_chip: int | None,
  step: str,
  price: float | None,
  directory: epath.Path | None,
) -> None:
  """Prints a table for each stage, and the cost of the run.

  Args:
    config: configuration of the run.
    topology: name of the slice.
    stages: indices of the stages.
    batch_per_chip: images on each chip; None for the stages' own batches.
    step: 'train' or 'sample'.
    price: price of a chip-hour, or None.
    directory: directory of the cached results.

  Raises:
    FileNotFoundError: a file that the config names is missing.
    ValueError: the config does not fit the slice.
  """
  chip, devices = find_devices(topology)
  print(
    f'{topology}, {len(devices)} chips of {chip.flops / 1e12:.0f} TFLOP/s, '
    f'{chip.memory} GiB at {chip.bandwidth / 1e9:.0f} GB/s, links of '
    f'{chip.links / 1e9:.0f} GB/s'
  )
  hours = []
  for index in stages:
    with tempfile.TemporaryDirectory() as scratch:
      prepared, notes = prepare(
        config, index, batch_per_chip, len(devices), scratch
      )
      if step == 'sample' and prepared.text.encoder == 't5':
        prepared.text.encoder = 'precomputed'
        notes.append('The text encoder, which runs once, is not included.')
      measured = measure(prepared, topology, step, directory)
    notes += _caveats(measured)
    stage = prepared.stages[-1]
    images = stage.batch_size if step == 'train' else prepared.eval.batch_size
    rows, rate = report(measured, chip, images, len(devices))
    rows.append(['compiled in', console.duration(measured['seconds'])])
    if rate and step == 'train':
      given = config.stages[index]
      hours.append(
        chip_hours(given.steps * given.batch_size, rate, len(devices))
      )
      rows.append(['chip-hours', _price(hours[-1], price)])
    print(
      '\n'
      + console.table(
        rows,
        [
          f"stage '{stage.name}', {step} step",
          f'{images / len(devices):g} images a chip, '
          f'{_mesh(prepared, devices)}',
        ],
      )
    )
    print('\n'.join(notes), flush=True)
  if len(hours) == len(stages) > 1:
    print(f'All {len(hours)} stages: {_price(sum(hours), price)}')


def _price(hours: float, price: float | None) -> str:
  return f'at least {hours:,.0f}' + (
    '' if price is None else f', at {price:g} each {hours * price:,.0f}'
  )


def _mesh(config: ConfigDict, devices: Sequence[jax.Device]) -> str:
  sizes = sharding.mesh_sizes(config.mesh, len(devices))
  return 'mesh ' + ' x '.join(f'{n} {axis}' for axis, n in sizes.items())


def search(
  config: ConfigDict, topology: str, index: int, directory: epath.Path | None
) -> None:
  """Tries meshes, rematerialisation and batches, and recommends the fastest.

  For each mesh and policy, the batch on each chip is doubled until it does not
  fit or gains little. Meshes and policies come in the order of the memory that
  they save. The search ends with the first for which memory was not the limit,
  since saving more would only cost time.

  Args:
    config: configuration of the run.
    topology: name of the slice.
    index: index of the stage.
    directory: directory of the cached results.

  Raises:
    FileNotFoundError: a file that the config names is missing.
    ValueError: the config fits the slice with none of them.
  """
  chip, devices = find_devices(topology)
  count = len(devices)
  stage = config.stages[index]
  best = refused = None
  is_measured = False
  for fsdp, remat in itertools.product(
    sorted({1, min(16, count), count}), REMAT
  ):
    rate, ended = 0, False
    # The least batch: one pattern of a mixed batch in each microbatch.
    batch = mixed_batch.least_batch(stage.mixed_ratio) * stage.accumulate
    while not ended:
      tried = copy.deepcopy(config)
      tried.mesh.update(data=-1, fsdp=fsdp, spatial=1)
      for level in tried.model.levels:
        level.remat = remat
      what = f'--config.mesh.fsdp={fsdp} remat={remat} --batch_per_chip={batch}'
      try:
        with tempfile.TemporaryDirectory() as scratch:
          prepared, _ = prepare(tried, index, batch, count, scratch)
          measured = measure(prepared, topology, 'train', directory)
      except ValueError as error:  # For example a parameter is indivisible.
        print(f'{what}: {error}', flush=True)
        refused = error
        break
      before, is_measured = rate, True
      rows, rate = report(measured, chip, batch * count, count)
      print(
        f'{what}: {rows[0][1]}'
        + (f'; at most {rate:.1f} images/s' if rate else ''),
        flush=True,
      )
      if not rate:
        break
      if best is None or rate > best[0]:
        best = rate, what, measured
      ended = rate < _WORTH * before
      batch *= 2
    if ended:
      break
  if refused and not is_measured:
    raise refused
  if best is None:
    print('Nothing fits.')
    return
  _, what, measured = best
  print('\n'.join([*_caveats(measured), f'Best: {what}']))


def main(_: list[str]) -> None:
  """Plans a run, or searches for the fastest settings."""
  values = flags.FLAGS
  # Arrays on this machine are on the CPU.
  jax.config.update('jax_platforms', 'cpu')
  if values.quick:
    jax.config.update('jax_optimization_level', 'O1')
  console.setup_logging()
  cache = compilation_cache.directory('plan')
  if values.cache:
    cache = epath.Path(values.cache)
  config = values.config
  try:
    stages = range(len(config.stages))
    if values.stage is not None:
      require_stage(config, values.stage)
      stages = [values.stage]
    elif values.step == 'sample':
      # An autoencoder samples nothing.
      stages = [i for i in stages if config.stages[i].kind != AUTOENCODER]
    if values.search:
      flag_types.refuse(('step', 'batch_per_chip', 'price'), '--search')
      search(config, values.topology, stages[-1], cache)
    else:
      plan(
        config,
        values.topology,
        stages,
        values.batch_per_chip,
        values.step,
        values.price,
        cache,
      )
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  recipes.define('Recipe, as for mdm_jax.main.')
  flag_types.define(
    'topology',
    None,
    value_types.Text(
      'a TPU slice or a host of GPUs, such as v5e:4x4 or h100:8',
      r'\w+:\d+(x\d+)*',
    ),
    'TPU slice or host of GPUs, such as v5e:4x4 or h100:8.',
    required=True,
  )
  flag_types.integer(
    'stage',
    None,
    0,
    99,
    'Index of the stage, from 0. Default: all, or the last with --search.',
  )
  flag_types.define(
    'batch_per_chip',
    None,
    ranges.KEYS['eval.batch_size'],
    "Images on each chip. Default: the stage's batch divided by the chips.",
  )
  flag_types.define(
    'step',
    'train',
    value_types.Choice(('train', 'sample')),
    'Step to compile.',
  )
  flags.DEFINE_bool(
    'search',
    False,
    'Try meshes, rematerialisation and batches, and recommend the fastest.',
  )
  flags.DEFINE_bool(
    'quick',
    False,
    "Compile at XLA's optimisation level O1, in a third of the time. Results "
    'are approximate: XLA searches less for the best convolution windows.',
  )
  flag_types.define(
    'price',
    None,
    value_types.Number(float, 0, 10**6),
    'Price of a chip for an hour.',
  )
  flag_types.define(
    'cache',
    None,
    value_types.Path('directory', output=True),
    'Directory of cached results. Default: ~/.cache/mdm_jax/plan.',
  )
  command.run(main, recipes.parse_flags)
