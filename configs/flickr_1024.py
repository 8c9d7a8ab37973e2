"""Apple's released 64+256+1024 px model; see flickr_64 for the commands."""

from configs import cc12m_1024, common, flickr_64


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = flickr_64.as_released(cc12m_1024.get_config())
  config.stages = config.stages[-1:]
  return common.in_mode(config, mode)
