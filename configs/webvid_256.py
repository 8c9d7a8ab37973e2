r"""Videos: 64 px images, then 16 frames of 64 px, then also of 256 px.

    python -m mdm_jax.main --config=configs/webvid_256.py \
        --config.data.path=DIR --config.text.path=T5

DIR is an index of clips, see docs/video.md; the paper trains on WebVid-10M. T5
is as for cc12m_64, whose image network is the inside of this one. Not yet
trained at full size.
"""

from configs import cc12m_64, common

FRAMES = 16


def get_config(mode: str = ''):
  """Returns the recipe; `mode` 'smoke' is a toy-sized run of it."""
  config = cc12m_64.get_config()
  config.data.name = 'tars'
  config.model.levels[0].update(
    frames=FRAMES, frame_attention=(0, 1, 1), remat='block'
  )
  config.model.levels.append(
    common.level(256, frames=FRAMES, frame_attention=(0, 0, 1), remat='block')
  )
  config.stages = [
    common.stage('64', 1, max_frames=1, steps=500_000, batch_size=1024),
    common.stage('16x64', 1, steps=200_000, batch_size=512),
    common.stage('16x256', 2, steps=100_000, batch_size=256),
  ]
  config.sampler.num_steps = 100
  return common.in_mode(config, mode)
