"""Work on many files in several processes, with progress."""

import concurrent.futures
import functools
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tqdm

from resnet_jax.console import output
from resnet_jax.errors import UserError
from resnet_jax.parallel import signals


def each(
    function: Callable[[Any], Any], jobs: Sequence, *, workers: int, total: int
) -> Iterator:
    """Yields `function(job)` of every job as soon as it is there, in any order.

    Args:
      function: picklable; what it raises ends the work.
      jobs: picklable; `len(job)` is how many images one stands for.
      workers: processes; 1: none but this one.
      total: images to show, of which those not in `jobs` are done already.

    Raises:
      UserError: a process was killed from outside.
    """
    bar = tqdm.tqdm(
        total=total,
        initial=total - sum(map(len, jobs)),
        unit=" images",
        dynamic_ncols=True,
        # A log file gets a line now and then.
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
    with bar:
        if min(workers, len(jobs)) <= 1:
            for job in jobs:
                yield function(job)
                bar.update(len(job))
            return
        # Not forked: threads of TensorFlow or jax do not survive it.
        pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, len(jobs)),
            multiprocessing.get_context("spawn"),
            initializer=start_worker,
            initargs=(os.getpid(),),
        )
        done = queue.SimpleQueue()

        def note(size: int, future: concurrent.futures.Future) -> None:
            done.put((future, size))

        def submit() -> None:
            # Ctrl-C is left to this process, while they still start as well.
            with signals.blocked({signal.SIGINT}):
                for job in jobs:
                    try:
                        future = pool.submit(function, job)
                    except Exception as error:
                        # It is raised where its result is asked for.
                        future = concurrent.futures.Future()
                        future.set_exception(error)
                    future.add_done_callback(functools.partial(note, len(job)))

        try:
            # Ctrl-C can only raise in the main thread. It would do so while that holds
            # locks of the pool, which then never ends.
            threading.Thread(target=submit).start()
            for _ in jobs:
                future, size = done.get()
                yield future.result()
                bar.update(size)
        except BrokenProcessPool:
            raise UserError(
                "A worker process was killed, which a lack of memory may do; run the"
                " same command again with a smaller --num_workers."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker(parent: int) -> None:
    """Makes output safe, and ends this process when its parent has ended in any way."""
    output.prepare()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
