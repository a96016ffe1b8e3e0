"""Makes figures that can show any text, such as names of classes and files."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

from resnet_jax.console.output import printable, reason_of
from resnet_jax.errors import UserError
from resnet_jax.persistence.storage import (
    Path,
    explaining_errors,
    file_to_write,
    is_remote,
    write,
)

# A user's matplotlibrc chooses fonts and colours. No text is parsed as mathematics or
# as TeX, where a name such as a$b_$ is an error. (matplotlib's type for settings is a
# literal of all their names.)
_SETTINGS: dict[Any, bool] = {
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
}


def picture_to_write(location: str) -> Path:
    """Returns the path object for a picture that is to be written, after a check.

    Args:
      location: The location as the user wrote it; its suffix says the format, and
        without one the picture is a PNG.

    Raises:
      UserError: The format is unknown, or no file can be written there; see
        `storage.file_to_write`.
    """
    # Imported here, so that commands without a picture do not wait for matplotlib.
    from matplotlib.backend_bases import FigureCanvasBase

    path = file_to_write(location)
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise UserError(
            f"{path} cannot be written: no picture has the suffix {path.suffix}. Known:"
            f" {', '.join(sorted(formats))}."
        )
    return path


@contextlib.contextmanager
def picture(path: Path, **options) -> Iterator:
    """Provides a matplotlib figure, and writes it when the context ends.

    Args:
      path: The file to write; its suffix says the format.
      **options: Arguments of `matplotlib.figure.Figure`, such as `figsize`.

    Raises:
      UserError: The file cannot be written.
    """
    # Imported here, so that the start of a run does not wait for matplotlib.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # A character that no font has is drawn as a box, without a warning.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(layout="constrained", **options)
        yield figure
        for text in figure.findobj(Text):
            text.set_text(printable(text.get_text()))
        content = io.BytesIO()
        try:
            figure.savefig(content, dpi=100, format=path.suffix.lstrip(".") or None)
        except ValueError as error:
            raise UserError(f"{path} cannot be written: {error}.") from None
    with explaining_errors(path):
        try:
            write(path, content.getvalue())
        except OSError as error:
            if is_remote(path):
                raise
            raise UserError(f"{path} cannot be written: {reason_of(error)}.") from None


def shorten(name: str, length: int = 30) -> str:
    """Returns a name for one line of a picture, cut to at most `length` characters."""
    name = " ".join(printable(name).split())
    return name if len(name) <= length else f"{name[: length - 1]}…"
