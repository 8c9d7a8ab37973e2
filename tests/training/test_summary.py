"""The first lines of a run's log."""

import threading
import types

import jax
import jax.numpy as jnp
import pytest

from mdm_jax.builders.stage import make_stages
from mdm_jax.checkpoint import saved_steps
from mdm_jax.data.images import BadRecord
from mdm_jax.data.text import CAPTIONS_MODEL
from mdm_jax.runtime import environment, sharding
from mdm_jax.training import loop, summary


@pytest.fixture
def log(make_config, tmp_path, caplog):
  """(first, frozen=None, **changes) -> values of the lines by label."""

  def log(first, frozen=None, **changes):
    config = make_config()
    config.update_from_flattened_dict(changes)
    mesh = sharding.make_mesh(config.mesh)
    run = types.SimpleNamespace(
      mesh=mesh, frozen=frozen or {}, workdir=str(tmp_path)
    )
    with caplog.at_level('INFO', logger='absl'):
      caplog.clear()
      summary.log_summary(run, make_stages(config), first)
    width = len('parameters  ')
    # Labels differ in length, the values are aligned.
    assert {line[width - 2 : width] for line in caplog.messages} == {'  '}
    return {line[:width].strip(): line[width:] for line in caplog.messages}

  return log


def test_lines_of_a_new_run(log, tmp_path):
  lines = log(0)
  assert list(lines) == [
    'version',
    'devices',
    'mesh',
    'precision',
    'data',
    'text',
    'parameters',
    'workdir',
    'run',
  ]
  assert lines['version'] == environment.versions()
  assert lines['devices'] == '8 CPU devices'
  assert lines['mesh'] == 'data 8, fsdp 1, spatial 1'
  assert lines['precision'] == 'float32 activations, float32 parameters'
  assert lines['data'] == (
    'shapes: 1,000,000 training records, 1,000,000 validation records'
  )
  assert lines['text'] == (
    'learned encoder: 0 layers, width 16, at most 8 tokens of 450'
  )
  assert lines['workdir'] == str(tmp_path)
  assert lines['run'].endswith(": begins stage 1/2 '8'")


def test_parameters_are_counted(log, make_config):
  def size(stage):
    return sum(x.size for x in jax.tree.leaves(stage.init()))

  first, second = map(size, make_stages(make_config()))
  assert 0 < first < second
  frozen = {'text_encoder': {'a': jnp.ones((30, 50))}}
  assert log(0, frozen)['parameters'] == (
    f"{first:,} in stage '8', {second:,} in stage '16', "
    '1,500 frozen in the text encoder'
  )


@pytest.mark.parametrize(
  'first, step, expected',
  [
    (0, 7, "continues stage 1/2 '8' at step 7 of 20"),
    (0, 0, "begins stage 1/2 '8' from imported weights"),
    (1, None, "begins stage 2/2 '16', stage '8' is finished"),
    (1, 20, "continues stage 2/2 '16' at step 20 of 20"),
    (2, None, 'all 2 stages are finished'),
  ],
)
def test_what_is_resumed(first, step, expected, log, monkeypatch):
  monkeypatch.setattr(saved_steps, 'latest_step', lambda directory: step)
  assert log(first)['run'].partition(': ')[2] == expected


def test_a_warm_up_without_a_decay_is_named(make_config, tmp_path, caplog):
  config = make_config()
  config.optimizer.decay = 'cosine'
  config.stages[0].update(steps=20, warmup_steps=19)
  config.stages[1].update(steps=20, warmup_steps=40)
  run = types.SimpleNamespace(
    mesh=sharding.make_mesh(config.mesh), frozen={}, workdir=str(tmp_path)
  )

  def warnings(first):
    caplog.clear()
    summary.log_summary(run, make_stages(config), first)
    return [x.getMessage() for x in caplog.records if x.levelname == 'WARNING']

  assert warnings(0) == [
    "stage 2/2 '16': warmup_steps=40 of 20 steps leave none for "
    "optimizer.decay='cosine', and the learning rate ends at 50% of its peak: "
    'give fewer, such as --config.stages[1].warmup_steps=2.'
  ]
  # So it does.
  assert make_stages(config)[1].learning_rate(19) == pytest.approx(
    0.5 * config.stages[1].learning_rate
  )
  assert not warnings(2)  # It is finished.
  config.optimizer.decay = 'constant'
  assert not warnings(0)


def test_captions_that_are_cut_are_counted(make_config, tmp_path, caplog):
  """Of records of the whole set, each with all of its captions."""
  config = make_config()
  config.data.name = 'captioned_images'
  config.text.update(max_length=8, tokenizer=CAPTIONS_MODEL)

  class Records:
    def __len__(self):
      return 400

    def __getitem__(self, index):
      if index < 100:
        return {'caption': '', 'captions': ['red ' * 9, 'a']}
      if index < 300:  # Too many in a row to find others.
        raise BadRecord(str(index), 'no caption')
      return {'caption': 'a red square'}

  def warnings(config, first=0):
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
      for name in ('make_source', 'make_image_source'):
        patch.setattr(summary, name, lambda *given: Records())
      patch.setattr(summary, '_data', lambda config: '')
      run = types.SimpleNamespace(
        mesh=sharding.make_mesh(config.mesh), frozen={}, workdir=str(tmp_path)
      )
      summary.log_summary(run, make_stages(config), first)
    return [x.getMessage() for x in caplog.records if x.levelname == 'WARNING']

  (warned,) = warnings(config)
  assert warned == (
    "Of 64 training records of data.name='captioned_images', 16 captions are "
    'cut: one has 10 tokens, the limit is 8. Raise text.max_length, or '
    'text.long_captions=leave_out to skip such records.'
  )
  assert not warnings(config, first=2)  # Nothing is trained any more.
  config.data.image_set = 'tars'
  of_images = warned.replace("name='captioned_images'", "image_set='tars'")
  assert warnings(config) == [warned, of_images]
  config.text.long_captions = 'leave_out'
  assert not warnings(config)
  config.text.update(long_captions='cut', max_length=10)
  assert not warnings(config)


def test_a_data_set_without_a_validation_split(log, monkeypatch):
  monkeypatch.setattr(summary, 'held_out_split', lambda config: 'train')
  monkeypatch.setattr(summary, 'make_source', lambda *given: range(1234))
  assert log(0, **{'data.path': '/my/images'})['data'] == (
    'shapes in /my/images: 1,234 training records, no validation split: '
    'held-out metrics are of training images'
  )


@pytest.mark.parametrize(
  'encoder, expected',
  [
    ('t5', 'frozen T5 in /t5: 24 layers, width 2048, at most 8 tokens of 450'),
    (
      'precomputed',
      'precomputed T5 features: width 2048, at most 8 tokens of 450',
    ),
    ('label', 'label: 1,000 classes, width 2048'),
  ],
)
def test_kinds_of_text(encoder, expected, make_config):
  config = make_config()
  config.text.update(
    encoder=encoder, path='/t5', tokenizer=CAPTIONS_MODEL, num_classes=1000
  )
  spec = types.SimpleNamespace(num_layers=24)
  found = summary._text(config, types.SimpleNamespace(width=2048, spec=spec))
  assert found == expected


def test_work_of_later_stages_is_counted_in_flops(make_config, monkeypatch):
  config = make_config()
  config.stages[1].update(steps=5, batch_size=32)
  stages = make_stages(config)
  run = types.SimpleNamespace(frozen={})
  text = jnp.ones((16, 8), jnp.int32)
  first, second = (stage.forward_flops({}, text) for stage in stages)
  # Twice the images, with a level of four times the pixels beside the first.
  assert 4 < second / first < 40

  class Thread(threading.Thread):
    def start(self):
      super().start()
      self.join()

  monkeypatch.setattr(loop.threading, 'Thread', Thread)

  def later_steps(stage):
    return loop._make_progress(run, stage, 0, text).later_steps

  assert later_steps(stages[0]) == pytest.approx(5 * second / first)
  assert later_steps(stages[1]) == 0
  # Twice the batch, twice the work.
  config.stages[0].batch_size *= 2
  doubled, _ = make_stages(config)
  ratio = doubled.forward_flops({}, text) / first
  assert ratio == pytest.approx(2, rel=0.05)
  monkeypatch.setattr(type(stages[0]), 'forward_flops', lambda *given: None)
  assert later_steps(stages[0]) is None
