"""Measures images/s/core of the input pipeline, beside tf.data and torch.

All implementations read the same JPEGs from memory and make uint8 batches of 128 images
in memory. Each runs in a process of its own, and they take turns on the same cores.
Their start-up is not counted.
"""

import argparse
import dataclasses
import io
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import distribution
from typing import NamedTuple

import numpy as np
from PIL import Image

from resnet_jax import paths
from resnet_jax.bench.table import TORCH, Benchmark, row
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count
from resnet_jax.data.augment import Augment
from resnet_jax.data.decode import Picture
from resnet_jax.data.loader import Examples, eval_batches, train_batches
from resnet_jax.data.memory_source import MemorySource
from resnet_jax.data.source_protocol import checksum
from resnet_jax.errors import BadImageError, UserError

BATCH = 128
# The folder of scikit-learn's two photographs, found without importing scikit-learn.
SAMPLE = pathlib.Path(
    str(distribution("scikit-learn").locate_file("sklearn/datasets/images"))
)
CROP = Augment(size=224, crop="random_resized", flip=True, decode="fast")
CENTER = Augment(size=224)
UNITS = {
    "memory": "MiB",
    "memory growth": "MiB",
    "fast pixels": "levels of 255",
    "eval pixels": "levels of 255",
}


class Measurement(NamedTuple):
    """A row of the table.

    Attributes:
      name: The name of the row.
      ours: The implementation that is measured; a key of `implementations` in `main`.
      baseline: The implementation that it is compared with, on the original JPEGs; ''
        for none.
      jpegs: The JPEGs that `ours` reads: "originals", or the "smaller" ones that
        `prepare --max_side=400` makes.
    """

    name: str
    ours: str
    baseline: str = ""
    jpegs: str = "originals"


MEASUREMENTS = (
    Measurement("random resized crop", "ours", "tf.data"),
    Measurement("random resized crop", "ours", "torch"),
    Measurement("random resized crop, at most 400 px", "ours", "tf.data", "smaller"),
    Measurement("cost of the loader", "ours", "bare"),
    Measurement("evaluation", "ours eval", "torch eval"),
    Measurement("32x32 crop and flip from memory", "small"),
    Measurement("resident memory", "memory"),
    Measurement("growth of memory from batch 10 to 50", "memory growth"),
    Measurement("mean difference of fast crops from exact ones", "fast pixels"),
    Measurement("mean difference from torchvision, eval", "eval pixels"),
)
# The implementations that need another framework, which may not be installed.
FOREIGN = ("tf.data", "torch", "torch eval")


def add_images(parser: Parser) -> None:
    """Adds `--images`."""
    parser.add_argument(
        "--images",
        type=paths.local,
        default=SAMPLE,
        help="A folder or .zip of JPEGs that the input pipeline reads. The default is"
        " two photographs that come with scikit-learn.",
    )


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench input`."""
    add_images(parser)
    parser.add_argument(
        "--cores",
        type=count,
        default=2,
        help="The number of cores that each pipeline uses. The default is %(default)s.",
    )
    parser.add_argument(
        "--batches",
        type=count,
        default=16,
        help="The number of batches of 128 images in each repeat. The default is"
        " %(default)s.",
    )


def rows(
    args: argparse.Namespace, measurements: Iterable[Measurement] = MEASUREMENTS
) -> Iterator[dict]:
    """Yields a row for each measurement.

    Args:
      args: The arguments. In each repeat, every implementation makes `--batches` of 128
        images on `--cores` cores.
      measurements: The measurements.

    Raises:
      UserError: There are no JPEGs, one is broken, or this library fails.
    """
    for name, jpeg in read_jpegs(args.images).items():
        try:
            Picture(jpeg, 3, name).pixels()
        except BadImageError as error:
            raise UserError(f"{error} Repair or remove it.") from None
    # Each pair is measured once in each repeat, even if several rows show it.
    pairs: dict[tuple[str, str], list[float]] = {}
    for measurement in measurements:
        pairs[measurement.ours, measurement.jpegs] = []
        if measurement.baseline:
            pairs[measurement.baseline, "originals"] = []
    left_out: dict[str, str] = {}
    for _ in range(args.repeats):
        for (name, jpegs), values in pairs.items():
            value = run_implementation(name, jpegs, args)
            if isinstance(value, str):
                left_out[name] = value
            else:
                values.append(value)
    for name, ours, baseline, jpegs in measurements:
        if values := pairs[ours, jpegs]:
            yield row(
                name,
                UNITS.get(ours, "images/s/core"),
                values,
                baseline,
                pairs.get((baseline, "originals"), []),
                left_out.get(baseline, ""),
            )


def read_jpegs(images: pathlib.Path) -> dict[str, bytes]:
    """Returns the contents of the JPEGs in a folder or .zip, by path.

    Raises:
      UserError: There are none, or the .zip cannot be read.
    """
    suffixes = (".jpg", ".jpeg")
    if images.suffix == ".zip" and images.is_file():
        try:
            with zipfile.ZipFile(images) as archive:
                names = sorted(archive.namelist())
                contents = {
                    f"{images}/{name}": archive.read(name)
                    for name in names
                    if name.lower().endswith(suffixes)
                }
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{images} cannot be read: {error}.") from None
    else:
        contents = {
            str(path): path.read_bytes()
            for path in sorted(images.rglob("*"))
            if path.name.lower().endswith(suffixes)
        }
    if not contents:
        raise UserError(f"{images} holds no JPEGs (.jpg, .jpeg).")
    return contents


def run_implementation(name: str, jpegs: str, args: argparse.Namespace) -> float | str:
    """Measures an implementation in a process of its own.

    Args:
      name: The implementation; a key of `implementations` in `main`.
      jpegs: The JPEGs that it reads; see `Measurement`.
      args: The arguments, with `images`, `cores` and `batches`.

    Returns:
      The measured value, or the reason why there is none.

    Raises:
      UserError: An implementation failed that needs no other framework.
    """
    command = [sys.executable, "-m", "resnet_jax.bench.input", name, jpegs]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [*command, str(args.images), str(args.cores), str(args.batches)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        value = f"it ended with exit code {done.returncode}"
        if name not in FOREIGN:
            raise UserError(f"{name} on {jpegs}: {value}; see its error above.")
    else:
        value = json.loads(done.stdout.splitlines()[-1])
    text = f"left out: {value}" if isinstance(value, str) else f"{value:.1f}"
    output.note(f"{name} on {jpegs}: {text}")
    return value


def smaller(jpeg: bytes) -> bytes:
    """Re-encodes a JPEG as `prepare --max_side=400 --quality=90` does."""
    from resnet_jax.data.prepare.pack import Reencode

    return Reencode(max_side=400, quality=90).image(jpeg, 3, "a JPEG")


def _rate(batches: Iterator, number: int, cores: int) -> float:
    """Returns images/s/core, from the third batch on."""
    for _ in range(2):
        next(batches)
    started = time.perf_counter()
    for _ in range(number):
        next(batches)
    return number * BATCH / (time.perf_counter() - started) / cores


def _own_loader(jpegs: list[bytes], cores: int, number: int, augment: Augment) -> float:
    # The source has as many images as all batches together, so that an epoch ends as
    # it does in real runs.
    source = MemorySource(jpegs * (1 + number * BATCH // len(jpegs)))
    examples = Examples(source=source, augment=augment, channels=3, skip_bad=False)
    if augment is CENTER:
        # The loader works ahead, so the last batches are ready before they are timed.
        loader = eval_batches(examples, batch_size=BATCH, num_threads=cores)
        number = min(number, len(source) // BATCH - 3)
    else:
        steps = range(number + 16)
        loader = train_batches(
            examples, seed=0, batch_size=BATCH, steps=steps, num_threads=cores
        )
    with loader as batches:
        return _rate(batches, number, cores)


def _bare(jpegs: list[bytes], cores: int, number: int) -> float:
    """Measures the same decoding on one core, without a loader."""
    os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[:1]))

    def batches():
        order = enumerate(itertools.cycle(jpegs))
        while True:
            batch = itertools.islice(order, BATCH)
            yield [CROP(Picture(jpeg, 3), key) for key, jpeg in batch]

    return _rate(batches(), max(number // cores, 4), 1)


def _small(_: list[bytes], cores: int, number: int) -> float:
    images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    labels = np.zeros(len(images), np.int32)
    crop = Augment(size=32, crop="pad", flip=True)
    examples = Examples(
        source=MemorySource(images, labels), augment=crop, channels=3, skip_bad=False
    )
    number *= 20
    with train_batches(
        examples, seed=0, batch_size=BATCH, steps=range(number + 50), num_threads=cores
    ) as batches:
        return _rate(batches, number, cores)


def memory_of_loader(jpegs: list[bytes], batch_size: int = BATCH) -> list[float]:
    """Returns the MiB of this process and its two workers after each of 50 batches."""
    examples = Examples(
        source=_JPEGSource(jpegs), augment=CROP, channels=3, skip_bad=False
    )
    with train_batches(
        examples, seed=0, batch_size=batch_size, steps=range(60), num_workers=2
    ) as batches:
        return [resident_mib() for _, _batch in zip(range(50), batches, strict=False)]


@dataclasses.dataclass(frozen=True)
class _JPEGSource:
    """JPEGs as a `source_protocol.NamedSource` that worker processes can receive."""

    jpegs: list[bytes] = dataclasses.field(repr=False)
    classes: tuple[str, ...] = ("0",)
    title: str = "JPEGs"

    def __len__(self) -> int:
        return len(self.jpegs)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self.jpegs[index], 0

    def name(self, index: int) -> str:
        return f"{self.title}/{index}"

    def digest(self) -> str:
        return checksum(self.title, len(self))


def _fast_difference(jpegs: list[bytes]) -> float:
    exact = dataclasses.replace(CROP, decode="exact")
    return _difference(jpegs, CROP, exact)


def _eval_difference(jpegs: list[bytes]) -> float:
    steps = _torch_steps(CENTER)
    return _difference(
        jpegs, CENTER, lambda picture, _: steps(_opened(picture.image)).permute(1, 2, 0)
    )


def _difference(jpegs: list[bytes], ours: Callable, reference: Callable) -> float:
    """Returns the mean absolute difference of two pipelines' pixels, of 0 to 255."""
    pictures = [Picture(jpeg, 3) for jpeg in jpegs]
    return statistics.mean(
        np.abs(np.subtract(ours(p, key), reference(p, key), dtype=np.float32))
        .mean()
        .item()
        for key, p in enumerate(pictures)
    )


def _growth(mib: list[float]) -> float:
    return mib[-1] - mib[9]


def resident_mib() -> float:
    """Returns the MiB of memory of this process and its descendants.

    Memory that processes share is counted once (proportional set size).
    """
    import psutil

    process = psutil.Process()
    family = [process, *process.children(recursive=True)]
    return sum(p.memory_full_info().pss for p in family) / 2**20


def _tf_data(jpegs: list[bytes], cores: int, number: int) -> float:
    """Measures tf.data as in Flax's ImageNet example.

    It crops while it decodes, resizes by bicubic interpolation, and flips.
    """
    import tensorflow as tf

    def augment(jpeg):
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(jpeg),
            tf.zeros((1, 0, 4)),
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        box = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.io.decode_and_crop_jpeg(jpeg, box, channels=3)
        image = tf.image.resize([image], [224, 224], tf.image.ResizeMethod.BICUBIC)[0]
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(jpegs).repeat()
    dataset = dataset.map(augment, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    batches = iter(dataset.with_options(options).as_numpy_iterator())
    return _rate(batches, number, cores)


def _opened(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def _torch_steps(augment: Augment) -> Callable:
    """Returns torchvision's transforms for Pillow's images."""
    from torchvision import transforms

    if augment is CENTER:
        steps = [transforms.Resize(256), transforms.CenterCrop(224)]
    else:
        steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*steps, transforms.PILToTensor()])


def _torch(jpegs: list[bytes], cores: int, number: int, augment: Augment) -> float:
    """Measures a DataLoader with torchvision's transforms on Pillow's images."""
    import torch

    steps = _torch_steps(augment)

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return (number + 16) * BATCH

        def __getitem__(self, index):
            return steps(_opened(jpegs[index % len(jpegs)]))

    loader = torch.utils.data.DataLoader(
        Images(), BATCH, shuffle=augment is CROP, num_workers=cores, drop_last=True
    )
    return _rate(iter(loader), number, cores)


PACKAGES = ("numpy", "simplejpeg", "nvidia-nvimgcodec-cu12", "opencv-python-headless")
BASELINES = ("pillow", "tensorflow-cpu", "tensorflow", *TORCH)
BENCHMARK = Benchmark(add_arguments, rows, PACKAGES, BASELINES)


def main(argv: list[str]) -> None:
    """Runs one implementation and prints its value; see `run_implementation`."""
    name, kind, images, *numbers = argv[1:]
    cores, number = map(int, numbers)
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    jpegs = list(read_jpegs(pathlib.Path(images)).values())
    if kind == "smaller":
        jpegs = [smaller(jpeg) for jpeg in jpegs]
    implementations = {
        "ours": lambda: _own_loader(jpegs, cores, number, CROP),
        "ours eval": lambda: _own_loader(jpegs, cores, number, CENTER),
        "bare": lambda: _bare(jpegs, cores, number),
        "small": lambda: _small(jpegs, cores, number),
        "memory": lambda: max(memory_of_loader(jpegs)),
        "memory growth": lambda: _growth(memory_of_loader(jpegs)),
        "fast pixels": lambda: _fast_difference(jpegs),
        "eval pixels": lambda: _eval_difference(jpegs),
        "tf.data": lambda: _tf_data(jpegs, cores, number),
        "torch": lambda: _torch(jpegs, cores, number, CROP),
        "torch eval": lambda: _torch(jpegs, cores, number, CENTER),
    }
    try:
        print(json.dumps(implementations[name]()))
    except ModuleNotFoundError as error:
        print(json.dumps(f"{error.name} is not installed"))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv)
