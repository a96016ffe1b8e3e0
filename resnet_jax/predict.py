"""Classifies image files: `python -m resnet_jax.predict WEIGHTS IMAGE...`.

WEIGHTS is what `resnet_jax.load` takes: a file of any framework, a workdir, a weights
directory or `timm:NAME.TAG`. Its card says how images are prepared.
"""

import json

from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.data.user_images import pictures_of
from resnet_jax.persistence import storage
from resnet_jax.reports.predictions import draw_predictions
from resnet_jax.weights.trained import load


def main(argv: list[str]) -> None:
    """Runs the command; the module's docstring explains it."""
    parser = Parser("predict", __doc__)
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="The weights: a file of torchvision, timm, Keras or BiT, a workdir of a"
        " run, a weights directory, or timm:NAME.TAG on the Hugging Face hub.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        type=storage.path_of,
        help="The image files to classify; JPEG, PNG and what else Pillow reads.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="The network's name. It is needed only if neither the weights nor a card"
        " beside them name the network; the default is then the first network that"
        " they fit.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Prints one JSON document instead of text. It is off by default.",
    )
    parser.add_argument(
        "--logits",
        action="store_true",
        help="Prints all logits of each image too. It is off by default.",
    )
    parser.add_argument(
        "--save",
        metavar="FILE.png",
        type=storage.path_of,
        help="Draws each image as the network sees it with its predictions, and writes"
        " the picture to this file. By default nothing is drawn.",
    )
    args = parser.parse(argv[1:])
    model = load(args.weights, model=args.model)
    card = model.card
    # Each file is read once, since it may be a pipe.
    pictures = list(pictures_of(args.images, card.spec["in_channels"], card.network))
    logits = model.logits(pictures)
    predictions = [card.top(values) for values in logits]
    if args.save:
        draw_predictions(args.save, card.crop(pictures), predictions)
    images = []
    for path, top, values in zip(args.images, predictions, logits, strict=True):
        image = {"file": str(path), "top": [one._asdict() for one in top]}
        if args.logits:
            image["logits"] = [float(value) for value in values]
        images.append(image)
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
