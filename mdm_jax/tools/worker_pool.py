"""Runs jobs in worker processes, with a progress bar."""

from collections.abc import Callable, Sequence
import concurrent.futures
import contextlib
import multiprocessing
from typing import Any

import tqdm

from mdm_jax import child_process

# Seconds from SIGTERM to the end of a worker: time enough for this process, if
# it gets the same signal, to end as it should, and for an executor that ends
# its workers so.
_PATIENCE = 5.0


def run_all(
  function: Callable, jobs: Sequence[Any], num_workers: int, unit: str
) -> None:
  """Calls a function for every job, in worker processes if there are several.

  Args:
    function: called with one job.
    jobs: the arguments.
    num_workers: worker processes; with one, this process calls the function.
    unit: what a job is, for the progress bar.
  """
  with contextlib.ExitStack() as stack:
    bar = stack.enter_context(
      tqdm.tqdm(total=len(jobs), unit=unit, smoothing=0, disable=not jobs)
    )
    if min(num_workers, len(jobs)) < 2:
      for job in jobs:
        function(job)
        bar.update()
      return
    pool = stack.enter_context(
      concurrent.futures.ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context('spawn'),
        child_process.begin,
        (_PATIENCE,),
      )
    )
    # After an error no further job is started.
    stack.callback(pool.shutdown, cancel_futures=True)
    for future in concurrent.futures.as_completed(
      [pool.submit(function, job) for job in jobs]
    ):
      future.result()
      bar.update()
