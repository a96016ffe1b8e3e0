"""Classifies image files: `python -m resnet_jax.predict WEIGHTS IMAGE...`.

WEIGHTS is whatever `resnet_jax.convert` reads: a file of any framework, a workdir, a
weights directory or `timm:NAME.TAG`. Its card says how images are prepared.
"""

import argparse
import json

import jax
import numpy as np
from jaxtyping import Float, UInt8

from resnet_jax import output, storage
from resnet_jax.errors import UserError
from resnet_jax.models import build
from resnet_jax.pictures import picture, shorten
from resnet_jax.sharding import find_devices
from resnet_jax.storage import Path
from resnet_jax.weights.card import Card
from resnet_jax.weights.load import load

# Images that are computed at a time.
BATCH = 32


def predict(
    card: Card, variables: dict, pixels: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n classes"]:
    """Returns the logits of images that `Card.read_image` has read."""
    model = build(card.make_spec())

    @jax.jit
    def logits_of(variables, pixels):
        return model.apply(variables, card.normalize(pixels))

    size = min(BATCH, len(pixels))
    logits = []
    for start in range(0, len(pixels), size):
        part = pixels[start : start + size]
        # All batches have one size, for which it is compiled once.
        padding = [(0, size - len(part))] + [(0, 0)] * 3
        logits.append(logits_of(variables, np.pad(part, padding))[: len(part)])
    return np.concatenate(logits)


def top(card: Card, logits: Float[np.ndarray, " classes"], k: int = 5) -> list[dict]:
    """The k most probable classes: `index`, `name` and `probability` of each."""
    logits = logits.astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")[:k].tolist()
    return [
        {
            "index": index,
            "name": card.class_name(index),
            "probability": float(probabilities[index]),
        }
        for index in order
    ]


def draw(path: Path, pixels: UInt8[np.ndarray, "n h w c"], images: list[dict]) -> None:
    """Draws what the network saw of each image, and what it took it for.

    Raises UserError if the picture cannot be written.
    """
    columns = min(len(images), 5)
    rows = -(-len(images) // columns)
    with picture(path, figsize=(3 * columns, 3.6 * rows)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, shown, image in zip(grid, pixels, images, strict=False):
            axes.imshow(shown.squeeze(), cmap="gray", vmin=0, vmax=255)
            first, *others = (
                f"{shorten(one['name'])} ({one['probability']:.2f})"
                for one in image["top"]
            )
            axes.set_title(first, fontsize=10)
            axes.set_xlabel("\n".join(others[:2]), fontsize=8)
        for axes in figure.axes:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)


def main(argv: list[str]) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m resnet_jax.predict",
        description="Classifies image files with any weights.",
    )
    parser.add_argument("weights", help="file, workdir, directory or timm:NAME.TAG")
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=storage.path_of)
    parser.add_argument("--model", help="the network, where the weights do not say it")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--logits", action="store_true", help="print all logits")
    parser.add_argument(
        "--save", metavar="FILE.png", type=storage.path_of, help="draw the predictions"
    )
    args = parser.parse_args(argv[1:])
    # If there are none, that is told before anything is read.
    find_devices()
    card, variables = load(args.weights, model=args.model)
    if not card.spec["num_classes"]:
        raise UserError(f"{args.weights} has no head, so it predicts no classes.")
    pixels = np.stack([card.read_image(path) for path in args.images])
    logits = predict(card, variables, pixels)
    images = []
    for path, values in zip(args.images, logits, strict=True):
        image = {"file": str(path), "top": top(card, values)}
        if args.logits:
            image["logits"] = [float(value) for value in values]
        images.append(image)
    if args.save:
        draw(args.save, pixels, images)
    if args.json:
        document = {"weights": args.weights, "network": card.network, "images": images}
        output.answer(json.dumps(document, indent=2))
        return
    for image in images:
        output.answer(image["file"])
        for one in image["top"]:
            output.answer(f"  {100 * one['probability']:6.2f} %  {one['name']}")
        if args.logits:
            values = " ".join(f"{value:.6f}" for value in image["logits"])
            output.answer(f"  logits: {values}")


if __name__ == "__main__":
    output.command(main)
