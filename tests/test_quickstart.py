"""The notebook runs from its first cell to its last."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_every_cell_runs(tmp_path):
  cells = json.loads((ROOT / 'docs/quickstart.ipynb').read_text())['cells']
  # As in Jupyter, the value of a cell's last line is displayed.
  code = '\n\n'.join(
    ''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code'
  )
  # A smaller network that is trained for fewer steps shows as much.
  for old, new in (
    (
      "shapes_64.get_config('smoke')",
      "toy.shrink(shapes_64.get_config('smoke'))",
    ),
    ('200', '8'),
  ):
    assert old in code
    code = code.replace(old, new)
  code = 'from tests import toy\n' + code
  code += """
assert [level.shape for level in images] == [(2, 8, 8, 3), (2, 16, 16, 3)]
assert len(frames) == 8
assert abs(coarse[0] - both[0]).max() == 0
"""
  result = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT / 'docs',
    capture_output=True,
    text=True,
    env=os.environ
    | {'PYTHONPATH': str(ROOT), 'TMPDIR': str(tmp_path), 'XLA_FLAGS': ''},
  )  # One device, as on a laptop.
  assert result.returncode == 0, result.stderr
  shown = [
    output
    for cell in cells
    if cell['cell_type'] == 'code'
    for output in cell['outputs']
    if 'data' in output
  ]
  assert sum('image/png' in output['data'] for output in shown) == 4
