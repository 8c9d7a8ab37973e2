"""What comes from data is escaped where it is shown, and commands quoted."""

import html
import os
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from mdm_jax.report import gallery
from mdm_jax.runtime.printable import command_line, printable, quoted
from mdm_jax.serving import html as page
from tests import fuzzing

CAPTION = 'a \x1b[31mred\x1b[0m ring\x07\x9b2J\u202egnir\u2066\u2028\x7f\x00'
ESCAPED = r'a \x1b[31mred\x1b[0m ring\x07\u009b2J\u202egnir\u2066\u2028\x7f\x00'


def is_plain(text: str) -> bool:
  """Whether a terminal shows each character as itself, in this order."""
  return not any(
    letter not in '\n\t'
    and unicodedata.category(letter) in ('Cc', 'Cs', 'Zl', 'Zp')
    or unicodedata.bidirectional(letter)
    in ('LRE', 'RLE', 'LRO', 'RLO', 'PDF', 'LRI', 'RLI', 'FSI', 'PDI')
    for letter in text
  )


def test_control_characters_are_escaped():
  assert printable(CAPTION) == ESCAPED
  assert is_plain(ESCAPED)
  assert printable('\udcff\ud800') == r'\udcff\ud800'
  for text in ('a\tring\n', '赤い丸 “é” 👩‍👩‍👧 עִבְרִית', r'\x1b'):
    assert printable(text) == text


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_text_can_be_shown(count):
  def make(rng):
    most = rng.choice([0xA0, 0x2100, 0x10FFFF], 50)
    return ''.join(map(chr, rng.integers(0, most)))

  def read(text):
    assert is_plain(printable(text))
    assert is_plain(quoted(text)) and '\n' not in quoted(text)
    printable(text).encode()

  fuzzing.check(read, make, count, refuses=())


@pytest.mark.parametrize(
  'text',
  [
    'a red ring',
    '',
    '"; rm -rf x; \'$(y)` \\',
    '赤い丸',
    CAPTION.replace('\0', ''),
    'line\nnext\ttab \x1b \' \\n "',
    'wide \u2028 and \u202e',
  ],
)
def test_a_command_means_what_it_says(text):
  line = command_line('sample', workdir='a run', prompt=text, best=None)
  assert line.startswith("python -m mdm_jax.sample --workdir='a run' --prompt=")
  assert is_plain(line) and '\n' not in line
  shown = subprocess.run(
    ['bash', '-c', f'printf %s {quoted(text)}'],
    capture_output=True,
    check=True,
    env={'LC_ALL': 'C.UTF-8'},
  )
  assert shown.stdout.decode() == text


def test_pages_escape_captions(tmp_path):
  caption = CAPTION + '<script>'
  entry = gallery.Entry(
    caption, (np.zeros((8, 8, 3), np.uint8),), ('0.png',), {'seed': caption}
  )
  gallery.save(tmp_path / 'x.html', caption, {caption: {'a': caption}}, [entry])
  text = (tmp_path / 'x.html').read_text(encoding='utf-8')
  assert is_plain(text) and '<script>' not in text
  assert text.count(html.escape(ESCAPED + '<script>')) == 6
  assert ESCAPED in page.line(caption) and '<script>' not in page.line(caption)


COMMAND = r"""
import sys
from absl import logging
from mdm_jax.runtime import command

def main(_):
  logging.set_verbosity(logging.INFO)
  logging.info('a \x1b[31mring\x1b[0m \u2192 \udcff\n\tline 2')
  logging.warning('careful')
  logging.error('wrong')
  print('\u2192')
  sys.exit('error: a \x1b[31mring\u2028 \u2192')

command.run(main)
"""


@pytest.mark.parametrize(
  'variables', [{}, {'LC_ALL': 'C', 'PYTHONIOENCODING': 'ascii'}]
)
def test_logs_and_errors_are_escaped(variables):
  result = subprocess.run(
    [sys.executable, '-c', COMMAND],
    capture_output=True,
    env=os.environ | variables,
  )
  arrow = r'\u2192' if variables else '→'
  assert result.returncode == 1
  assert result.stdout.decode() == f'{arrow}\n'
  first, second, warning, error, last = result.stderr.decode().splitlines()
  time, text = first[:9], first[9:]
  assert re.fullmatch(r'[0-2]\d:[0-5]\d:[0-5]\d ', time)
  assert text == rf'a \x1b[31mring\x1b[0m {arrow} \udcff'
  assert second == '\tline 2'
  assert (warning[9:], error[9:]) == ('WARNING careful', 'ERROR wrong')
  assert last == rf'error: a \x1b[31mring\u2028 {arrow}'


def test_a_reader_that_has_read_enough_is_no_error():
  text = COMMAND.replace("print('\\u2192')", "print('x' * 10**6)")
  process = subprocess.Popen(
    [sys.executable, '-c', text], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  process.stdout.close()
  lines = process.stderr.read().decode().splitlines()
  assert process.wait() == 1
  assert lines[-1].endswith(' ERROR wrong')  # The last of its log.


def test_what_the_file_system_refuses_is_a_line():
  text = COMMAND.replace('sys.exit', "open('/dev/null/x') #")
  result = subprocess.run([sys.executable, '-c', text], capture_output=True)
  last = result.stderr.decode().splitlines()[-1]
  assert last == 'error: /dev/null/x: Not a directory.'
  assert (result.returncode, b'Traceback' in result.stderr) == (1, False)
