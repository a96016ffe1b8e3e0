"""Converts weights: `python -m resnet_jax.convert IN OUT`.

IN is anything that `resnet_jax.load` takes: a file of torchvision, timm, Keras or BiT,
a workdir, a weights directory or `timm:NAME.TAG`. The suffix of OUT names the format to
write; without a suffix, OUT becomes a weights directory.
"""

import pathlib

from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.paths import check_folder_to_write
from resnet_jax.persistence.storage import file_to_write, is_remote, path_of
from resnet_jax.weights import files
from resnet_jax.weights.load import load
from resnet_jax.weights.save import is_directory, loading_advice, save


def main(argv: list[str]) -> None:
    """Runs the command, which the module's docstring describes."""
    parser = Parser("convert", __doc__)
    parser.add_weights("source", metavar="IN")
    parser.add_argument(
        "target",
        metavar="OUT",
        help=f"The file to write, whose suffix ({', '.join(files.SUFFIXES)}) names the"
        " format, or a directory, which gets the format of resnet_jax.",
    )
    parser.add_argument(
        "--to",
        metavar="SCHEME",
        help="The naming scheme of the parameters in OUT, if its format has several; a"
        " wrong name lists them. The default is the network's own scheme, or BiT's for"
        " a BiT network in .npz.",
    )
    args = parser.parse(argv[1:])
    # Before weights are loaded, or fetched.
    if not is_directory(args.target):
        files.check_suffix(file_to_write(args.target))
    elif not is_remote(path := path_of(args.target)):
        check_folder_to_write(pathlib.Path(path))
    card, variables = load(args.source, model=args.model)
    card = save(args.target, variables, card, args.to)
    output.say(
        f"{args.source}: {card.network} -> {args.target} (names of {card.scheme})"
    )
    if advice := loading_advice(card, args.target):
        output.say(advice)


if __name__ == "__main__":
    output.command(main)
