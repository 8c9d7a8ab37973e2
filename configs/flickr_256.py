"""Apple's released 64+256 px model; see flickr_64 for the commands."""

from configs import cc12m_256, common, flickr_64


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = flickr_64.as_released(cc12m_256.get_config())
  config.stages = config.stages[-1:]
  config.sampler.num_steps = 100
  return common.in_mode(config, mode)
