"""Matryoshka Diffusion Models in JAX."""

__version__ = '0.1.0'


def load(
  workdir,
  *,
  stage=None,
  best=False,
  sigma_rel=None,
  spatial=1,
  any_prompt=True,
  text_path=None,
  tokenizer=None,
  data_path=None,
):
  """Loads a trained model, to sample from it and to measure it.

    model = mdm_jax.load('runs/shapes_64')
    samples = model.sample('a red ring in the centre, on navy', num_samples=4)
    samples[0].show()

  The model runs on all devices of this process. If JAX has not been used yet,
  CPU cores become devices.

  Args:
    workdir: working directory of the training run.
    stage: name of a stage, such as '32'; None for the last one that has been
      trained.
    best: use the EMA that was best by `eval.best_metric`.
    sigma_rel: use a post-hoc EMA of this width, see docs/post_hoc_ema.md.
    spatial: devices that share the rows of each image.
    any_prompt: whether prompts are any texts. With False, a model that was
      trained on precomputed text features needs no T5, and can only be
      evaluated.
    text_path, tokenizer, data_path: where the T5, the tokenizer and the data
      set are, if they have moved since training.

  Returns:
    An `mdm_jax.inference.pipeline.Pipeline`, with the methods `sample` and
    `evaluate`.

  Raises:
    FileNotFoundError: the directory is of no run, or has no such weights yet.
    ValueError: there is no such directory, an option or the run's config is
      wrong, or its checkpoints are damaged.
  """
  # Importing JAX takes seconds, which no `import mdm_jax` and no --help pays.
  from mdm_jax.inference import pipeline

  return pipeline.load(
    workdir,
    stage=stage,
    best=best,
    sigma_rel=sigma_rel,
    spatial=spatial,
    any_prompt=any_prompt,
    text_path=text_path,
    tokenizer=tokenizer,
    data_path=data_path,
  )
