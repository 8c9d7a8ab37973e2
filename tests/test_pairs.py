"""Our commands read what our commands write."""

import pathlib
import re

import numpy as np
import pytest

from mdm_jax.builders.data import make_dataset
from mdm_jax.builders.text import make_tokenizer
from tests import commands
from tests.tools.test_prepare_data import good_files, write_tar

TESTS = pathlib.Path(__file__).parent
# (what writes, what reads) -> a test of it.
PAIRS = {
  ('main', 'main'): 'training/test_loop.py::test_resumed_equals_uninterrupted',
  ('main', 'sample'): 'training/test_loop.py::test_sample_command',
  ('main', 'sample --guide'): 'training/test_loop.py::test_sample_with_a_guide',
  ('main', 'evaluate'): 'inference/test_evaluation.py::test_command',
  ('main', 'demo'): (
    'test_demo.py::test_an_image_arrives_and_its_command_samples_it'
  ),
  ('main', 'export_weights'): (
    'tools/test_export_weights.py::test_our_names_are_paths'
  ),
  ('main', 'compare_samplers'): (
    'training/test_loop.py::test_samplers_are_compared'
  ),
  ('main', 'sweep'): 'tools/test_sweep.py::test_a_finished_run_is_evaluated',
  ('sweep', 'sweep'): 'tools/test_sweep.py::test_a_changed_grid_adds_runs',
  ('compare_models', 'compare_models'): (
    'tools/test_compare_models.py'
    '::test_runs_are_trained_evaluated_and_continued'
  ),
  ('main', 'compare_with_data'): (
    'training/test_loop.py::test_samples_are_shown_beside_the_data'
  ),
  ('main', 'nearest_images'): (
    'training/test_loop.py::test_samples_are_shown_beside_the_nearest_images'
  ),
  ('emoji_tars', 'prepare_data'): 'tools/test_emoji_tars.py::test_command',
  ('emoji_tars', 'nearest_images --labels'): (
    'tools/test_emoji_tars.py::test_command'
  ),
  ('sample', 'sample'): (
    'report/test_sample_directory.py'
    '::test_an_interrupted_directory_is_continued'
  ),
  ('sample', 'evaluate --images'): (
    'inference/test_evaluation.py::test_samples_are_compared_with_photographs'
  ),
  ('evaluate', 'evaluate --images'): (
    'inference/test_feature_extractors.py'
    '::test_samples_are_read_at_their_finest_level'
  ),
  ('evaluate', 'evaluate --cache'): (
    'inference/test_evaluation.py::test_reference_is_read_once'
  ),
  ('export_weights', 'import_ml_mdm'): (
    'tools/test_export_weights.py::test_export_then_import_is_exact'
  ),
  ('import_ml_mdm', 'main'): (
    'tools/test_import_ml_mdm.py::test_training_goes_on'
  ),
  ('import_ml_mdm', 'sample'): (
    'tools/test_export_weights.py::test_export_then_import_is_exact'
  ),
  ('prepare_clips', 'prepare_clips'): (
    'tools/test_prepare_clips.py::test_only_whole_tars_are_finished'
  ),
  ('prepare_clips', 'index_tars'): (
    'tools/test_prepare_clips.py::test_clips_are_trained_on'
  ),
  ('prepare_data --part', 'prepare_data'): (
    'tools/test_prepare_data.py::test_processes_and_machines_make_the_same'
  ),
  ('prepare_data', 'precompute_text'): (
    'tools/test_precompute_text.py::test_features_are_the_encoders'
  ),
  ('precompute_text --part', 'precompute_text'): (
    'tools/test_precompute_text.py::test_machines_share_the_work'
  ),
  ('precompute_text', 'main'): (
    'tools/test_precompute_text.py::test_training_reads_them_as_it_reads_t5'
  ),
  ('index_tars', 'main'): (
    'training/test_loop.py::test_bad_records_are_counted_or_end_the_run'
  ),
  ('prepare_data', 'main'): 'test_pairs.py::test_data_and_a_tokenizer',
  ('train_tokenizer', 'main'): 'test_pairs.py::test_data_and_a_tokenizer',
  ('prepare_data', 'bench_data'): 'test_pairs.py::test_data_and_a_tokenizer',
  ('index_tars', 'bench_data'): 'test_pairs.py::test_data_and_a_tokenizer',
  ('bench', 'bench --compare'): 'tools/test_bench.py::test_measures_both_steps',
  ('plan', 'plan'): (
    'tools/test_plan.py::test_an_answer_is_remembered_until_the_question_changes'
  ),
}


@pytest.mark.parametrize('pair', PAIRS, ids=' -> '.join)
def test_each_pair_has_a_test(pair):
  file, name = PAIRS[pair].split('::')
  assert re.search(rf'^def {name}\(', (TESTS / file).read_text(), re.M)


def run(module, *arguments):
  done = commands.run(f'mdm_jax.tools.{module}', *arguments)
  assert not done.returncode, done.stderr
  return done.stdout


@pytest.mark.parametrize(
  'name, tool', [('captioned_images', 'prepare_data'), ('tars', 'index_tars')]
)
def test_data_and_a_tokenizer(name, tool, make_config, tmp_path):
  files = good_files(12)
  write_tar(tmp_path / 'a.tar', files)
  words = [data.decode() for key, data in files.items() if key.endswith('txt')]
  (tmp_path / 'captions.txt').write_text('\n'.join(words))
  data, tokenizer = tmp_path / 'data', tmp_path / 'captions.model'
  run(tool, f'--input={tmp_path}/*.tar', f'--output={data}')
  run(
    'train_tokenizer',
    f'--captions={tmp_path}/captions.txt',
    '--vocab_size=280',
    f'--output={tokenizer}',
  )
  config = make_config()
  config.data.update(name=name, path=str(data))
  config.text.tokenizer = str(tokenizer)
  (batch,) = make_dataset(
    config,
    'train',
    [(8, 8, 3)],
    (12,),
    process_index=0,
    process_count=1,
    num_batches=1,
  )
  assert batch['image'].shape == (12, 8, 8, 3) and not batch['bad'].any()
  expected = [make_tokenizer(config).encode(word) for word in words]
  found = {tuple(row) for row in batch['text'].tolist()}
  assert len(found) > 9  # One or two may be for validation.
  assert found <= {tuple(row) for row in np.stack(expected).tolist()}
  table = run(
    'bench_data',
    '--config=configs/captioned_images.py',
    f'--config.data.name={name}',
    f'--config.data.path={data}',
    '--workers=0',
    '--seconds=0.01',
  )
  assert 'images/s' in table and '0 workers' in table
