"""A data set of ImageNet's size is open at once, and in little memory."""

import dataclasses
import json
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from resnet_jax.data.prepare import pack
from tests.helpers.pictures import encode, noise

pytestmark = pytest.mark.slow

IMAGES, SHARDS = 1_281_167, 1024
OPEN = """
import json, sys, time
import psutil
from resnet_jax.data.sources import open_source
open_source("digits", "train")  # What is imported for any source is not counted.
memory = psutil.Process().memory_info().rss
started = time.perf_counter()
source = open_source(sys.argv[1], "train")
_, label = source[len(source) - 1]
seconds = time.perf_counter() - started
more = psutil.Process().memory_info().rss - memory
print(json.dumps([len(source), label, seconds, more / 1e6]))
"""


@dataclasses.dataclass(frozen=True)
class SamePicture:
    """A shard that holds one picture many times."""

    length: int
    num_bytes: int = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        example = tf_example_pb2.Example()
        features = example.features.feature
        features["image"].bytes_list.value.append(encode(noise(0, 8, 8), "PNG"))
        features["label"].int64_list.value.append(3)
        features["file_name"].bytes_list.value.append(b"picture.png")
        record = example.SerializeToString()
        return iter([record] * self.length)


def test_opening_a_million_images_takes_two_seconds_and_300_megabytes(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
    )
    lengths = [len(range(first, IMAGES, SHARDS)) for first in range(SHARDS)]
    data = pack.DataSet(
        name="many",
        version="1.0.0",
        features=features,
        splits={"train": [SamePicture(length) for length in lengths]},
        about={"supervised_keys": ("image", "label")},
    )
    pack.pack(data, tmp_path / "many", command="this test", workers=1)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, f"tfds:{tmp_path / 'many'}"],
        capture_output=True,
        text=True,
        check=True,
    )
    images, label, seconds, megabytes = json.loads(done.stdout)
    assert (images, label) == (IMAGES, 3)
    # 0.9 s, half of it imports, and 52 MB were seen, 2.4 s beside four busy processes.
    assert seconds < 2
    assert megabytes < 300
