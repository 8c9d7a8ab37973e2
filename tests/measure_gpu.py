"""Checks and measures this project on one NVIDIA GPU, unattended.

    python -m tests.measure_gpu OUTPUT [--torch=SCRIPT] [--train=FLAGS ...]
    python -m tests.measure_gpu OUTPUT --tiny [--torch=SCRIPT]
    python -m tests.measure_gpu WHEELS --wheels

Runs a list of steps, the most telling first, each in a process of its own and
with a limit of time. After each, OUTPUT/report.json has what it found, and
OUTPUT/STEP.log what it printed, so that a run that is cut off still tells.

--torch is a script that measures the same network in PyTorch: `SCRIPT bench
--model=64 --batch=64` prints a line of JSON. --train starts a training beside
the steps, with these flags of mdm_jax.main. It is paused while a step is
measured, not while one compiles; its weights come as OUTPUT/RECIPE.safetensors.
--tiny tries the steps themselves, with the smallest networks, on any machine.
--wheels saves what a machine without a network needs beside JAX.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
import time

from mdm_jax.runtime import preemption

_PYTHON = (sys.executable, '-m')
# Every level sees the whole batch, and activations are kept, as in SCRIPT.
_NETWORKS = {
  '64': ('configs/cc12m_64.py', 64, ()),
  '256': (
    'configs/cc12m_256.py',
    32,
    (
      '--config.stages[1].mixed_ratio=(0.0,1.0)',
      '--config.model.levels[1].remat=none',
    ),
  ),
  '1024': (
    'configs/cc12m_1024.py',
    8,
    (
      '--config.model.levels[1].remat=none',
      '--config.model.levels[2].remat=none',
    ),
  ),
}
_TINY = {
  'tiny': (
    'configs/cc12m_256.py:smoke',
    8,
    ('--config.stages[1].mixed_ratio=(0.0,1.0)',),
  )
}
# What XLA's image of JAX for GPUs may lack.
_NEEDED_BESIDE_JAX = (
  *('array_record', 'clu', 'dm-tree', 'docstring-parser', 'etils', 'flax'),
  *('fsspec', 'googleapis-common-protos', 'grain', 'immutabledict'),
  *('ml-collections', 'orbax-checkpoint', 'promise', 'simple-parsing'),
  *('tensorflow-datasets', 'tensorflow-metadata', 'termcolor', 'toml'),
  'xxhash',
)
# One network and one loss of each kind: compiling is what takes the time.
_GOLDEN = (
  'bfloat16 or release and (nested3_mixed-1 or unet_masked_scale or '
  'nested2_mixed2to1 or ddim_nested3)'
)
_TRAINING = ('--config.sample_every=1000000', '--config.checkpoint_every=1000')

_TRAINING_MEMORY = 0.1  # of the GPU, for each training


@dataclasses.dataclass(frozen=True)
class Step:
  """A command that is run.

  Attributes:
    name: of the step.
    command: its arguments.
    seconds: limit of its time.
    environment: further environment variables.
    warm_up: arguments of a first run, which fills the caches of compiled
      programs; None for none. The command itself then has the GPU for itself.
  """

  name: str
  command: tuple[str, ...]
  seconds: float = 240
  environment: dict[str, str] = dataclasses.field(default_factory=dict)
  warm_up: tuple[str, ...] | None = None


def device() -> dict:
  """Versions, the device, and what it reaches by itself."""
  import jax
  import jax.numpy as jnp

  def seconds(fn, *args, count=20):
    fn = jax.jit(fn)
    fn(*args).block_until_ready()
    begin = time.perf_counter()
    for _ in range(count):
      out = fn(*args)
    out.block_until_ready()
    return (time.perf_counter() - begin) / count

  size = 8192 if jax.default_backend() == 'gpu' else 512
  draw = jax.random.normal
  a, b = (draw(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
  wide = draw(jax.random.key(2), (4, size, size), jnp.float32)
  memory = jax.devices()[0].memory_stats() or {}
  return {
    'device': jax.devices()[0].device_kind,
    'memory_gib': memory.get('bytes_limit', 0) / 2**30,
    'jax': jax.__version__,
    'python': platform.python_version(),
    'cores': os.cpu_count(),
    'matmul_flops': 2 * size**3 / seconds(jnp.matmul, a, b),
    'copy_bytes_per_second': 2 * wide.nbytes / seconds(jnp.negative, wide),
  }


def _steps(
  out: pathlib.Path, torch: pathlib.Path | None, tiny: bool
) -> list[Step]:
  self = (*_PYTHON, 'tests.measure_gpu', str(out), '--step')
  found = [
    Step('device', (*self, 'device')),
    Step(
      'golden',
      (
        *_PYTHON,
        'pytest',
        *('-q', '-s', '-n0', '-p', 'no:cacheprovider'),
        'tests/models/test_nested_unet.py',
        'tests/diffusion/test_golden_loss.py',
        'tests/diffusion/test_golden_samples.py',
        *('-k', _GOLDEN),
      ),
      seconds=400,
      # Products of float32 otherwise round their operands to 10 bits.
      environment={'JAX_DEFAULT_MATMUL_PRECISION': 'highest'},
    ),
  ]
  networks = _TINY if tiny else _NETWORKS
  counts = ('--steps=2', '--sampling_steps=2') if tiny else ('--steps=10',)
  for size, (recipe, batch, more) in networks.items():
    found.append(_bench(out, 'train', size, recipe, batch, (*more, *counts)))
    if size == '64':
      found.append(
        dataclasses.replace(
          _bench(
            out, 'train', size, recipe, batch, (*more, *counts), '_cublas'
          ),
          environment={'XLA_FLAGS': '--xla_gpu_enable_triton_gemm=false'},
        )
      )
    if torch:
      call = (sys.executable, str(torch), 'bench', f'--model={size}')
      call += (f'--batch={batch}', '--channels-last')
      if tiny:
        call += ('--device=cpu', '--dtype=float32', '--steps=1')
      for name, flags in ((f'torch_{size}', ()), ('_compiled', ('--compile',))):
        name = f'torch_{size}{name}' if flags else name
        found.append(
          Step(name, (*call, *flags), warm_up=('--steps=1', '--warmup=1'))
        )
    if size in ('64', 'tiny'):
      found.append(_bench(out, 'sample', size, recipe, 16, (*more, *counts)))
  found.append(Step('resume', (*self, 'resume'), 300))
  return found


def _bench(out, part, size, recipe, batch, flags, variant='') -> Step:
  name = f'{part}_{size}{variant}'
  command = (
    *_PYTHON,
    'mdm_jax.tools.bench',
    f'--config={recipe}',
    f'--batch_size={batch}',
    f'--only={part}',
    f'--output={out / name}.json',
    f'--profile={out / name}',
    *flags,
  )
  return Step(name, command, warm_up=('--steps=1',))


def resume(out: pathlib.Path) -> dict:
  """Trains on the GPU, on the CPU, and on the GPU; SIGTERM ends each turn."""
  saved = []
  for platforms in (None, 'cpu', None):
    command = (
      *_PYTHON,
      'mdm_jax.main',
      '--config=configs/shapes_64.py:smoke',
      f'--workdir={out / "resumed"}',
      '--config.stages[0].steps=1000000',
      '--config.log_every=1',
    )
    environment = {'JAX_PLATFORMS': platforms} if platforms else {}
    process = subprocess.Popen(
      command,
      env=os.environ | environment,
      stderr=subprocess.STDOUT,
      stdout=subprocess.PIPE,
      text=True,
    )
    stopped = False
    for line in process.stdout:
      print(line, end='', flush=True)
      if not stopped and re.search(r' step \d+/', line):
        process.send_signal(signal.SIGTERM)
        stopped = True
      if found := re.search(r'Saved step (\d+)', line):
        saved.append(int(found[1]))
    if process.wait() not in (0, preemption.EXIT_CODE):
      raise RuntimeError(f'Training ended with {process.returncode}.')
  if len(saved) != 3 or saved != sorted(set(saved)):
    raise RuntimeError(f'Saved at steps {saved}.')
  return {'saved': saved}


class Training:
  """A training beside the steps, which can be paused."""

  def __init__(self, flags: str, out: pathlib.Path):
    """Starts it with flags of `mdm_jax.main`, separated as in a shell."""
    flags = shlex.split(flags)
    (recipe,) = (flag for flag in flags if flag.startswith('--config='))
    self.name = pathlib.Path(recipe).name.replace('.py', '').replace(':', '_')
    self.output = out / f'{self.name}.safetensors'
    self._workdir = out / self.name
    with (out / f'{self.name}.log').open('a') as log:
      self._process = subprocess.Popen(
        (
          *_PYTHON,
          'mdm_jax.main',
          *flags,
          f'--workdir={self._workdir}',
          *_TRAINING,
        ),
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ
        | {'XLA_PYTHON_CLIENT_MEM_FRACTION': str(_TRAINING_MEMORY)},
      )

  @contextlib.contextmanager
  def paused(self):
    """Stops the process meanwhile."""
    self._process.send_signal(signal.SIGSTOP)
    try:
      yield
    finally:
      self._process.send_signal(signal.SIGCONT)

  def end(self, seconds: float) -> dict:
    """Waits for the end, or asks for it, and exports the weights."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(max(seconds, 1))
    self._process.terminate()
    code = self._process.wait()
    subprocess.run(
      (
        *_PYTHON,
        'mdm_jax.tools.export_weights',
        f'--workdir={self._workdir}',
        f'--output={self.output}',
      ),
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    )
    return {'exit': code}


def _run(step: Step, out: pathlib.Path, trainings: list[Training]) -> dict:
  """Runs one step; its output goes to a file."""
  found, environment = {}, os.environ | step.environment
  if trainings:
    left = 1 - _TRAINING_MEMORY * (len(trainings) + 1)
    environment |= {'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{left:.2f}'}
  runs = {'': step.command}
  if step.warm_up is not None:
    runs = {'warm-up ': (*step.command, *step.warm_up), **runs}
  for label, command in runs.items():
    with contextlib.ExitStack() as stack:
      if step.warm_up is not None and not label:
        for training in trainings:
          stack.enter_context(training.paused())
      file = stack.enter_context((out / f'{step.name}.log').open('w'))
      begin = time.monotonic()
      process = subprocess.Popen(
        command,
        stdout=file,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
      )
      try:
        code = process.wait(step.seconds)
      except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        code = f'not ended after {step.seconds} s'
    found |= {
      f'{label}exit': code,
      f'{label}seconds': round(time.monotonic() - begin, 1),
    }
    if code:
      break
  for line in (out / f'{step.name}.log').read_text('utf8').splitlines()[::-1]:
    if line.startswith('{'):
      found |= json.loads(line)
      break
  written = out / f'{step.name}.json'
  return found | (json.loads(written.read_text()) if written.exists() else {})


def save_wheels(directory: pathlib.Path) -> None:
  """Saves wheels of this environment's pure packages, and of a few others."""
  subprocess.run(
    (
      *_PYTHON,
      'pip',
      'wheel',
      '--no-deps',
      f'--wheel-dir={directory}',
      *(
        f'{name}=={importlib.metadata.version(name)}'
        for name in _NEEDED_BESIDE_JAX
      ),
    ),
    check=True,
  )


def main() -> None:
  """Runs all steps, or one of them in this process."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('output', type=pathlib.Path)
  parser.add_argument('--torch', type=pathlib.Path)
  parser.add_argument('--train', action='append', default=[])
  parser.add_argument('--seconds', type=float, default=3600)
  parser.add_argument('--only', help='names of steps, separated by commas')
  parser.add_argument('--tiny', action='store_true')
  parser.add_argument('--wheels', action='store_true')
  parser.add_argument('--step')
  arguments = parser.parse_args()
  end = time.monotonic() + arguments.seconds
  out = arguments.output.absolute()
  if arguments.wheels:
    save_wheels(out)
    return
  if arguments.step:
    step = {'device': device, 'resume': lambda: resume(out)}[arguments.step]
    print(json.dumps(step()))
    return
  out.mkdir(parents=True, exist_ok=True)
  platforms = 'cpu' if arguments.tiny else 'cuda,cpu'
  os.environ |= {'JAX_PLATFORMS': platforms, 'TESTS_PLATFORMS': platforms}
  report = {}

  def keep(name, found):
    report[name] = found
    (out / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
    print(name, json.dumps(found)[:300], flush=True)

  trainings = [Training(flags, out) for flags in arguments.train]
  only = arguments.only and arguments.only.split(',')
  for step in _steps(out, arguments.torch, arguments.tiny):
    if (not only or step.name in only) and time.monotonic() < end:
      keep(step.name, _run(step, out, trainings))
  for training in trainings:
    keep(training.name, training.end(end - time.monotonic()))


if __name__ == '__main__':
  main()
