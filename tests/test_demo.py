"""The page of mdm_jax.demo in a real browser, and the requests it refuses."""

import base64
import contextlib
import io
import json
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
import zipfile

import jax
import numpy as np
from PIL import Image
import pytest

from mdm_jax.builders.model import make_model
from mdm_jax.serving import access, model_card, queue
from tests import commands, toy

ROOT = pathlib.Path(__file__).parents[1]
WAIT = 600  # Seconds after which a test fails; nothing takes that long.
ENTER = '\ue007'  # As Selenium types it.
STEPS = 10_000  # At most; it takes a while.
WEIGHTS = 'stage 16, EMA, step 20'


def free_port() -> int:
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def status_of(address: str, data: bytes | None = None, **headers) -> int:
  """HTTP status of a GET, or of a POST if there are data."""
  request = urllib.request.Request(address, data, headers)
  try:
    with urllib.request.urlopen(request, timeout=WAIT) as response:
      return response.status
  except urllib.error.HTTPError as error:
    return error.code


def run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True
  )


@pytest.mark.parametrize(
  'host', ['0.0.0.0', '::', '192.168.1.7', 'example.com']
)
def test_an_open_address_needs_a_password(host):
  result = run('-m', 'mdm_jax.demo', '--workdir=.', f'--host={host}')
  assert result.returncode == 1
  assert result.stderr.startswith(
    f'error: --host={host} is open to others: give --password_file'
  )
  assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
  'text, message',
  [
    ('', 'is empty: write a line NAME:PASSWORD.'),
    ('ann:long enough\nben:short\n', 'line 2: write NAME:PASSWORD, with 8'),
    ('ann\n', 'line 1: write NAME:PASSWORD'),
    (':long enough\n', 'line 1: write NAME:PASSWORD'),
  ],
)
def test_bad_password_file(tmp_path, text, message):
  path = tmp_path / 'passwords'
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    access.read_passwords(str(path))


def test_password_file(tmp_path):
  path = tmp_path / 'passwords'
  path.write_text('ann:with:colons\nben:and a space \n')
  assert access.read_passwords(str(path)) == [
    ('ann', 'with:colons'),
    ('ben', 'and a space '),
  ]


def test_without_gradio_says_how_to_install_it():
  result = run(
    '-c',
    """
import sys
sys.modules['gradio'] = None
sys.argv = ['demo', '--workdir=.']
from mdm_jax import demo
from mdm_jax.runtime import command
command.run(demo.main)""",
  )
  assert result.returncode == 1
  assert result.stderr == (
    'error: the demo needs Gradio: pip install -r requirements-demo.txt\n'
  )


@pytest.fixture(scope='module')
def workdir(make_config, random_params, tmp_path_factory):
  """Working directory of a finished run."""
  config = make_config()
  config.diffusion.num_steps = STEPS
  config.sampler.update(guidance=3.0, threshold='clip')
  path = tmp_path_factory.mktemp('a run')
  for index, stage in enumerate(config.stages):
    params = random_params(make_model(config, stage), config.text.max_length)
    toy.save_run(path, config, index, stage.steps, params)
  return path


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  """Environment of commands: one device, and no settings of the user."""
  return (
    os.environ
    | commands.on_devices(1)
    | {'XDG_CACHE_HOME': str(tmp_path_factory.mktemp('cache'))}
  )


@pytest.fixture(scope='module')
def address(workdir, environment, tmp_path_factory):
  """Address of the page, which the real command serves."""
  pytest.importorskip('gradio', reason='Gradio is not installed')
  log = tmp_path_factory.mktemp('log') / 'stderr'
  port = free_port()
  with log.open('w') as stderr:
    server = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'mdm_jax.demo',
        f'--workdir={workdir}',
        f'--port={port}',
      ],
      cwd=ROOT,
      env=environment,
      stderr=stderr,
    )
  try:
    end = time.monotonic() + WAIT
    while 'The page is at' not in log.read_text():
      assert server.poll() is None and time.monotonic() < end, log.read_text()
      time.sleep(0.1)
    yield f'http://127.0.0.1:{port}'
    server.terminate()
    assert server.wait(WAIT) == 0
    assert 'Traceback' not in log.read_text()
  finally:
    server.kill()
    server.wait()


@pytest.fixture(scope='module')
def browser():
  """A headless Chromium."""
  webdriver = pytest.importorskip(
    'selenium.webdriver', reason='Selenium is not installed'
  )
  chromium, driver = map(shutil.which, ('chromium', 'chromedriver'))
  if not (chromium and driver):
    pytest.skip('Chromium and its driver are not installed')
  options = webdriver.ChromeOptions()
  options.binary_location = chromium
  for argument in (
    'headless=new',
    'no-sandbox',
    'disable-gpu',
    'disable-dev-shm-usage',
    'window-size=1400,1200',
  ):
    options.add_argument(f'--{argument}')
  opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
  try:
    yield opened
  finally:
    opened.quit()


class Page:
  """The page as a user sees and operates it."""

  def __init__(self, browser, address):
    self.browser = browser
    browser.get(address)
    # Gradio shows one part after another.
    parts = ('#status', '#examples', '#card', '#generate', '#settings')
    self.wait(lambda: all(map(self.text, parts)))

  def all(self, selector):
    return self.browser.find_elements('css selector', selector)

  def text(self, selector):
    return self.browser.execute_script(
      'return document.querySelector(arguments[0])?.innerText ?? ""', selector
    )

  def wait(self, condition):
    end = time.monotonic() + WAIT
    while not condition():
      assert time.monotonic() < end, self.text('body')
      time.sleep(0.05)

  def type(self, field, text):
    selector = f'#{field} textarea, #{field} input:not([type=range])'
    self.wait(lambda: self.all(selector))
    (element,) = self.all(selector)
    element.clear()
    element.send_keys(text)

  def paste(self, field, text):
    self.wait(lambda: self.all(f'#{field} textarea'))
    self.browser.execute_script(
      """
        const area = document.querySelector(arguments[0])
        area.value = arguments[1]
        area.dispatchEvent(new Event('input', {bubbles: true}))""",
      f'#{field} textarea',
      text,
    )

  def press(self, button):
    self.wait(lambda: self.all(f'#{button}:enabled'))
    self.all(f'#{button}')[0].click()

  def status(self):
    return self.text('#status')


@pytest.fixture
def page(browser, address):
  return Page(browser, address)


def decode(source: str) -> np.ndarray:
  kind, _, data = source.partition(',')
  assert kind == 'data:image/png;base64'
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), int)


def test_an_image_arrives_and_its_command_samples_it(
  page, environment, tmp_path
):
  prompt = "a 'red' ring <b>on</b> ${1 + 1} {{value}} \\n"
  page.type('prompt', prompt)
  page.type('num_images', '2')
  page.type('seed', '5')
  page.press('generate')
  page.wait(lambda: len(page.all('#gallery figure')) == 2)
  assert page.status().startswith('2 images in ')
  assert page.all('#gallery b')[0].text == prompt
  # All levels side by side, as large as each other, in sharp pixels.
  images = page.all('#gallery figure:nth-child(2) img')
  assert [image.get_attribute('naturalWidth') for image in images] == [
    '8',
    '16',
  ]
  assert {
    (
      image.size['width'],
      image.location['y'],
      image.value_of_css_property('image-rendering'),
    )
    for image in images
  } == {(192, images[0].location['y'], 'pixelated')}

  links = page.all('#gallery figure:nth-child(2) a')
  assert [link.get_attribute('download') for link in links] == [
    'seed_6_8.png',
    'seed_6_16.png',
  ]
  python, *words = shlex.split(
    page.browser.execute_script(
      'return document.querySelectorAll("#gallery code")[1].textContent'
    )
  )
  assert python == 'python'
  result = subprocess.run(
    [sys.executable, *words, f'--output={tmp_path}'],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  for link, side in zip(links, (8, 16)):
    shown = decode(link.get_attribute('href'))
    assert shown.std() > 10
    (file,) = tmp_path.rglob(f'*_{side}.png')
    difference = np.abs(shown - np.asarray(Image.open(file), int))
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_an_example_is_the_prompt(page):
  (example,) = [
    button
    for button in page.all('#examples button')
    if button.text == 'a large red circle on a white background'
  ]
  example.click()
  page.wait(
    lambda: (
      page.all('#prompt textarea')[0].get_attribute('value') == example.text
    )
  )
  page.all('#card button')[0].click()
  page.wait(lambda: 'bottom right' in page.text('#card'))


def script(page, text):
  return page.browser.execute_script(f'return {text}')


def test_an_earlier_stage_its_steps_and_the_zip(page):
  page.type('num_images', '2')
  page.type('steps', '30')
  page.press('generate')
  page.wait(lambda: len(page.all('#gallery .mdm-card')) == 1)
  page.all('#weights input')[0].click()
  page.wait(lambda: len(page.all('#weights [role=option]')) == 2)
  page.all('#weights [role=option]')[1].click()
  page.press('generate')
  page.wait(lambda: len(page.all('#gallery .mdm-card')) == 2)
  newest, older = page.all('#gallery .mdm-card')
  assert newest.text.splitlines()[1].startswith('stage 8, EMA, step 20; ddim,')
  assert [
    len(card.find_elements('css selector', 'img')) for card in (newest, older)
  ] == [2, 4]
  # One level of those that have two.
  page.all('#levels input')[1].click()
  page.wait(lambda: not page.all('#gallery img')[2].is_displayed())
  assert [image.is_displayed() for image in page.all('#gallery img')] == [
    True, True, False, True, False, True
  ]  # fmt: skip

  page.all('.mdm-film summary')[1].click()
  label = 'document.querySelectorAll(".mdm-film output")[1].textContent'
  assert script(page, label).startswith('Step 30 of 30: log-SNR ')
  slider = page.all('.mdm-film input')[1]
  slider.send_keys('\ue011')  # the Home key
  assert script(page, label).startswith('Step 1 of 30: log-SNR -')
  frames = """[...document.querySelectorAll('.mdm-film')[1].querySelectorAll(
    '.mdm-frame')].map(x => getComputedStyle(x).backgroundPositionY)"""
  assert script(page, frames) == ['0%'] * 8  # x_t and x0, 2 samples, 2 levels

  packed = page.browser.execute_async_script("""
    const done = arguments[0], zip = mdm.zip
    mdm.zip = files => {
      const made = zip(files)
      made.arrayBuffer().then(data => done([...new Uint8Array(data)]))
      return made
    }
    document.querySelector('#gallery .mdm-button').click()
    mdm.zip = zip""")
  with zipfile.ZipFile(io.BytesIO(bytes(packed))) as archive:
    assert archive.testzip() is None
    assert archive.namelist() == [
      *(f'request_2/seed_{i}_8.png' for i in (0, 1)),
      *(f'request_1/seed_{i}_{side}.png' for i in (0, 1) for side in (8, 16)),
      'settings.json',
    ]
    second, first = json.loads(archive.read('settings.json'))
    image = Image.open(io.BytesIO(archive.read('request_1/seed_1_16.png')))
    shown = page.all('#gallery img')[-1].get_attribute('src')
    np.testing.assert_array_equal(np.asarray(image), decode(shown))
  assert (second['model']['stage'], first['model']['stage']) == ('8', '16')
  assert first['steps'] == 30 and first['weights'] == WEIGHTS


def test_results_are_beside_the_controls_or_below_generate(page):
  def places():
    return script(
      page,
      """['#generate', '#results', '#settings'].map(x => {
        const box = document.querySelector(x).getBoundingClientRect()
        return [box.left, box.right, box.top, box.bottom]})""",
    )

  generate, results, settings = places()
  assert generate[1] < results[0] and results[2] < generate[2] < settings[2]
  page.browser.execute_cdp_cmd(
    'Emulation.setDeviceMetricsOverride',
    {'width': 390, 'height': 844, 'deviceScaleFactor': 1, 'mobile': True},
  )
  try:
    page.type('num_images', '2')
    page.press('generate')
    page.wait(lambda: len(page.all('#gallery figure')) == 2)
    page.all('.mdm-film summary')[0].click()
    generate, results, settings = places()
    assert generate[3] < results[2] < generate[3] + 60
    assert results[3] < settings[2]
    assert script(page, 'document.documentElement.scrollWidth') <= 390
    widest = """Math.max(...[...document.querySelectorAll('#results *')].map(
      x => x.getBoundingClientRect().right))"""
    assert script(page, widest) <= 390
  finally:
    page.browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


def test_cancel_stops_soon_and_leaves_the_page_usable(page):
  page.type('steps', str(STEPS))
  page.press('generate')
  page.wait(lambda: page.all('#preview img'))
  assert len(page.all('#preview img')) == 4 * 2
  page.press('cancel')
  page.wait(lambda: page.status().startswith('Cancelled after step '))
  last = int(page.status().split()[3])
  assert last < STEPS
  assert not page.all('#gallery img')
  page.type('steps', '2')
  page.wait(lambda: page.all('#generate:enabled'))
  page.type('prompt', 'a cross' + ENTER)
  page.wait(lambda: len(page.all('#gallery figure')) == 4)
  page.wait(lambda: page.all('#cancel:disabled'))


def test_leaving_the_page_cancels(page, address):
  page.type('steps', str(STEPS))
  page.press('generate')
  page.wait(lambda: page.status().startswith('Step '))
  page.browser.get('about:blank')
  again = Page(page.browser, address)
  again.press('generate')
  # Soon, not after thousands of steps.
  again.wait(lambda: len(again.all('#gallery figure')) == 4)
  assert float(again.status().split()[3]) < 20


def test_bad_input_is_one_line(page):
  page.type('steps', '0')
  page.press('generate')
  page.wait(
    lambda: page.status() == 'Steps: 0; give a number from 1 to 10,000.'
  )
  page.type('num_images', '99')
  page.type('steps', '3')
  page.press('generate')
  page.wait(lambda: page.status() == 'Images: 99; give a number from 1 to 8.')
  page.paste('prompt', '丸' * 10_000)
  page.press('generate')
  page.wait(
    lambda: (
      page.status() == 'The prompt has 10,000 characters: shorten it to 1,000.'
    )
  )
  page.paste('prompt', '丸' * 1000)
  page.type('num_images', '1')
  page.press('generate')
  page.wait(lambda: len(page.all('#gallery figure')) == 1)
  assert ' tokens, the limit is 8. The prompt has words' in page.status()


def test_no_requests_to_other_servers(page, address):
  page.wait(lambda: page.text('#about').startswith('Ready: '))
  loaded = page.browser.execute_script(
    'return performance.getEntriesByType("resource").map(x => x.name)'
  )
  assert len(loaded) > 10
  assert {urllib.parse.urlsplit(name)[:2] for name in loaded} == {
    ('http', address.removeprefix('http://'))
  }


def test_only_the_page_is_served(address):
  assert status_of(address) == 200
  assert status_of(f'{address}/?deep_link=../../secret') == 200
  for path in (
    'upload',
    'file=/etc/passwd',
    'file=requirements.txt',
    'proxy=http://127.0.0.1/',
    'info',
    'runs',
    'openapi.json',
    'call/generate',
    'component_server',
    '../monitoring',
  ):
    assert status_of(f'{address}/gradio_api/{path}') == 404, path
  for folder in ('assets', 'static'):
    path = f'{folder}/..%2f..%2f..%2f..%2frequirements.txt'
    assert status_of(f'{address}/{path}') in (403, 404)
  assert status_of(f'{address}/gradio_api/upload', b'x') == 404
  assert status_of(f'{address}/gradio_api/run/predict', b'{}') == 404
  join = f'{address}/gradio_api/queue/join'
  # Refused before it is sent.
  assert status_of(join, b'', **{'Content-Length': str(2**20 + 1)}) == 413
  assert status_of(join, b'{}') == 422
  # A name that somebody else made to mean this machine.
  assert status_of(address, Host='example.com') == 403
  assert status_of(address, Origin='http://example.com') == 403
  assert status_of(address, Origin='null') == 403
  assert status_of(address, Origin=address) == 200


def raw_status(address: str, request: bytes) -> int:
  """HTTP status of a request that no client would send."""
  host, port = address.removeprefix('http://').rstrip('/').split(':')
  with socket.create_connection((host, int(port)), WAIT) as connection:
    connection.sendall(request)
    return int(connection.recv(64).split()[1])


JOIN = 'gradio_api/queue/join'
# Also in the guard's own tests; here Gradio, its server and its parsers reply.
MALFORMED = {
  'Host': b'GET / HTTP/1.1\r\nHost: [\r\n\r\n',
  'Host of other bytes': b'GET / HTTP/1.1\r\nHost: loc\xe4l\r\n\r\n',
  'no Host': b'GET / HTTP/1.1\r\n\r\n',
  'no Host, before 1.1': b'GET / HTTP/1.0\r\n\r\n',
  'two Hosts': b'GET / HTTP/1.1\r\nHost: localhost\r\nHost: x\r\n\r\n',
  'port': b'GET / HTTP/1.1\r\nHost: localhost:99999\r\n\r\n',
  'Origin': b'GET / HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[\r\n\r\n',
  'Origin and preflight': (
    b'OPTIONS / HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[\r\n'
    b'Access-Control-Request-Method: GET\r\n\r\n'
  ),
  'proxy': (
    b'GET / HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-Host: [\r\n\r\n'
  ),
  'large header': (
    b'GET / HTTP/1.1\r\nHost: localhost\r\nA: ' + b'a' * 10**6 + b'\r\n\r\n'
  ),
  'no HTTP': b'\x16\x03\x01\r\n\r\n',
  'null in a path': b'GET /assets/%00 HTTP/1.1\r\nHost: localhost\r\n\r\n',
  'WebSocket': (
    b'GET /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\n'
    b'Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13'
    b'\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n'
  ),
}


@pytest.mark.parametrize('name', MALFORMED)
def test_malformed_requests_are_refused(address, name):
  assert 400 <= raw_status(address, MALFORMED[name]) < 500


def test_malformed_calls_are_refused(address):
  kind = {'Content-Type': 'application/json'}

  def post(path, body):
    return status_of(f'{address}/{path}', json.dumps(body).encode(), **kind)

  call = {'session_hash': 'x', 'fn_index': 99, 'data': []}
  assert post(JOIN, call) == 404
  for changes in (
    {'fn_index': -1},
    {'fn_index': 'a'},
    {'fn_index': None},
    {'fn_index': 1},
    {'session_hash': '../x'},
    {'data': 7},
    {'data': [[]] * 9},
  ):
    assert 400 <= post(JOIN, call | changes) < 500, changes
  assert 400 <= post('gradio_api/cancel', {}) < 500
  data = f'{address}/gradio_api/queue/data'
  assert status_of(data) == 400
  assert status_of(f'{data}?session_hash=unknown') == 404
  assert status_of(f'{address}/gradio_api/heartbeat/%2e%2e') == 400
  assert status_of(f'{address}/login', b'\xff') == 422
  assert status_of(address) == 200


def test_a_request_without_a_page_is_dropped(page, address):
  """Requests that scripts leave behind do not keep the others waiting."""
  config = json.loads(
    urllib.request.urlopen(f'{address}/config', timeout=WAIT).read()
  )
  ids = {
    part['props'].get('elem_id'): part['id'] for part in config['components']
  }
  (index,) = (
    call['id']
    for call in config['dependencies']
    if [ids['generate'], 'click'] in call['targets']
  )
  for session in ('left', 'behind'):
    body = {
      'session_hash': session,
      'fn_index': index,
      'data': ['', '', 1.0, STEPS, 'ddpm', 'clip', 0, 1, WEIGHTS, None],
    }
    assert (
      status_of(
        f'{address}/{JOIN}',
        json.dumps(body).encode(),
        **{'Content-Type': 'application/json'},
      )
      == 200
    )
  page.press('generate')
  page.wait(lambda: len(page.all('#gallery figure')) == 4)
  # Ten seconds, in which they may still connect; not thousands of steps.
  assert float(page.status().split()[3]) < 30


@contextlib.contextmanager
def served(users, **changes):
  """A page without a model, served in this process, and its address."""
  pytest.importorskip('gradio', reason='Gradio is not installed')
  from mdm_jax.serving import page as pages

  usual = queue.Request('', '', 2.0, 5, 'ddim', 'clip', 0, 4, WEIGHTS)
  samples = types.SimpleNamespace(
    **{
      'about': 'a run',
      'ready': threading.Event(),
      'choices': [WEIGHTS],
      'max_images': 4,
      'default_request': usual,
      'cancel': lambda owner: None,
    }
    | changes
  )
  listeners = access.Listeners()
  page = pages.make_page(
    samples,
    listeners,
    model_card.ModelCard('', {}, {}, '', {'One': ('a ring',)}),
  )
  try:
    yield (
      page,
      pages.launch(page, listeners, '127.0.0.1', free_port(), users)[1],
    )
  finally:
    page.close()


def test_nothing_is_shown_after_its_end(browser):
  """Whatever ends a request, and whether or not the page is loaded again."""
  errors = [
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED\nmore'),
    queue.WeightsUnavailable('These weights cannot be loaded.'),
    TypeError('a mistake'),
  ]
  ready = threading.Event()

  def watch(job):
    yield queue.Progress(0, 3, (np.zeros((4, 8, 8, 3), np.uint8),), 'sampling')
    time.sleep(0.3)
    raise errors.pop(0)

  with served(
    None,
    ready=ready,
    submit=lambda request, *given: queue.Job(request),
    watch=watch,
  ) as (_, address):
    page = Page(browser, address)
    page.wait(lambda: page.text('#about').startswith('Warming up: '))
    ready.set()
    page.wait(lambda: page.text('#about').startswith('Ready: '))
    for expected in (
      'The device failed. Try fewer images. RESOURCE_EXHAUSTED',
      'These weights cannot be loaded.',
      'The demo failed: its log says why.',
    ):
      page.press('generate')
      page.wait(lambda: page.all('#preview img'))
      page.wait(lambda: page.all('#generate:enabled'))
      page.wait(lambda text=expected: page.status() == text)
      assert not page.all('#preview img') and page.all('#cancel:disabled')
    again = Page(browser, address)
    again.wait(lambda: again.text('#about').startswith('Ready: '))
    assert again.status().startswith('No images yet')


def test_sessions_are_forgotten(monkeypatch):
  """Gradio would keep what it has for those that never come back."""
  monkeypatch.setattr(access, '_ABSENT', 1.0)
  with served(None) as (page, address):
    (index,) = (
      index
      for index, function in page.fns.items()
      if getattr(function.fn, '__name__', '') == 'cancel'
      and function.targets[0][1] == 'click'
    )
    for i in range(30):
      call = {'session_hash': f's{i}', 'fn_index': index, 'data': []}
      assert status_of(f'{address}{JOIN}', json.dumps(call).encode()) == 200
    held = page._queue
    assert len(held.pending_messages_per_session) > 0
    time.sleep(1.1)
    assert status_of(address) == 200
    assert not held.pending_messages_per_session
    assert not held.pending_event_ids_session


def test_password():
  with served([('ann', 'long enough')]) as (_, address):
    assert status_of(address, Host='example.com') == 200
    assert status_of(f'{address}config') == 401
    for path, method in access._PATHS.items():
      expected = 200 if path in access._BEFORE_LOGIN else 401
      if path != '/login':
        body = b'{}' if method == 'POST' else None
        assert status_of(address[:-1] + path, body) == expected, path
    assert status_of(f'{address}gradio_api/heartbeat/x') == 401
    login = f'{address}login'
    assert status_of(login, b'username=ann&password=long+enougH') == 400
    assert status_of(login, 'username=ä&password=%FF'.encode()) == 400
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    # As browsers send it.
    form = b''.join(
      b'--x1\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % pair
      for pair in ((b'username', b'ann'), (b'password', b'long enough'))
    )
    kind = {'Content-Type': 'multipart/form-data; boundary=x1'}
    request = urllib.request.Request(login, form + b'--x1--\r\n', kind)
    with opener.open(request) as response:
      assert response.status == 200
    with opener.open(f'{address}config') as response:
      assert response.status == 200
