"""The order of examples, and batches of them.

The order is a function of (seed, step): each epoch is a permutation of the split keyed
by (seed, epoch), epochs follow each other without a gap, and batch `t` is the positions
[t * batch_size, (t + 1) * batch_size). Each image's augmentation is keyed by (seed,
epoch, index). So batches do not depend on the number of workers, processes or restarts,
and the position of a run is its step.

Of a mix, each epoch takes from each source its share and goes on in that source's own
permutations where the epoch before it stopped. What is said here of the epoch of an
image is then the epoch of its source.
"""

import atexit
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker

import grain
import jax
import numpy as np
import psutil
from absl import flags
from jaxtyping import Int, Int32, Int64, UInt64

from resnet_jax.data.augment import Augment
from resnet_jax.data.cache import MemorySource
from resnet_jax.data.crops import mix
from resnet_jax.data.decode import Picture
from resnet_jax.data.sources import NamedSource, sizes_and_shares
from resnet_jax.data.workers import start_worker
from resnet_jax.errors import BadImageError, UserError
from resnet_jax.parallel import processes, signals

# First words of what random numbers are made of.
ORDER, AUGMENT, MIX = 0, 1, 2
# Most examples that are made in one go.
CHUNK = 32

Batch = dict[str, np.ndarray]


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of the examples of one source in one of its epochs."""
    return np.random.default_rng([ORDER, seed, epoch]).permutation(size)


@functools.lru_cache(maxsize=2)
def epoch_order(
    seed: int, epoch: int, sizes: tuple[int, ...], shares: tuple[int, ...]
) -> tuple[Int64[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
    """The examples of an epoch in order: index, and epoch of the source, of each.

    Args:
      seed: of the order.
      epoch: number of the epoch.
      sizes: images of each source that is mixed; indices count through all of them.
      shares: images that an epoch takes of each source.
    """
    indices, epochs = [], []
    starts = itertools.accumulate(sizes, initial=0)
    for start, size, share in zip(starts, sizes, shares, strict=False):
        first, behind = epoch * share, (epoch + 1) * share
        for own in range(first // size, -(-behind // size)):
            whole = permutation(seed, own, size)
            taken = whole[max(first - own * size, 0) : behind - own * size]
            indices.append(start + taken)
            epochs.append(np.full(len(taken), own, np.int32))
    source_of = np.repeat(np.arange(len(shares)), shares)
    np.random.default_rng([MIX, seed, epoch]).shuffle(source_of)
    # Where the first source's turns are, then the second one's, ...
    turns = np.argsort(source_of, kind="stable")
    return tuple(_put(np.concatenate(parts), turns) for parts in (indices, epochs))


def _put(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    result = np.empty_like(values)
    result[places] = values
    return result


@dataclasses.dataclass(frozen=True)
class Views:
    """What the training order has at some positions.

    Attributes:
      indices: of the images.
      epochs: of their sources.
      turns: how often an image came right before, with repeated augmentation.
    """

    indices: Int[np.ndarray, " n"]
    epochs: Int[np.ndarray, " n"]
    turns: Int[np.ndarray, " n"]

    def keys(self, seed: int) -> UInt64[np.ndarray, " n"]:
        """The key of each image's augmentation."""
        keys = (AUGMENT + 4 * self.turns).astype(np.uint64)
        for word in (np.full(len(keys), seed), self.epochs, self.indices):
            keys = mix(keys ^ word.astype(np.uint64))
        return keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizeSchedule:
    """Progressive resizing: the side of the training images, by the step alone.

    It grows linearly, in multiples, from `first` at step `start` to `last` at step
    `end`, as FFCV's (which looks at the epoch) and Composer's do.

    Attributes:
      first, last: sides in pixels.
      start, end: steps, which need not be whole.
      multiple: what sides before `end` are rounded to.
    """

    first: int
    last: int
    start: float
    end: float
    multiple: int = 1

    def __call__(self, step: int) -> int:
        """The side of the images of a step, counted from 0."""
        if step >= self.end:
            return self.last
        done = max(step - self.start, 0) / (self.end - self.start)
        side = self.first + done * (self.last - self.first)
        return max(round(side / self.multiple), 1) * self.multiple

    def sides(self, steps: range) -> list[int]:
        """All that there are, in order of appearance."""
        return list(dict.fromkeys(map(self, steps)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Makes the example at a position; the same one in whatever process it runs.

    An image that cannot be decoded raises, or is replaced if `skip_bad`: in
    training by the next good one of the split, in evaluation by a masked one. The
    example's `bad` holds the index of the bad image, or -1.

    Attributes:
      source: the split.
      augment: what is done to each image.
      channels: of the result, 1 or 3.
      skip_bad: whether a bad image is passed over.
      label_shape: () where each image has one label, else (most,).
      repeats: how often an image comes in a row, each time augmented anew (Hoffer et
        al. 2020, arXiv:1901.09335); an epoch then sees that part of the images.
    """

    source: NamedSource
    augment: Augment
    channels: int
    skip_bad: bool
    label_shape: tuple[int, ...] = ()
    repeats: int = 1

    def train(self, positions: Sequence[int], seed: int) -> Batch:
        """The examples at positions of the endless training order."""
        size = len(self.source)
        places = [divmod(position, size) for position in positions]
        views = self._views(seed, places)
        keys = views.keys(seed)
        if not self.at_once:
            rows = zip(places, views.indices.tolist(), keys.tolist(), strict=True)
            return _collect((self._train(*row, seed) for row in rows), len(places))
        return {
            "image": self.augment.pad_and_crop(self.source.images[views.indices], keys),
            "label": self.source.labels[views.indices],
            "mask": np.ones(len(places), np.bool_),
            "index": views.indices,
            "bad": np.full(len(places), -1),
        }

    @property
    def at_once(self) -> bool:
        """Whether all images are one array in memory, of which crops are taken."""
        images = getattr(self.source, "images", None)
        wanted = (self.augment.size, self.augment.size, self.channels)
        return (
            self.augment.only_crops
            and isinstance(self.source, MemorySource)
            and isinstance(images, np.ndarray)
            and images.shape[1:] == wanted
        )

    def _views(self, seed: int, places: Sequence[tuple[int, int]]) -> Views:
        """What the order has at (epoch, offset)s."""
        found = []
        for epoch, offset in places:
            order = epoch_order(seed, epoch, *sizes_and_shares(self.source))
            place, turn = divmod(offset, self.repeats)
            found.append((*(part[place] for part in order), turn))
        return Views(*np.array(found, np.int64).T)

    def _train(self, place: tuple[int, int], index: int, key: int, seed: int) -> Batch:
        try:
            return self._example(index, key, bad=-1)
        except BadImageError as error:
            self._stop_unless_skipped(error)
        epoch, offset = place
        size = len(self.source)
        for other in range(offset + 1, offset + size):
            view = self._views(seed, [(epoch, other % size)])
            with contextlib.suppress(BadImageError):
                return self._example(
                    view.indices.item(), view.keys(seed).item(), bad=index
                )
        raise UserError(f"{self.source.where} holds no image that can be decoded.")

    def at(self, size: int) -> "Examples":
        """The same examples with another `augment.size`."""
        if size == self.augment.size:
            return self
        augment = dataclasses.replace(self.augment, size=size)
        return dataclasses.replace(self, augment=augment)

    def test(self, positions: Sequence[int]) -> Batch:
        """The examples at positions of the split; padding behind its end."""
        return _collect(map(self._test, positions), len(positions))

    def _test(self, position: int) -> Batch:
        if position >= len(self.source):
            return self._padding(bad=-1)
        try:
            return self._example(position, None, bad=-1)
        except BadImageError as error:
            self._stop_unless_skipped(error)
            return self._padding(bad=position)

    def _stop_unless_skipped(self, error: BadImageError) -> None:
        if not self.skip_bad:
            raise BadImageError(
                f"{error} Repair it, or skip such images, which are then counted, with"
                " --config.data.on_bad_image=skip."
            ) from None

    def _example(self, index: int, key: int | None, bad: int) -> Batch:
        image, label = self.source[index]
        picture = Picture(image, self.channels, self.source.name(index))
        return _pack(self.augment(picture, key), label, index, bad, mask=True)

    def _padding(self, bad: int) -> Batch:
        nothing = np.zeros((*self.augment.shape, self.channels), np.uint8)
        no_label = np.zeros(self.label_shape)
        return _pack(nothing, no_label, -1, bad, mask=False)


def _pack(image, label, index: int, bad: int, mask: bool) -> Batch:
    return {
        "image": image,
        "label": np.asarray(label, np.int32),
        "mask": np.bool_(mask),
        "index": np.int64(index),
        "bad": np.int64(bad),
    }


def _collect(examples: Iterable[Batch], number: int) -> Batch:
    """Makes a batch; each example is put in place while its pixels are in the cache."""
    batch = {}
    for place, example in enumerate(examples):
        if not batch:
            batch = {
                key: np.empty((number, *value.shape), value.dtype)
                for key, value in example.items()
            }
        for key, value in example.items():
            batch[key][place] = value
    return batch


def bad_indices(batch: Batch) -> set[int]:
    """Indices of the images of a batch that could not be decoded."""
    return {int(index) for index in batch["bad"] if index >= 0}


def _start_worker(parent: int, *_) -> None:
    """Keeps a worker off the accelerators, and ends it when its parent has ended."""
    # Grain imports jax, which must not take the devices that the parent computes on.
    jax.config.update("jax_platforms", "cpu")
    start_worker(parent)


@functools.cache
def _end_workers_with_this_process() -> None:
    """Registers the ends of workers for all ends of this process; called once."""
    processes.at_end.append(_kill_children)
    # Before that of multiprocessing, which would wait for those that nobody closed:
    # they do not listen to its SIGTERM.
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.name.startswith("grain-"):
            child.kill()


def _kill_children() -> None:
    # Also those that have just been started, which multiprocessing does not know yet
    # and which would complain. Its tracker frees the memory that the others shared.
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "multiprocessing.resource_tracker" not in " ".join(child.cmdline()):
                child.kill()


class WorkerDiedError(UserError):
    """A process that decodes images was killed."""


class Batches:
    """An iterator over this process's part of the batches; close it in the end.

    Each batch holds uint8 `image` [rows, size, size, channels], int32 `label`, bool
    `mask` (False: padding), int64 `index` in the split and int64 `bad` [rows].
    """

    def __init__(
        self,
        chunks: grain.MapDataset,
        chunks_a_batch: int,
        num_workers: int,
        num_threads: int,
    ):
        num_workers, threads = spread(num_workers, num_threads, os.cpu_count() or 1)
        # While a batch waits to be taken, every thread makes a part of the next one.
        ahead = threads if num_workers else threads + chunks_a_batch
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        chunks = chunks.to_iter_dataset(options)
        if num_workers:
            # Grain reads absl flags when it starts workers; a library user has none.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            _end_workers_with_this_process()
            # Here, since it would unblock signals of the thread that it starts from.
            with signals.blocked():
                resource_tracker.ensure_running()
            ahead = 1 + -(-chunks_a_batch // num_workers)
            chunks = chunks.mp_prefetch(
                grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=ahead),
                worker_init_fn=functools.partial(_start_worker, os.getpid()),
            )
        self._chunks_a_batch = chunks_a_batch
        self._iterator = iter(chunks)
        # Grain starts its workers with the first batch. Signals to all processes of a
        # group are the parent's to answer.
        self._starting = signals.blocked if num_workers else contextlib.nullcontext

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            with self._starting():
                chunks = list(itertools.islice(self._iterator, self._chunks_a_batch))
            self._starting = contextlib.nullcontext
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            # A signal that comes with it says why.
            time.sleep(1)
            raise WorkerDiedError(
                "A process that decodes images was killed, perhaps for lack of memory;"
                " the same command goes on from the last checkpoint. If it happens"
                " again: fewer --config.data.num_workers (0: threads only)."
            ) from None
        if not chunks:
            raise StopIteration
        return {
            key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]
        }

    def close(self) -> None:
        """Stops the workers and frees what they shared."""
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def spread(num_workers: int, num_threads: int, cores: int) -> tuple[int, int]:
    """How many worker processes decode (0: this one), each with how many threads.

    Decoding and resizing let go of Python's lock, which the rest of the work on an
    image holds for about a tenth of the time: so threads suffice for some cores.

    Args:
      num_workers: of worker processes; -1: none up to 16 cores, else one for 8.
      num_threads: of each process; 0: those of the cores that are its share.
      cores: of the machine.
    """
    if num_workers < 0:
        num_workers = 0 if cores <= 16 else cores // 8
    share = cores // (num_workers or 1)
    return num_workers, num_threads or min(max(share, 1), 16)


def train_batches(
    examples: Examples,
    *,
    seed: int,
    batch_size: int,
    steps: range,
    rows: Sequence[int] | None = None,
    num_workers: int = -1,
    num_threads: int = 0,
    resize: ResizeSchedule | None = None,
) -> Batches:
    """Batches of the given steps, in order.

    Args:
      examples: where examples come from.
      seed: fixes order and augmentation.
      batch_size: images a step, over all processes.
      steps: which steps; `range(k, n)` goes on behind step k.
      rows: which rows of each batch this process makes; None: all.
      num_workers, num_threads: see `spread`.
      resize: the size of each step's images; None: that of the examples.

    Raises UserError where this host cannot hold its rows of a batch.
    """
    rows = range(batch_size) if rows is None else rows
    _check_memory(examples, len(rows))
    make = functools.partial(examples.train, seed=seed)
    if resize:
        make = functools.partial(
            _train_at_size,
            examples=examples,
            seed=seed,
            batch_size=batch_size,
            resize=resize,
        )
    chunks = _chunks(make, steps, batch_size, rows)
    return Batches(*chunks, _workers_of(examples, num_workers), num_threads)


def eval_batches(
    examples: Examples,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    num_workers: int = -1,
    num_threads: int = 0,
) -> Batches:
    """Batches that hold every example once; the last one is padded and masked.

    Arguments and what is raised as in `train_batches`.
    """
    rows = range(batch_size) if rows is None else rows
    _check_memory(examples, len(rows))
    steps = range(-(-len(examples.source) // batch_size))
    chunks = _chunks(examples.test, steps, batch_size, rows)
    return Batches(*chunks, _workers_of(examples, num_workers), num_threads)


def _check_memory(examples: Examples, images: int) -> None:
    # Else the system would give it, and end the process when it has no more.
    *views, height, width = examples.augment.shape
    images *= math.prod(views)
    needed = images * height * width * examples.channels
    there = psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"This host has too little memory for this run: {images:,} images of"
            f" {height}x{width} pixels take {needed / 2**30:,.1f} GiB, and it has"
            f" {there / 2**30:,.1f}. Start one with a smaller batch_size or"
            " data.image_size; a run that has a checkpoint needs more or larger hosts."
        )


def _workers_of(examples: Examples, num_workers: int) -> int:
    # Each worker would have a copy of what is in memory.
    return 0 if isinstance(examples.source, MemorySource) else num_workers


def _chunks(
    make: Callable[[Sequence[int]], Batch],
    steps: range,
    batch_size: int,
    rows: Sequence[int],
) -> tuple[grain.MapDataset, int]:
    """Makes the rows of each step's batch in chunks; the second is how many a batch."""
    # Grain hands out chunks, for its work on each element takes longer than a small
    # image does; but no whole batches, of which every thread would keep some.
    size = max(n for n in range(1, CHUNK + 1) if len(rows) % n == 0)
    chunk = functools.partial(
        _make_chunk,
        make=make,
        first_step=steps.start,
        batch_size=batch_size,
        rows=rows,
        size=size,
    )
    chunks_a_batch = len(rows) // size
    return grain.MapDataset.range(len(steps) * chunks_a_batch).map(
        chunk
    ), chunks_a_batch


# Not closures: workers get them by name.
def _train_at_size(
    positions: Sequence[int],
    examples: Examples,
    seed: int,
    batch_size: int,
    resize: ResizeSchedule,
) -> Batch:
    step = positions[0] // batch_size
    return examples.at(resize(step)).train(positions, seed)


def _make_chunk(
    k: int,
    make: Callable[[Sequence[int]], Batch],
    first_step: int,
    batch_size: int,
    rows: Sequence[int],
    size: int,
) -> Batch:
    step, chunk = divmod(k, len(rows) // size)
    first = (first_step + step) * batch_size
    return make([first + row for row in rows[chunk * size : (chunk + 1) * size]])
