"""What the stages of a training run share: devices, logs and stop requests."""

from collections.abc import Iterator
import contextlib
import dataclasses
import json

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdm_jax.checkpoint import identity
from mdm_jax.report.goodput import Goodput
from mdm_jax.report.metric_writer import MetricWriter
from mdm_jax.report.trackers import make_trackers
from mdm_jax.runtime import distributed, preemption, watchdog
from mdm_jax.steps.state import Params

# The watchdog's limit for each bucket of the goodput, where names differ.
_PHASES = {'compile': 'start_up', 'data': 'step', 'sample': 'evaluate'}


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run.

  Attributes:
    workdir: of the run.
    mesh: the devices.
    frozen: parameters that the model needs beside the trained ones.
    writer: receives metrics and images.
    goodput: is told what time is spent on.
    stop: turns signals into stop requests.
  """

  workdir: str
  mesh: Mesh
  frozen: Params
  writer: MetricWriter
  goodput: Goodput
  stop: preemption.StopHandler

  @contextlib.contextmanager
  def preemptible(self, bucket: str) -> Iterator[None]:
    """A preemptible section, whose time counts in a bucket of the goodput."""
    with self.goodput.time(bucket):
      self.stop.allow()
      yield
      # Other processes may have received a stop request meanwhile, and not
      # have come to their end of the section.
      self.stop.allow(distributed.any_of(self.stop.requested))
      self.stop.defer()

  @contextlib.contextmanager
  def saving_at_the_end(self) -> Iterator[None]:
    """What is closed after this, however it ends, waits for saves.

    The watchdog's limit is then that of a save.
    """
    try:
      yield
    finally:
      self.goodput.switch('save')


@contextlib.contextmanager
def running(
  config: ConfigDict,
  workdir: str,
  mesh: Mesh,
  frozen: Params,
  began: float | None = None,
) -> Iterator[Run]:
  """Opens logs, watchdog and stop handler, and closes them at the end.

  Args:
    config: of the run.
    workdir, mesh, frozen: see `Run`.
    began: `time.monotonic()` at the start of the process; None for now.
  """
  dog = watchdog.Watchdog(config.watchdog)
  # A session that continues a run continues it in its trackers, too.
  if jax.process_index() == 0:
    identity.begin_run(workdir)
  writer = MetricWriter(
    workdir,
    make_trackers(
      config.trackers,
      workdir,
      json.loads(config.to_json()),
      identity.read_run(workdir),
    ),
  )
  goodput = Goodput(
    workdir, began, lambda bucket: dog.watch(_PHASES.get(bucket, bucket))
  )
  stop = preemption.StopHandler(
    lambda: (goodput.flush(), writer.flush()),
    distributed.Peers() if jax.process_count() > 1 else None,
    lambda: dog.watch('save'),
  )
  with (
    contextlib.closing(dog),
    contextlib.closing(stop),
    contextlib.closing(goodput),
    contextlib.closing(writer),
  ):
    yield Run(workdir, mesh, frozen, writer, goodput, stop)
