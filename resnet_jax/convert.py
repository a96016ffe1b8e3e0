"""Converts weights: `python -m resnet_jax.convert IN OUT`.

IN is what `resnet_jax.load` takes: a file of torchvision, timm, Keras or BiT, a
workdir, a weights directory or `timm:NAME.TAG`. The suffix of OUT names the format;
without a suffix it is a weights directory.
"""

from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.persistence.storage import path_of
from resnet_jax.weights import files
from resnet_jax.weights.load import load
from resnet_jax.weights.save import is_directory, save


def main(argv: list[str]) -> None:
    """Runs the command; the module's docstring explains it."""
    parser = Parser("convert", __doc__)
    parser.add_argument(
        "source",
        metavar="IN",
        help="The weights to read: a file of torchvision, timm, Keras or BiT, a workdir"
        " of a run, a weights directory, or timm:NAME.TAG on the Hugging Face hub.",
    )
    parser.add_argument(
        "target",
        metavar="OUT",
        help=f"The file to write, whose suffix ({', '.join(files.SUFFIXES)}) names the"
        " format, or a directory, which gets our own format.",
    )
    parser.add_argument(
        "--to",
        metavar="SCHEME",
        help="The naming scheme to write, where the format of OUT has several; a wrong"
        " name lists them. The default is the network's own, and BiT's in .npz.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="The network's name. It is needed only if neither IN nor a card beside it"
        " names the network; the default is then the first network that IN fits.",
    )
    args = parser.parse(argv[1:])
    if not is_directory(args.target):
        files.check_suffix(path_of(args.target))
    card, variables = load(args.source, model=args.model)
    card = save(args.target, variables, card, args.to)
    output.say(
        f"{args.source}: {card.network} -> {args.target} (names of {card.scheme})"
    )


if __name__ == "__main__":
    output.command(main)
