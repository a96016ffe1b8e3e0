"""Classifies image files: `python -m resnet_jax.predict WEIGHTS IMAGE...`.

WEIGHTS is anything that `resnet_jax.load` takes: a file of any framework, a workdir, a
weights directory or `timm:NAME.TAG`. The card of the weights says how images are
prepared. For each image the five most probable classes are printed.
"""

import json

from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.data.user_images import pictures_of
from resnet_jax.persistence import storage
from resnet_jax.reports.predictions import draw_predictions
from resnet_jax.weights.trained import load


def main(argv: list[str]) -> None:
    """Runs the command, which the module's docstring describes."""
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
        help="The image files to classify, in any format that Pillow reads, such as"
        " JPEG or PNG.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="The network's name. It is needed only if neither the weights nor a card"
        " beside them name the network. The default is then the first network that"
        " the weights fit.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Prints one JSON document instead of text. It is off by default.",
    )
    parser.add_argument(
        "--logits",
        action="store_true",
        help="Also prints all logits of each image. It is off by default.",
    )
    parser.add_argument(
        "--save",
        metavar="FILE.png",
        type=storage.file_to_write,
        help="The file to which a picture is written that shows each image as the"
        " network sees it, with its predictions. By default none is written.",
    )
    args = parser.parse(argv[1:])
    model = load(args.weights, model=args.model)
    card = model.card
    # A file may be a pipe, so each is read only once.
    pictures = list(pictures_of(args.images, card.spec["in_channels"], card.network))
    logits = model.logits(pictures)
    predictions = [card.top(values) for values in logits]
    if args.save:
        draw_predictions(args.save, card.crop(pictures), predictions)
    rows = list(zip(map(str, args.images), predictions, logits.tolist(), strict=True))
    if args.json:
        images = [
            {"file": file, "top": [prediction._asdict() for prediction in top]}
            | ({"logits": values} if args.logits else {})
            for file, top, values in rows
        ]
        document = {"weights": args.weights, "network": card.network, "images": images}
        output.answer(json.dumps(document, indent=2))
        return
    for file, top, values in rows:
        output.answer(file)
        for prediction in top:
            output.answer(f"  {100 * prediction.probability:6.2f} %  {prediction.name}")
        if args.logits:
            output.answer(f"  logits: {' '.join(f'{value:.6f}' for value in values)}")


if __name__ == "__main__":
    output.command(main)
