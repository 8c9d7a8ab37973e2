"""What a run has measured at what cost, read from its metrics.jsonl."""

import json

import pytest

from mdm_jax.report import training_curve


def train_line(stage, step, pace, flops):
  """A line of progress: seconds and FLOPs of a step."""
  line = {'stage': stage, 'step': step, 'loss': 1.0, 'seconds_per_step': pace}
  return line if flops is None else line | {'flops_per_second': flops / pace}


def eval_line(stage, step, **values):
  return {'stage': stage, 'step': step, **values}


def write(workdir, *lines):
  text = ''.join(json.dumps({'time': 1.5} | line) + '\n' for line in lines)
  (workdir / 'metrics.jsonl').write_text(text)


def test_cost_adds_up_over_steps_and_stages(tmp_path):
  write(
    tmp_path,
    train_line('16', 10, 0.5, 100),
    eval_line('16', 10, held_out_loss_16=3.0),
    # Between two lines of progress; 4 of these steps are taken again.
    eval_line('16', 16, held_out_loss_16=9.0),
    train_line('16', 20, 9.0, 100),
    eval_line('16', 16, held_out_loss_16=2.0),
    train_line('16', 20, 1.0, 100),
    train_line('64', 5, 2.0, 1000),
    eval_line('64', 5, held_out_loss_64=1.0, held_out_loss_8=4.0),
    eval_line('64', 5, accuracy_all=0.5, held_out_loss_64='nan'),
    eval_line('goodput', 1, step_seconds=7.0),
  )
  first, second, last = training_curve.read(tmp_path)
  assert (first.stage, first.step, first.metrics) == (
    '16',
    10,
    {'held_out_loss_16': 3.0},
  )
  assert (first.flops, first.seconds) == pytest.approx((1000, 5))
  assert second.metrics == {'held_out_loss_16': 2.0}
  assert (second.flops, second.seconds) == pytest.approx((1600, 5 + 6))
  assert last.metrics == {'held_out_loss_8': 4.0, 'accuracy_all': 0.5}
  assert (last.flops, last.seconds) == pytest.approx((2000 + 5000, 15 + 10))


def test_what_is_not_known_stays_unknown(tmp_path):
  assert training_curve.read(tmp_path) == []
  write(
    tmp_path,
    train_line('16', 10, 0.5, None),
    train_line('64', 5, 2.0, 1000),
    eval_line('64', 5, held_out_loss_64=1.0),
  )
  (found,) = training_curve.read(tmp_path)
  assert (found.flops, found.seconds) == (None, 15)
