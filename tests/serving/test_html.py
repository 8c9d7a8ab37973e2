"""What a user types is text on the page, wherever it is shown."""

import base64
from html.parser import HTMLParser
import io
import json
import re
import threading
import types

import numpy as np
from PIL import Image
import pytest

from mdm_jax.serving import film, html
from mdm_jax.serving.film import Frame
from mdm_jax.serving.model_card import ModelCard
from mdm_jax.serving.queue import Job, Progress, Request

HOSTILE = '</b><script>alert("1")</script>\'"&amp; {{x}}'
ESCAPED = (
  '&lt;/b&gt;&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&#x27;&quot;'
  '&amp;amp; {{x}}'
)


@pytest.fixture
def hostile():
  """A finished job and a queue whose texts are all markup."""
  request = Request(HOSTILE, HOSTILE, 2.0, 5, HOSTILE, HOSTILE, 0, 1, HOSTILE)
  job = Job(request)
  job.images = (np.zeros((1, 8, 8, 3), np.uint8),)
  job.film = [
    Frame(step, np.array([step - 3.0]), job.images, job.images)
    for step in (1, 5)
  ]
  job.model = {'stage': HOSTILE, 'weights': HOSTILE, 'step': 1}
  ready = threading.Event()
  ready.set()
  queue = types.SimpleNamespace(
    about=HOSTILE, ready=ready, command=lambda request, i: HOSTILE
  )
  return job, queue


def test_texts_are_escaped(hostile):
  job, queue = hostile
  card = html.finished(queue, job)
  # Prompt, negative prompt, stage, EMA, sampler, threshold and command.
  assert card.count(ESCAPED) == 7
  # Text from right to left reorders nothing around it.
  assert card.count(f'<bdi>{ESCAPED}</bdi>') == 2
  words = {HOSTILE: (HOSTILE,)}
  shown = [
    card,
    html.preview(job.request, job.images),
    html.about(queue, 'Ready'),
    html.line(HOSTILE),
    html.error(HOSTILE),
    html.progress_line(queue, job.request, Progress(0, 0, (), 'loading')),
    html.model_card(ModelCard('', {HOSTILE: HOSTILE}, words, HOSTILE, {})),
    html.progress_line(
      queue, job.request, Progress(0, 1, job.images, 'sampling')
    ),
  ]
  assert not any('<script' in text for text in shown)
  assert all(ESCAPED in text for text in shown[:7])


class Data(HTMLParser):
  """Collects the values of data- attributes."""

  def handle_starttag(self, tag, attrs):
    for name, value in attrs:
      if name.startswith('data-'):
        vars(self)[name] = json.loads(value)


def test_settings_and_steps_are_in_the_card(hostile):
  job, queue = hostile
  card = html.finished(queue, job)
  found = Data()
  found.feed(card)
  settings = vars(found)['data-settings']
  assert settings['prompt'] == HOSTILE and settings['guidance'] == 2.0
  assert settings['commands'] == [HOSTILE]
  assert settings['model'] == job.model
  assert vars(found)['data-labels'] == [
    'Step 1 of 5: log-SNR -2.0 at 8 px',
    'Step 5 of 5: log-SNR 2.0 at 8 px',
  ]
  assert card.count('class="mdm-frame"') == 2  # x_t and x0 of one level


@pytest.mark.parametrize(
  'progress, expected',
  [
    (Progress(1, 0, (), 'waiting'), 'Waiting: 1 request before yours.'),
    (Progress(0, 0, (), 'waiting'), 'Warming up: compiling …'),
    (Progress(0, 0, (), 'sampling'), 'Starting. The first request with anot'),
    (Progress(0, 3, (), 'sampling'), 'Step 3 of 5'),
  ],
)
def test_a_request_that_began_does_not_warm_up(hostile, progress, expected):
  job, queue = hostile
  queue.ready.clear()
  assert expected in html.progress_line(queue, job.request, progress)


def test_clips_play_on_the_page(hostile):
  """Each level is an animated PNG; the film has the frames in the middle."""
  job, queue = hostile
  clip = np.arange(4 * 300 * 300 * 3, dtype=np.uint32).astype(np.uint8)
  job.images = (
    np.zeros((1, 4, 8, 8, 3), np.uint8),
    clip.reshape(1, 4, 300, 300, 3),
  )
  frame = film.make_frame(1, np.zeros(2), job.images, job.images)
  assert [level.shape for level in frame.x0] == [(1, 8, 8, 3), (1, 60, 60, 3)]
  np.testing.assert_array_equal(frame.x_t[1], job.images[1][:, 2, ::5, ::5])
  job.film = [frame]
  for page, sides in (
    (html.preview(job.request, job.images), (8, 150)),
    (html.finished(queue, job), (8, 300)),
  ):
    found = re.findall(r'<img [^>]*src="data:image/png;base64,([^"]*)"', page)
    for data, side in zip(found, sides, strict=True):
      with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (image.n_frames, image.size) == (4, (side, side))
  assert '8 px PNG' in page and '300 px PNG' in page
