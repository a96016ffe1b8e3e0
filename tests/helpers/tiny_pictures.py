"""A small data set of tfds's, of grey images, prepared without TensorFlow."""

import io
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from resnet_jax.data.decode import Picture
from tests.helpers.pictures import encode

COUNTS = {"train": 10, "test": 4}
CLASSES = ("ant", "bee", "cat")


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """A builder of tfds that needs no TensorFlow, with labelled and other configs."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(
        tfds.core.BuilderConfig(name=name)
        for name in ("jpeg", "png", "unlabelled", "numbers")
    )

    def _info(self):
        config = self.builder_config.name
        encoding = "png" if config == "png" else "jpeg"
        label = tfds.features.ClassLabel(names=CLASSES)
        if config == "numbers":
            label = tfds.features.Scalar(np.int64)
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(None, None, 3), encoding_format=encoding
                    ),
                    "label": label,
                }
            ),
            supervised_keys=None if config == "unlabelled" else ("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split):
        for index in range(COUNTS[split]):
            kind = "PNG" if self.builder_config.name == "png" else "JPEG"
            file = io.BytesIO(tfds_image(split, index, kind))
            yield index, {"image": file, "label": index % 3}


def tfds_image(split: str, index: int, kind: str = "JPEG") -> bytes:
    """Returns an image file whose grey level identifies the image."""
    level = 10 * index + (5 if split == "test" else 0)
    return encode(Image.new("RGB", (20, 10 + index), (level, level, level)), kind)


def prepare(data_dir: pathlib.Path, config: str) -> pathlib.Path:
    """Prepares a config as ArrayRecord and returns its directory."""
    builder = TinyPictures(config=config, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def levels(source) -> dict[int, int]:
    """Returns the label of every image by its grey level."""
    labels = {}
    for index in range(len(source)):
        image, label = source[index]
        level = Picture(image, 3).pixels()[0, 0, 0].item()
        labels[level] = label
    return labels
