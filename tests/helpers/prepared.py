"""Small data sets under the names and with the features of tfds's own."""

import io
from collections.abc import Mapping, Sequence

import tensorflow_datasets as tfds

from tests.helpers.pictures import encode, noise


def prepare(data_dir, name: str, splits: Mapping[str, Sequence], size: int = 8) -> None:
    """Prepares NAME[/CONFIG] by tfds's builder, but with images of noise.

    Args:
      data_dir: where to.
      name: of a data set of tfds.
      splits: the labels of each split's images: numbers, or lists of them.
      size: side of the images in pixels.
    """
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    features = builder.info.features

    def examples(labels):
        for index, label in enumerate(labels):
            seed = sum(map(ord, name)) + index
            example = {"image": io.BytesIO(encode(noise(seed, size, size), "PNG"))}
            if "real_label" in features:
                example |= {"real_label": label, "original_label": 0}
            else:
                example["label"] = label
            for key in features.keys() - example.keys():
                example[key] = str(index)
            yield index, example

    # What would fetch the originals.
    builder._split_generators = lambda dl_manager: {
        split: examples(labels) for split, labels in splits.items()
    }
    builder.info.as_proto.disable_shuffling = True
    builder.download_and_prepare()
