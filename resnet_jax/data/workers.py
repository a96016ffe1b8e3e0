"""Work on many files: in processes, with a progress bar, or in threads, in order."""

import collections
import concurrent.futures
import functools
import multiprocessing
import multiprocessing.pool
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tqdm

from resnet_jax.console import output
from resnet_jax.errors import UserError
from resnet_jax.parallel import signals


# `multiprocessing.Pool.imap_unordered` would wait forever for a killed worker.
def map_unordered(
    function: Callable[[Any], Any], jobs: Sequence, *, workers: int, total: int
) -> Iterator[Any]:
    """Yields `function(job)` for every job as soon as it is done, in any order.

    It shows a progress bar that counts images.

    Args:
      function: A picklable function; an exception that it raises ends the work.
      jobs: Picklable arguments of the function; `len(job)` is its number of images.
      workers: The number of processes; 1 does the work in this process.
      total: The number of images at which the bar is full. Images that are not in
        `jobs` count as done already.

    Raises:
      UserError: A process was killed from outside.
    """
    bar = tqdm.tqdm(
        total=total,
        initial=total - sum(map(len, jobs)),
        unit=" images",
        dynamic_ncols=True,
        # In a log file, every update is a line of its own.
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
    with bar:
        if min(workers, len(jobs)) <= 1:
            for job in jobs:
                yield function(job)
                bar.update(len(job))
            return
        # A fork would not do: threads of TensorFlow and jax do not survive it.
        pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, len(jobs)),
            multiprocessing.get_context("spawn"),
            initializer=start_worker,
            initargs=(os.getpid(),),
        )
        done: queue.SimpleQueue[tuple[concurrent.futures.Future, int]]
        done = queue.SimpleQueue()

        def note(size: int, future: concurrent.futures.Future) -> None:
            done.put((future, size))

        def submit() -> None:
            # Ctrl-C is left to this process, also while the workers start.
            with signals.blocked({signal.SIGINT}):
                for job in jobs:
                    try:
                        future = pool.submit(function, job)
                    except Exception as error:
                        # The loop below raises it when it asks for the result.
                        future = concurrent.futures.Future()
                        future.set_exception(error)
                    future.add_done_callback(functools.partial(note, len(job)))

        try:
            # Ctrl-C raises in the main thread alone. If that submitted the jobs, it
            # could be interrupted while it holds locks of the pool, which would hang.
            threading.Thread(target=submit).start()
            for _ in jobs:
                future, size = done.get()
                yield future.result()
                bar.update(size)
        except BrokenProcessPool:
            raise UserError(
                "A worker process was killed, perhaps for lack of memory; run the"
                " same command again with a smaller --num_workers."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


# The largest number of threads; Python's lock would keep more from working at once.
MOST_THREADS = 16


def map_ahead(
    function: Callable[[Any], Any], items: Iterable, *, ahead: int
) -> Iterator[Any]:
    """Yields `function(item)` for each item in order, computed ahead in threads.

    It is for functions that release Python's lock, as decoding does. An exception that
    the function raises is raised in its place.

    Args:
      function: A function that may be called in any thread.
      items: Its arguments, which are asked for one by one in the calling thread.
      ahead: The number of results that may wait until they are asked for.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    threads = min(cores or os.cpu_count() or 1, MOST_THREADS)
    waiting: collections.deque[multiprocessing.pool.AsyncResult] = collections.deque()
    # The threads of `concurrent.futures` would keep the process from ending while one
    # of them waits for a pipe.
    with multiprocessing.pool.ThreadPool(threads) as pool:
        for item in items:
            waiting.append(pool.apply_async(function, (item,)))
            if len(waiting) > ahead:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def start_worker(parent: int) -> None:
    """Prepares a worker: safe output, and an end when the parent process has ended."""
    output.prepare()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
