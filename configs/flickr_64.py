r"""Apple's released 64 px model, trained on Flickr images with captions.

    python -m mdm_jax.tools.import_ml_mdm --checkpoint=vis_model.pth \
        --config=configs/flickr_64.py --config.text.path=T5 --workdir=DIR
    python -m mdm_jax.sample --workdir=DIR --prompt="a cat in the snow"

T5 is a directory with the files of google/flan-t5-xl. docs/weights.md says
where Apple's files are and what else can be done with them.
"""

from configs import cc12m_64, common


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  return common.in_mode(as_released(cc12m_64.get_config()), mode)


def as_released(config):
  """Returns the recipe with what the release computes otherwise than we do."""
  config.diffusion.normalize_time_weights = True
  config.sampler.pixels = 'truncate'
  return config
