"""The order of examples, and batches of them.

The order is a function of (seed, step): each epoch is a permutation of the split keyed
by (seed, epoch), epochs follow each other without a gap, and batch `t` is the positions
[t * batch_size, (t + 1) * batch_size). Each image's augmentation is keyed by (seed,
epoch, index). So batches do not depend on the number of workers, processes or restarts,
and the position of a run is its step.

From combined sources, each epoch takes each source's share of images, and continues in
that source's own permutations where the epoch before stopped. The epoch that keys an
image's augmentation is then the epoch of its source. The classes of a balanced source
are interleaved like sources.
"""
# Grain's shuffle and mix are not used: they give another order, which would change with
# Grain.

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
from fractions import Fraction
from multiprocessing import resource_tracker

import grain
import jax
import numpy as np
import psutil
from absl import flags
from jaxtyping import Int, Int32, Int64, UInt64

from resnet_jax.config.defaults import MAX_PIXELS
from resnet_jax.data.augment import Augment
from resnet_jax.data.crops import scramble
from resnet_jax.data.decode import Picture
from resnet_jax.data.derived_sources import turns_of
from resnet_jax.data.memory_source import MemorySource
from resnet_jax.data.source_protocol import NamedSource
from resnet_jax.data.workers import start_worker
from resnet_jax.errors import BadImageError, UserError
from resnet_jax.parallel import processes, signals

# The first words of the seeds of three things: the order within a source, the
# augmentation, and the order in which sources take turns.
ORDER, AUGMENT, TURNS = 0, 1, 2
# The largest number of examples that a worker makes at once.
CHUNK = 32

Batch = dict[str, np.ndarray]


def permutation(seed: int, epoch: int, size: int) -> Int64[np.ndarray, "{size}"]:
    """Returns the order of the examples of one source in one of its epochs."""
    return np.random.default_rng([ORDER, seed, epoch]).permutation(size)


@functools.lru_cache(maxsize=2)
def epoch_order(
    seed: int,
    epoch: int,
    sizes: tuple[int, ...],
    shares: tuple[int, ...],
    divisor: int = 1,
) -> tuple[Int64[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
    """Returns the examples of an epoch in order.

    Args:
      seed: The seed of the order.
      epoch: The number of the epoch.
      sizes: The number of images of each source; one, unless sources are combined.
      shares: The number of images that `divisor` epochs take from each source.
      divisor: The number of epochs after which these shares are exact; before, they
        are rounded so that each epoch has as many images.

    Returns:
      The index of each example, counted through all sources, and the epoch of its
      source.
    """
    indices, epochs, counts = [], [], []
    starts = itertools.accumulate(sizes, initial=0)
    sums = itertools.pairwise(itertools.accumulate(shares, initial=0))
    for start, size, (before, after) in zip(starts, sizes, sums, strict=False):
        first, stop = (
            number * after // divisor - number * before // divisor
            for number in (epoch, epoch + 1)
        )
        counts.append(stop - first)
        for own_epoch in range(first // size, -(-stop // size)):
            order = permutation(seed, own_epoch, size)
            begin = own_epoch * size
            own_indices = order[max(first - begin, 0) : stop - begin]
            indices.append(start + own_indices)
            epochs.append(np.full(len(own_indices), own_epoch, np.int32))
    source_numbers = np.repeat(np.arange(len(shares)), counts)
    np.random.default_rng([TURNS, seed, epoch]).shuffle(source_numbers)
    # The places of the first source's examples, then those of the second one's, ...
    places = np.argsort(source_numbers, kind="stable")
    return _put(np.concatenate(indices), places), _put(np.concatenate(epochs), places)


def _put(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    result = np.empty_like(values)
    result[places] = values
    return result


@dataclasses.dataclass(frozen=True)
class Views:
    """The images at some positions of the training order.

    Attributes:
      indices: The indices of the images.
      epochs: The epochs of their sources.
      turns: The number of times that each image came directly before, which is 0
        without repeated augmentation.
    """

    indices: Int[np.ndarray, " n"]
    epochs: Int[np.ndarray, " n"]
    turns: Int[np.ndarray, " n"]

    def keys(self, seed: int) -> UInt64[np.ndarray, " n"]:
        """Returns the key of each image's augmentation."""
        keys = (AUGMENT + 4 * self.turns).astype(np.uint64)
        for word in (np.full(len(keys), seed), self.epochs, self.indices):
            keys = scramble(keys ^ word.astype(np.uint64))
        return keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizeSchedule:
    """Progressive resizing: the side of the training images as a function of the step.

    It grows linearly from `first` at step `start` to `last` at step `end`, as in FFCV
    (where it is a function of the epoch) and Composer.

    Attributes:
      first: The side before step `start`, in pixels.
      last: The side from step `end` on, in pixels.
      start: The step at which the side begins to grow, which may be a fraction.
      end: The step at which it stops growing, which may be a fraction.
      multiple: Sides before `end` are rounded to a multiple of it.
    """

    first: int
    last: int
    start: float | Fraction
    end: float | Fraction
    multiple: int = 1

    def __call__(self, step: int) -> int:
        """Returns the side in pixels of the images of a step, counted from 0."""
        if step >= self.end:
            return self.last
        done = max(step - self.start, 0) / (self.end - self.start)
        side = self.first + done * (self.last - self.first)
        return max(round(side / self.multiple), 1) * self.multiple

    def sides(self, steps: range) -> list[int]:
        """Returns all sides that occur in the steps, in order of appearance."""
        return list(dict.fromkeys(map(self, steps)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Makes the example at a position, which is the same in every process.

    An image that cannot be decoded raises an error. With `skip_bad`, it is replaced:
    in training by the next good image of the order, in evaluation by a masked one. The
    example's `bad` holds the index of the bad image, or -1.

    Attributes:
      source: The split.
      augment: The augmentation of each image.
      channels: The number of channels of the result, 1 or 3.
      skip_bad: True to replace images that cannot be decoded.
      label_shape: () if each image has one label, otherwise (most_labels,).
      repeats: The number of times that each image comes in a row, with different
        augmentations (repeated augmentation; Hoffer et al. 2020, arXiv:1901.09335). An
        epoch then contains 1 / repeats of the images.
      max_pixels: The number of pixels beyond which a file cannot be decoded.
    """

    source: NamedSource
    augment: Augment
    channels: int
    skip_bad: bool
    label_shape: tuple[int, ...] = ()
    repeats: int = 1
    max_pixels: int = MAX_PIXELS

    def train(self, positions: Sequence[int], seed: int) -> Batch:
        """Returns the examples at positions of the endless training order.

        Args:
          positions: The positions, counted from the first image of the first epoch.
          seed: The seed of order and augmentation.

        Raises:
          BadImageError: An image cannot be decoded, and `skip_bad` is False.
          UserError: No image of the split can be decoded.
        """
        size = len(self.source)
        places = [divmod(position, size) for position in positions]
        views = self._views(seed, places)
        keys = views.keys(seed)
        memory = self.memory_to_crop
        if memory is None:
            rows = zip(places, views.indices.tolist(), keys.tolist(), strict=True)
            return _collect((self._train(*row, seed) for row in rows), len(places))
        return {
            "image": self.augment.pad_and_crop(
                np.asarray(memory.images)[views.indices], keys
            ),
            "label": np.asarray(memory.labels)[views.indices],
            "mask": np.ones(len(places), np.bool_),
            "index": views.indices,
            "bad": np.full(len(places), -1),
        }

    @property
    def memory_to_crop(self) -> MemorySource | None:
        """The source, if it is one array of images that are only cropped."""
        if not isinstance(self.source, MemorySource) or not self.augment.only_crops:
            return None
        images = self.source.images
        shape = (self.augment.size, self.augment.size, self.channels)
        is_array = isinstance(images, np.ndarray) and images.shape[1:] == shape
        return self.source if is_array else None

    def _views(self, seed: int, places: Sequence[tuple[int, int]]) -> Views:
        """Returns the images at places (epoch, offset) of the training order."""
        rows = []
        turns = turns_of(self.source)
        orders = {epoch: epoch_order(seed, epoch, *turns) for epoch in dict(places)}
        for epoch, offset in places:
            indices, epochs = orders[epoch]
            place, turn = divmod(offset, self.repeats)
            rows.append((indices[place], epochs[place], turn))
        return Views(*np.array(rows, np.int64).T)

    def _train(self, place: tuple[int, int], index: int, key: int, seed: int) -> Batch:
        try:
            return self._example(index, key, bad=-1)
        except BadImageError as error:
            self._stop_unless_skipped(error)
            reason = str(error)
        epoch, offset = place
        size = len(self.source)
        for next_offset in range(offset + 1, offset + size):
            view = self._views(seed, [(epoch, next_offset % size)])
            with contextlib.suppress(BadImageError):
                return self._example(
                    view.indices.item(), view.keys(seed).item(), bad=index
                )
        raise UserError(
            f"{self.source.title} holds no image that can be decoded; for example,"
            f" {reason}"
        )

    def with_size(self, size: int) -> "Examples":
        """Returns the same examples with images of another size, `augment.size`."""
        if size == self.augment.size:
            return self
        augment = dataclasses.replace(self.augment, size=size)
        return dataclasses.replace(self, augment=augment)

    def eval(self, positions: Sequence[int]) -> Batch:
        """Returns the examples at positions of the split, and padding after its end.

        Raises:
          BadImageError: An image cannot be decoded, and `skip_bad` is False.
        """
        return _collect(map(self._eval, positions), len(positions))

    def _eval(self, position: int) -> Batch:
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
                " --config.data.on_bad_image=skip (evaluate: --on_bad_image=skip)."
            ) from None

    def _example(self, index: int, key: int | None, bad: int) -> Batch:
        image, label = self.source[index]
        name = self.source.name(index)
        picture = Picture(image, self.channels, name, self.max_pixels)
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
    """Makes a batch, copying each example while its pixels are in the CPU's cache."""
    batch: Batch = {}
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
    """Returns the indices of the images of a batch that could not be decoded."""
    return {int(index) for index in batch["bad"] if index >= 0}


def _start_worker(parent: int, *_) -> None:
    """Keeps a worker off the accelerators, and ends it when its parent has ended."""
    # Grain imports jax, which must not claim the devices on which the parent computes.
    jax.config.update("jax_platforms", "cpu")
    start_worker(parent)


@functools.cache
def _end_workers_with_this_process() -> None:
    """Makes sure that workers end with this process, however that ends."""
    processes.at_end.append(_kill_children)
    # Runs before multiprocessing's own handler, which would wait for workers that
    # nobody closed, as these ignore its SIGTERM.
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.name.startswith("grain-"):
            child.kill()


def _kill_children() -> None:
    # The children include workers that have just been started, which multiprocessing
    # does not know yet and which would print errors. The resource tracker frees the
    # shared memory of the others, so it stays.
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "multiprocessing.resource_tracker" not in " ".join(child.cmdline()):
                child.kill()


class WorkerDiedError(UserError):
    """A process that decodes images was killed."""


class Batches:
    """An iterator over this process's rows of the batches, which has to be closed.

    Each batch holds uint8 `image` [rows, size, size, channels], int32 `label`, bool
    `mask` (False for padding), int64 `index` in the split, and int64 `bad` (the index
    of an image that could not be decoded, or -1), each [rows].

    Args:
      chunks: The chunks of all batches in order.
      chunks_a_batch: The number of chunks in each batch.
      num_workers: The number of worker processes, see `spread`.
      num_threads: The number of threads of each process, see `spread`.

    Raises:
      WorkerDiedError: While iterating: a worker process was killed.
    """

    def __init__(
        self,
        chunks: grain.MapDataset,
        chunks_a_batch: int,
        num_workers: int,
        num_threads: int,
    ):
        num_workers, threads = spread(num_workers, num_threads, os.cpu_count() or 1)
        # While a batch waits to be used, every thread makes a chunk of the next one.
        ahead = threads if num_workers else threads + chunks_a_batch
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        chunks = chunks.to_iter_dataset(options)
        if num_workers:
            # Grain reads absl flags when it starts workers; users of the library have
            # parsed none.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            _end_workers_with_this_process()
            # Started now, since starting it unblocks signals, which `__next__` blocks.
            with signals.blocked():
                resource_tracker.ensure_running()
            ahead = 1 + -(-chunks_a_batch // num_workers)
            chunks = chunks.mp_prefetch(
                grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=ahead),
                worker_init_fn=functools.partial(_start_worker, os.getpid()),
            )
        self._chunks_a_batch = chunks_a_batch
        self._iterator = iter(chunks)
        # Grain starts its workers with the first batch, with signals blocked, so that a
        # signal to the whole process group is handled by the parent alone.
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
            # If this process was sent a signal, too, its handler reports the reason.
            time.sleep(1)
            raise WorkerDiedError(
                "A process that decodes images was killed, perhaps for lack of memory;"
                " the same command resumes from the last checkpoint. If it happens"
                " again, lower --config.data.num_workers (0 uses threads alone)."
            ) from None
        if not chunks:
            raise StopIteration
        return {
            key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]
        }

    def close(self) -> None:
        """Stops the workers and frees their shared memory."""
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def spread(num_workers: int, num_threads: int, cores: int) -> tuple[int, int]:
    """Returns the number of worker processes, and of threads in each.

    With 0 workers, the threads of this process decode. Decoding and resizing release
    Python's lock, and the rest of the work on an image holds it for about a tenth of
    the time, so threads suffice on up to 16 cores.

    Args:
      num_workers: The number of worker processes; -1 for 0 on up to 16 cores, and for
        one per 8 cores on more.
      num_threads: The number of threads in each process; 0 for its share of the cores,
        at most 16.
      cores: The number of cores of the machine.
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
    """Returns the training batches of the given steps, in order.

    Args:
      examples: The examples of the training split.
      seed: The seed of order and augmentation.
      batch_size: The number of images per step, over all processes.
      steps: The steps, counted from 0; `range(k, n)` resumes after k steps.
      rows: The rows of each batch that this process makes; None for all.
      num_workers: The number of worker processes, see `spread`.
      num_threads: The number of threads of each process, see `spread`.
      resize: The size of the images of each step; None for the size of the examples.

    Raises:
      UserError: This host cannot hold its rows of a batch in memory.
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
    """Returns batches that hold every example once; the last one is padded and masked.

    Args:
      examples: The examples of the split.
      batch_size: The number of images per step, over all processes.
      rows: The rows of each batch that this process makes; None for all.
      num_workers: The number of worker processes, see `spread`.
      num_threads: The number of threads of each process, see `spread`.

    Raises:
      UserError: This host cannot hold its rows of a batch in memory.
    """
    rows = range(batch_size) if rows is None else rows
    _check_memory(examples, len(rows))
    steps = range(-(-len(examples.source) // batch_size))
    chunks = _chunks(examples.eval, steps, batch_size, rows)
    return Batches(*chunks, _workers_of(examples, num_workers), num_threads)


def _check_memory(examples: Examples, images: int) -> None:
    # The system would grant the memory, and kill the process when none is left.
    *views, height, width = examples.augment.shape
    images *= math.prod(views)
    needed = images * height * width * examples.channels
    total = psutil.virtual_memory().total
    if needed > total:
        raise UserError(
            f"This host has too little memory for this run: {images:,} images of"
            f" {height}x{width} pixels take {needed / 2**30:,.1f} GiB, and it has"
            f" {total / 2**30:,.1f}. Start one with a smaller batch_size or"
            " data.image_size; a run that has a checkpoint needs more or larger hosts."
        )


def _workers_of(examples: Examples, num_workers: int) -> int:
    # Each worker would copy the images that are in memory.
    return 0 if isinstance(examples.source, MemorySource) else num_workers


def _chunks(
    make: Callable[[Sequence[int]], Batch],
    steps: range,
    batch_size: int,
    rows: Sequence[int],
) -> tuple[grain.MapDataset, int]:
    """Returns the chunks of all batches in order, and their number per batch."""
    # Grain's elements are chunks. Its work on an element takes longer than decoding a
    # small image, and whole batches would be too large, as each thread holds some.
    size = max(n for n in range(1, CHUNK + 1) if len(rows) % n == 0)
    chunks_a_batch = len(rows) // size
    make_chunk = _MakeChunk(make, steps.start, batch_size, rows, size)
    chunks = grain.MapDataset.range(len(steps) * chunks_a_batch).map(make_chunk)
    return chunks, chunks_a_batch


# The functions below are not closures, since workers unpickle them by name.
def _train_at_size(
    positions: Sequence[int],
    examples: Examples,
    seed: int,
    batch_size: int,
    resize: ResizeSchedule,
) -> Batch:
    step = positions[0] // batch_size
    return examples.with_size(resize(step)).train(positions, seed)


@dataclasses.dataclass(frozen=True, repr=False)
class _MakeChunk:
    """Makes a chunk by its number: `size` of this process's rows of a batch."""

    make: Callable[[Sequence[int]], Batch]
    first_step: int
    batch_size: int
    rows: Sequence[int]
    size: int

    def __call__(self, number: int) -> Batch:
        step, chunk = divmod(number, len(self.rows) // self.size)
        first = (self.first_step + step) * self.batch_size
        rows = self.rows[chunk * self.size : (chunk + 1) * self.size]
        return self.make([first + row for row in rows])
