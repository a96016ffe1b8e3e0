"""Prepares small tfds data sets with the names and features of real ones."""

import io
from collections.abc import Mapping, Sequence

from tests.helpers.pictures import encode, noise


def prepare(data_dir, name: str, splits: Mapping[str, Sequence], size: int = 8) -> None:
    """Prepares a data set with tfds's own builder, but with images of noise.

    Args:
      data_dir: The directory that will hold the data set.
      name: The name of a tfds data set, NAME or NAME/CONFIG.
      splits: The labels of the images of each split: numbers, or lists of numbers.
      size: The height and width of the images in pixels.
    """
    # Importing tfds takes a second, so tests that skip it do not wait for it.
    import tensorflow_datasets as tfds

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

    # The original function would download the data set.
    builder._split_generators = lambda dl_manager: {
        split: examples(labels) for split, labels in splits.items()
    }
    builder.info.as_proto.disable_shuffling = True
    builder.download_and_prepare()
