"""Apple's released 64+256 px model; see flickr_64 for the commands."""

from configs import cc12m_256, common


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = cc12m_256.get_config()
  config.stages = config.stages[-1:]
  config.sampler.num_steps = 100
  return common.in_mode(config, mode)
