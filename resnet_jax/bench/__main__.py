"""The command; see the package's docstring."""

import argparse
import json
import pathlib
import sys

from PIL import Image

from resnet_jax import bench, host
from resnet_jax.bench import augment as augment_bench
from resnet_jax.bench import convolutions as convolutions_bench
from resnet_jax.bench import input as input_bench
from resnet_jax.bench import scale as scale_bench
from resnet_jax.bench import schedule as schedule_bench
from resnet_jax.bench import speed as speed_bench
from resnet_jax.bench.training import compile_time, overhead, training_config
from resnet_jax.config import load, override
from resnet_jax.errors import UserError


def save_sheet(args: argparse.Namespace, overrides: list[str]) -> None:
    """Draws the contact sheet of the arguments."""
    if args.save.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--save={args.save} must be the name of a picture: sheet.png.")
    config = load(args.config)
    override(config, overrides)
    found = augment_bench.pictures(config, args.images)
    sheet = augment_bench.draw_sheet(
        config, found, rows=args.rows, columns=args.columns
    )
    sheet.save(args.save)
    print(f"{args.save}: {sheet.width}x{sheet.height}, originals on the left")


def _list(of: type):
    return lambda text: [of(part) for part in text.split(",")]


def main(argv: list[str]) -> None:
    """Command line: see the package's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m resnet_jax.bench",
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--repeats", type=int, default=3)
    rows_wanted = {"action": "store_true", "help": "a JSON row each, no text"}
    common.add_argument("--json", **rows_wanted)
    kinds = parser.add_subparsers(dest="what", required=True)
    for name in ("overhead", "compile"):
        kind = kinds.add_parser(name, parents=[common])
        kind.add_argument("--config", default="configs/cifar10.py")
        kind.add_argument("--model", help="of the zoo; default: the config's")
        kind.add_argument("--image_size", type=int, default=32)
        kind.add_argument("--batch_size", type=int, default=128)
        kind.add_argument("--steps", type=int, default=16)
        kind.add_argument("--dtype", default="float32")
    kind = kinds.add_parser("augment")
    kind.add_argument("--config", required=True)
    kind.add_argument(
        "--images", type=pathlib.Path, help="a folder or .zip of JPEGs, not the data"
    )
    kind.add_argument("--save", type=pathlib.Path, required=True, help="a .png")
    kind.add_argument("--rows", type=int, default=8, help="pictures")
    kind.add_argument("--columns", type=int, default=8, help="versions of each")
    kind = kinds.add_parser("input", parents=[common])
    kind.add_argument("images", type=pathlib.Path, help="a folder or .zip of JPEGs")
    kind.add_argument("--cores", type=int, default=2)
    kind.add_argument("--batches", type=int, default=16, help="of 128, in each repeat")
    for name in ("step", "inference", "convolutions"):
        kind = kinds.add_parser(name, parents=[common])
        kind.add_argument("--model", default="resnet50", help="of the zoo")
        kind.add_argument("--image_size", type=int, default=224)
        kind.add_argument("--batch_size", type=_list(int), default=[32], help="a,b,..")
        types = ["float32", "bfloat16"]
        kind.add_argument("--dtype", type=_list(str), default=types, help="a,b,..")
        if name != "convolutions":
            kind.add_argument(
                "--torch", default=sys.executable, help="the Python that has torch"
            )
        if name == "step":
            kind.add_argument(
                "--profile", type=pathlib.Path, help="writes a trace to this folder"
            )
    kind = kinds.add_parser("scale", parents=[common])
    kind.add_argument("--config", default="configs/r50.py")
    kind.add_argument("--model", default="resnet18", help="that is trained here")
    kind.add_argument("--saved", default="resnet152", help="whose state is saved")
    kind.add_argument("--processes", type=_list(int), default=[1, 2, 4, 8])
    kind.add_argument("--image_size", type=int, default=64)
    kind.add_argument("--batch_size", type=int, default=8, help="of a process")
    kind.add_argument("--steps", type=int, default=20, help="between two saves")
    kind.add_argument("--dtype", default="float32")
    kind.add_argument("--topology", help="of `plan`, for predictions: v5e:2x4")
    kind = kinds.add_parser("schedule")
    kind.add_argument("--config", required=True, help="FILE.py or FILE.py:VARIANT")
    kind.add_argument("--save", type=pathlib.Path, help="draws there, such as lr.png")
    kind.add_argument("--train_size", type=int, help="images; default: the source's")
    kind.add_argument("--json", **rows_wanted)
    args, overrides = parser.parse_known_args(argv[1:])
    if args.what == "augment":
        save_sheet(args, overrides)
        return
    if overrides and args.what != "schedule":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if args.what == "schedule":
        config = load(args.config)
        override(config, overrides)
        size = schedule_bench.train_size_of(config, args.train_size)
        rows = [schedule_bench.row(args.config, config, size)]
        if args.save:
            schedule_bench.draw(args.config, config, size, args.save)
    elif args.what == "input":
        rows = input_bench.rows(args.images, args.cores, args.batches, args.repeats)
    elif args.what == "scale":
        rows = scale_bench.rows(
            training_config(args),
            args.processes,
            steps=args.steps,
            repeats=args.repeats,
            saved=args.saved,
            topology=args.topology,
            planned=load(args.config),
        )
    elif args.what == "convolutions":
        rows = convolutions_bench.rows(
            args.model, args.image_size, args.batch_size, args.dtype, args.repeats
        )
    elif args.what in ("step", "inference"):
        rows = speed_bench.rows(
            args.what,
            args.model,
            args.image_size,
            args.batch_size,
            args.dtype,
            args.repeats,
            args.torch,
            getattr(args, "profile", None),
        )
    else:
        measure = overhead if args.what == "overhead" else compile_time
        rows = [measure(training_config(args), args.repeats)]
    for row in rows:
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            peer = ""
            if row["peer"]:
                peer = f", {row['peer']} {row['peer_value']:.4g}"
                peer += f", ratio {row['ratio']:.3f}"
            print(f"{row['name']}: {row['value']:.4g} {row['unit']}{peer}", flush=True)


if __name__ == "__main__":
    # Of this process alone, which others that call `main` would not expect.
    if sys.argv[1:2] == ["convolutions"]:
        host.keep_freed_memory()
    try:
        main(sys.argv)
    except UserError as error:
        sys.exit(f"error: {error}")
