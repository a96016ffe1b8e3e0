"""Evaluates weights: `python -m resnet_jax.evaluate WEIGHTS... DATA`.

WEIGHTS is anything that `resnet_jax.load` takes: a file of any framework, a workdir, a
weights directory or `timm:NAME.TAG`. Several are evaluated one after the other. Those
that cannot be evaluated are named on standard error, and the exit code is then 1. The
card of the weights says how images are prepared. DATA is a source, written as in
`data.source`, such as folder:PHOTOS, tfds:NAME or csv:FILE; a source with its split,
SOURCE@SPLIT; or an evaluation set, such as imagenet_v2.

Every image counts exactly once. Classes are matched by their names. The figures are
top-1 with its 95 % interval (Wilson's score interval), top-5 where there are more than
five classes, the mean negative log-likelihood in nats (NLL), and precision, recall and
F1 of each class and as macro averages.
"""

import argparse
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from resnet_jax.config.defaults import MAX_PIXELS
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, positive_number
from resnet_jax.errors import UserError
from resnet_jax.parallel.sharding import prepare_memory
from resnet_jax.paths import check_folder_to_write
from resnet_jax.persistence import compile_cache, storage, versions
from resnet_jax.reports.classification import as_table, class_lines
from resnet_jax.reports.predictions import PredictionTable
from resnet_jax.training.weights_evaluation import Data, evaluate_weights, find_data
from resnet_jax.weights.load import read_card

VIEWS = ("one", "flip", "ten_crop")


def main(argv: list[str]) -> None:
    """Runs the command, which the module's docstring describes."""
    parser = Parser("evaluate", __doc__)
    parser.add_weights(nargs="+")
    parser.add_argument(
        "data",
        metavar="DATA",
        help="The images: a source such as folder:PHOTOS, SOURCE@SPLIT, or the name of"
        " an evaluation set.",
    )
    parser.add_argument(
        "--split",
        metavar="SPLIT",
        help="The split of the source, or a part of one, such as val[:50%%]. The"
        " default is the first of val, valid, validation, eval, test and testing that"
        " the source has, or its only split.",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="The directory to which evaluation.json, with all figures and the"
        " confusion matrix of at most 1,000 classes, and the predictions for each image"
        " are written. They replace those of an earlier evaluation. By default nothing"
        " is written.",
    )
    parser.add_argument(
        "--predictions",
        choices=("csv", "parquet"),
        default="csv",
        help="The format of the table of predictions in --output. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--topk",
        metavar="K",
        type=count,
        default=5,
        help="The number of the most probable classes in the table of predictions. The"
        " default is %(default)s.",
    )
    parser.add_argument(
        "--logits",
        action="store_true",
        help="Adds all logits to the table of predictions. It is off by default.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Prints the content of evaluation.json instead of text. It is off by"
        " default.",
    )
    parser.add_argument(
        "--batch_size",
        metavar="N",
        type=count,
        default=64,
        help="The number of images that are computed at a time, over all devices. The"
        " default is %(default)s.",
    )
    parser.add_argument(
        "--image_size",
        metavar="PIXELS",
        type=count,
        help="The height and width of the images in pixels. The default is that of the"
        " weights' card.",
    )
    parser.add_argument(
        "--crop_fraction",
        metavar="FRACTION",
        type=positive_number,
        help="The part of the shorter side that the central crop keeps. The default is"
        " that of the weights' card.",
    )
    parser.add_argument(
        "--views",
        choices=VIEWS,
        default="one",
        help="The views of each image, whose logits are averaged: one, flip (with its"
        " mirror image) or ten_crop. The default is %(default)s.",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="The type of the computation. The default is %(default)s.",
    )
    parser.add_argument(
        "--on_bad_image",
        choices=("stop", "skip"),
        default="stop",
        help="The action for an image that cannot be decoded: stop, or skip, which"
        " names and counts it. The default is %(default)s.",
    )
    parser.add_argument(
        "--data_dir",
        metavar="DIR",
        default="",
        help="The directory of tfds's data sets. The default is that of tfds.",
    )
    parser.add_argument(
        "--max_pixels",
        metavar="N",
        type=count,
        default=MAX_PIXELS,
        help="The number of pixels beyond which an image file is rejected. The default"
        " is that of data.max_pixels, %(default)s.",
    )
    args = parser.parse(argv[1:])
    if not args.output:
        parser.warn_of_unused(args, ["predictions", "topk", "logits"], "no --output")
    folder = None
    if args.output:
        folder = storage.local_path_of(args.output, "The directory of --output")
        check_folder_to_write(folder)
    compile_cache.turn_on()
    prepare_memory()
    data = find_data(args.data, args.split, args.data_dir)
    settings: dict[str, Any] = {
        "batch_size": args.batch_size,
        "evaluate.views": args.views,
        "model.dtype": args.dtype,
        "data.on_bad_image": args.on_bad_image,
        "data.max_pixels": args.max_pixels,
    }
    for name in ("image_size", "crop_fraction"):
        if getattr(args, name) is not None:
            settings[f"data.{name}"] = getattr(args, name)
    if folder:
        with storage.explaining_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    results: list[dict] = []
    document = {
        "command": f"python -m resnet_jax.evaluate {shlex.join(argv[1:])}",
        "versions": versions.package_versions(),
        "results": results,
    }
    problems = 0
    for number, weights in enumerate(args.weights, 1):
        end = f"_{number}" if len(args.weights) > 1 else ""
        file = folder / f"predictions{end}.{args.predictions}" if folder else None
        try:
            result = _evaluate(weights, data, settings, file, args)
        except UserError as error:
            # The results of other weights may have taken hours.
            if len(args.weights) == 1:
                raise
            problems += 1
            text = str(error) if weights in str(error) else f"{weights}: {error}"
            output.fail(output.one_line(text))
            continue
        results.append(result | ({"predictions": file.name} if file else {}))
        if not args.json:
            _print(result)
        if folder:
            storage.write_json(folder / "evaluation.json", document)
    if folder and results:
        _remove_other_tables(folder, [result["predictions"] for result in results])
    if args.json:
        output.answer(storage.to_json(document, indent=2))
    elif results:
        for line in as_table(results):
            output.answer(line)
        if folder:
            output.answer(f"written: {folder}/evaluation.json and the predictions")
    if problems:
        raise UserError(
            f"{problems:,} of the {len(args.weights):,} weights could not be evaluated,"
            " as said above."
        )


def _evaluate(
    weights: str,
    data: Data,
    settings: Mapping[str, Any],
    file: pathlib.Path | None,
    args: argparse.Namespace,
) -> dict:
    """Evaluates one of the weights, and writes its predictions to a file if given."""
    if not file:
        return evaluate_weights(weights, data, model=args.model, settings=settings)
    classes = read_card(weights, model=args.model).spec["num_classes"]
    k, logits = min(args.topk, classes), classes if args.logits else 0
    with PredictionTable(file, k, logits) as table:
        return evaluate_weights(
            weights, data, model=args.model, settings=settings, table=table
        )


def _remove_other_tables(folder: pathlib.Path, files: Sequence[str]) -> None:
    """Removes the predictions of earlier evaluations from the output directory."""
    for path in folder.iterdir():
        is_table = re.fullmatch(r"predictions(_\d+)?\.(csv|parquet)", path.name)
        if is_table and path.name not in files:
            path.unlink()


def _print(result: Mapping[str, Any]) -> None:
    output.answer(
        f"{result['weights']}: {result['network']} at {result['image_size']} px on"
        f" {result['split']}"
    )
    for name in result["bad_images"]:
        output.note(f"skipped {output.one_line(name)}, which cannot be decoded")
    if "per_class" in result:
        for line in class_lines(result):
            output.answer(f"  {line}")


if __name__ == "__main__":
    output.command(main)
