"""What a user types is text on the page, wherever it is shown."""

import threading
import types

import numpy as np
import pytest

from mdm_jax.serving import html
from mdm_jax.serving.queue import Progress, Request

HOSTILE = '</b><script>alert("1")</script>\'"&amp; {{x}}'
ESCAPED = (
  '&lt;/b&gt;&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&#x27;&quot;'
  '&amp;amp; {{x}}'
)


@pytest.fixture
def hostile():
  """A request and a queue whose texts are all markup."""
  request = Request(HOSTILE, HOSTILE, 2.0, 5, HOSTILE, HOSTILE, 0, 1)
  ready = threading.Event()
  ready.set()
  queue = types.SimpleNamespace(
    about=HOSTILE, ready=ready, command=lambda request, i: HOSTILE
  )
  return request, queue


def test_texts_are_escaped(hostile):
  request, queue = hostile
  images = (np.zeros((1, 8, 8, 3), np.uint8),)
  card = html.card(request, images, queue)
  # Prompt, negative prompt, sampler, threshold and command.
  assert card.count(ESCAPED) == 5
  # Text from right to left reorders nothing around it.
  assert card.count(f'<bdi>{ESCAPED}</bdi>') == 2
  shown = [
    card,
    html.card(request, images),
    html.about(queue, 'Ready'),
    html.line(HOSTILE),
    html.error(HOSTILE),
    html.progress_line(queue, request, Progress(0, 1, images)),
  ]
  assert not any('<script' in text for text in shown)
  assert all(ESCAPED in text for text in shown[:5])
