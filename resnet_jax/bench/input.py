"""Speed of the input pipeline, against tf.data and torch on the same JPEGs.

Every contender runs in a process of its own, on the same cores, in turn, and makes
uint8 batches of 128 in memory from JPEGs in memory; what it costs to start is not
counted.
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
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
from PIL import Image

from resnet_jax.bench.table import TORCH, Benchmark, row
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count
from resnet_jax.data.augment import Augment
from resnet_jax.data.cache import MemorySource
from resnet_jax.data.decode import Picture
from resnet_jax.data.loader import Examples, eval_batches, train_batches
from resnet_jax.data.source_protocol import checksum
from resnet_jax.errors import BadImageError, UserError

BATCH = 128
# What comes with scikit-learn, which need not be imported for it.
SAMPLE = pathlib.Path(find_spec("sklearn").origin).parent / "datasets" / "images"
CROP = Augment(size=224, crop="random_resized", flip=True, decode="fast")
CENTER = Augment(size=224)
UNITS = {
    "memory": "MiB",
    "memory growth": "MiB",
    "fast pixels": "levels of 255",
    "eval pixels": "levels of 255",
}
# One measurement a row: name, contender, what it is held against, on what.
MEASUREMENTS = (
    ("random resized crop", "ours", "tf.data", "originals"),
    ("random resized crop", "ours", "torch", "originals"),
    ("random resized crop, at most 400 px", "ours", "tf.data", "smaller"),
    ("cost of the loader", "ours", "bare", "originals"),
    ("evaluation", "ours eval", "torch eval", "originals"),
    ("32x32 crop and flip from memory", "small", "", "originals"),
    ("resident memory", "memory", "", "originals"),
    ("growth of memory from batch 10 to 50", "memory growth", "", "originals"),
    ("mean difference of fast crops from exact ones", "fast pixels", "", "originals"),
    ("mean difference from torchvision, eval", "eval pixels", "", "originals"),
)
PEER_CONTENDERS = {peer for _, _, peer, _ in MEASUREMENTS} - {"bare"}


def add_images(parser: Parser) -> None:
    """Adds the images on which the pipeline is measured."""
    parser.add_argument(
        "--images",
        type=pathlib.Path,
        default=SAMPLE,
        help="A folder or .zip of JPEGs. The default is two photographs of"
        " scikit-learn's.",
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


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """One row a measurement; raises UserError if there are no JPEGs, or broken ones.

    Every contender makes `--batches` of 128 images on `--cores` cores in each repeat.
    """
    for name, jpeg in read_jpegs(args.images).items():
        try:
            Picture(jpeg, 3, name).pixels()
        except BadImageError as error:
            raise UserError(f"{error} Mend or remove it.") from None
    contenders = list(
        dict.fromkeys(
            (who, "originals" if who == peer else what)
            for _, ours, peer, what in MEASUREMENTS
            for who in (ours, peer)
            if who
        )
    )
    found: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    left_out: dict[str, str] = {}
    for _ in range(args.repeats):
        for who, what in contenders:
            value = _run(who, what, args.images, args.cores, args.batches)
            if isinstance(value, str):
                left_out[who] = value
            else:
                found[who, what].append(value)
    for name, who, peer, what in MEASUREMENTS:
        ours, theirs = found[who, what], found.get((peer, "originals"), [])
        if not ours:
            continue
        unit = UNITS.get(who, "images/s/core")
        out = left_out.get(peer, "")
        yield row(name, unit, ours, peer, theirs, out)


def read_jpegs(images: pathlib.Path) -> dict[str, bytes]:
    """The JPEGs of a folder or a .zip by name; raises UserError if there are none."""
    suffixes = (".jpg", ".jpeg")
    if images.suffix == ".zip" and images.is_file():
        try:
            with zipfile.ZipFile(images) as archive:
                names = sorted(archive.namelist())
                found = {
                    f"{images}/{name}": archive.read(name)
                    for name in names
                    if name.lower().endswith(suffixes)
                }
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{images} cannot be read: {error}.") from None
    else:
        paths = sorted(images.rglob("*"))
        found = {
            str(path): path.read_bytes()
            for path in paths
            if path.name.lower().endswith(suffixes)
        }
    if not found:
        raise UserError(f"{images} holds no JPEGs (.jpg, .jpeg).")
    return found


def _run(who: str, what: str, images, cores: int, batches: int) -> float | str:
    """The figure of a contender, or why it has none.

    Raises UserError if one of ours fails.
    """
    command = [sys.executable, "-m", "resnet_jax.bench.input"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [*command, who, what, str(images), str(cores), str(batches)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        value = f"it ended with exit code {done.returncode}"
        if who not in PEER_CONTENDERS:
            raise UserError(f"{who} on {what}: {value}; the reason stands above.")
    else:
        value = json.loads(done.stdout.splitlines()[-1])
    told = f"left out: {value}" if isinstance(value, str) else f"{value:.1f}"
    output.note(f"{who} on {what}: {told}")
    return value


def smaller(jpeg: bytes) -> bytes:
    """Re-encodes as `prepare --max_side=400 --quality=90` does."""
    from resnet_jax.data.prepare.pack import Reencode

    return Reencode(max_side=400, quality=90).image(jpeg, 3, "a JPEG")


def _rate(batches: Iterator, number: int, cores: int) -> float:
    """Images per second and core, from the third batch on."""
    for _ in range(2):
        next(batches)
    started = time.perf_counter()
    for _ in range(number):
        next(batches)
    return number * BATCH / (time.perf_counter() - started) / cores


def _ours(jpegs: list[bytes], cores: int, number: int, augment: Augment) -> float:
    # As many images as batches are made of, so that an epoch ends as in real runs.
    source = MemorySource(jpegs * (1 + number * BATCH // len(jpegs)))
    examples = Examples(source=source, augment=augment, channels=3, skip_bad=False)
    if augment is CENTER:
        # Batches behind the end are made in advance and not counted.
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
    """The same decoding without a loader: one core, alone; nothing is shared."""
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


def _memory(jpegs: list[bytes]) -> list[float]:
    """MiB of this process and its two workers after each of 50 batches."""
    examples = Examples(source=_Served(jpegs), augment=CROP, channels=3, skip_bad=False)
    with train_batches(
        examples, seed=0, batch_size=BATCH, steps=range(60), num_workers=2
    ) as batches:
        return [resident_mib() for _, _batch in zip(range(50), batches, strict=False)]


@dataclasses.dataclass(frozen=True)
class _Served:
    """A `source_protocol.NamedSource` that is handed to worker processes."""

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


def _difference(jpegs: list[bytes], ours: Callable, theirs: Callable) -> float:
    """Mean absolute difference of two pipelines' pixels, in levels of 255."""
    pictures = [Picture(jpeg, 3) for jpeg in jpegs]
    return statistics.mean(
        np.abs(np.subtract(ours(p, key), theirs(p, key), dtype=np.float32))
        .mean()
        .item()
        for key, p in enumerate(pictures)
    )


def resident_mib() -> float:
    """Memory of this process and its descendants that is theirs, in MiB."""
    import psutil

    process = psutil.Process()
    family = [process, *process.children(recursive=True)]
    return sum(p.memory_full_info().pss for p in family) / 2**20


def _tf_data(jpegs: list[bytes], cores: int, number: int) -> float:
    """The map of Flax's ImageNet example: crop while decoding, bicubic, flip."""
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
    """torchvision's transforms on Pillow's images."""
    from torchvision import transforms

    if augment is CENTER:
        steps = [transforms.Resize(256), transforms.CenterCrop(224)]
    else:
        steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*steps, transforms.PILToTensor()])


def _torch(jpegs: list[bytes], cores: int, number: int, augment: Augment) -> float:
    """A DataLoader with torchvision's transforms on Pillow's images."""
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
PEERS = ("pillow", "tensorflow-cpu", "tensorflow", *TORCH)
BENCHMARK = Benchmark(add_arguments, rows, PACKAGES, PEERS)


def main(argv: list[str]) -> None:
    """Runs one contender and prints its figure; see `_run`."""
    who, what, images, cores, number = argv[1:]
    cores, number = int(cores), int(number)
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    jpegs = list(read_jpegs(pathlib.Path(images)).values())
    if what == "smaller":
        jpegs = [smaller(jpeg) for jpeg in jpegs]
    contenders = {
        "ours": lambda: _ours(jpegs, cores, number, CROP),
        "ours eval": lambda: _ours(jpegs, cores, number, CENTER),
        "bare": lambda: _bare(jpegs, cores, number),
        "small": lambda: _small(jpegs, cores, number),
        "memory": lambda: max(_memory(jpegs)),
        "memory growth": lambda: float(np.subtract(*np.array(_memory(jpegs))[[-1, 9]])),
        "fast pixels": lambda: _fast_difference(jpegs),
        "eval pixels": lambda: _eval_difference(jpegs),
        "tf.data": lambda: _tf_data(jpegs, cores, number),
        "torch": lambda: _torch(jpegs, cores, number, CROP),
        "torch eval": lambda: _torch(jpegs, cores, number, CENTER),
    }
    try:
        print(json.dumps(contenders[who]()))
    except ModuleNotFoundError as error:
        print(json.dumps(f"{error.name} is not installed"))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv)
