"""Prepares a data set as ArrayRecord: `python -m resnet_jax.prepare tfds:NAME`.

This is the one place that may need TensorFlow (`requirements-prepare.txt`): many tfds
builders extract their archives with it. Training reads the result without it.
"""

import argparse
import logging
import pathlib
import sys

from resnet_jax.data.sources import tfds_builder
from resnet_jax.errors import UserError


def prepare(dataset: str, data_dir: str = "", manual_dir: str = "") -> pathlib.Path:
    """Prepares a data set of tfds with the builder of tfds; returns where it is.

    Args:
      dataset: NAME[/CONFIG].
      data_dir: where tfds keeps its data sets; empty: tfds's default.
      manual_dir: where files lie that are not to be downloaded.

    Raises:
      UserError: an unknown data set, a missing package, or no way to get the files.
    """
    import tensorflow_datasets as tfds

    builder = tfds_builder(dataset, data_dir, file_format="array_record")
    options = tfds.download.DownloadConfig(
        manual_dir=manual_dir or None, try_download_gcs=False
    )
    try:
        builder.download_and_prepare(download_config=options)
    except Exception as error:
        raise UserError(f"tfds:{dataset} is not prepared. {way_out(error)}") from error
    return builder.data_path


def way_out(error: Exception) -> str:
    """What to do about an error of a tfds builder, from what caused it."""
    chain = [error]
    while (after := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(after)
    text = " ".join(str(chain[-1]).split())
    if any("No module named 'tensorflow'" in str(link) for link in chain):
        return (
            "Its builder needs TensorFlow: pip install -r requirements-prepare.txt, and"
            " run this command again."
        )
    names = {type(link).__name__ for link in chain}
    if names & {"ConnectionError", "gaierror", "NewConnectionError", "DownloadError"}:
        url = getattr(getattr(error, "request", None), "url", None)
        what = url or "what its page on tensorflow.org/datasets names"
        return (
            f"There is no way to the network: fetch {what}, put it into a directory,"
            " and run this command again with --manual_dir=DIRECTORY."
        )
    if isinstance(chain[-1], AssertionError | FileNotFoundError):
        return f"{text} (--manual_dir=DIRECTORY says where files lie.)"
    return f"{type(chain[-1]).__name__}: {text[:300]}"


def main(argv: list[str]) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m resnet_jax.prepare",
        description="Prepares a data set of tfds as ArrayRecord.",
    )
    parser.add_argument("source", help="tfds:NAME or tfds:NAME/CONFIG")
    parser.add_argument("--data_dir", default="", help="where tfds keeps its data")
    parser.add_argument("--manual_dir", default="", help="where files lie already")
    args = parser.parse_args(argv[1:])
    # It warns of each of many retries where there is no network.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    kind, _, dataset = args.source.partition(":")
    if kind != "tfds" or not dataset:
        raise UserError(f"What is {args.source!r}? Write tfds:NAME.")
    path = prepare(dataset, args.data_dir, args.manual_dir)
    print(f"{args.source} is prepared in {path}")


if __name__ == "__main__":
    try:
        main(sys.argv)
    except UserError as error:
        sys.exit(f"error: {error}")
