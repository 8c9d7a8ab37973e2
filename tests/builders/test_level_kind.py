"""The recipes that compare kinds of levels are a fair comparison."""

import pathlib
import runpy

import pytest

from mdm_jax.builders.stage import make_stage
from mdm_jax.tools import bench

PATH = pathlib.Path(__file__).parents[2] / 'docs/results/level_kind.py'
RECIPES = runpy.run_path(str(PATH))


@pytest.mark.parametrize('data', ('', 'emoji_'))
def test_both_kinds_have_equal_flops(data):
  flops, shared = {}, {}
  for kind in ('transformer', 'unet'):
    config = RECIPES['get_config'](data + kind)
    (spec,) = config.stages
    stage = make_stage(config, 0)
    assert stage.resolutions == (32,)
    text = bench.make_text(config, 1)
    flops[kind] = spec.steps * stage.forward_flops({}, text)
    shared[kind] = config.to_dict() | {'model': config.model.text, 'stages': ()}
  assert flops['unet'] == pytest.approx(flops['transformer'], rel=0.01)
  assert shared['unet'] == shared['transformer']
