"""The geometry of a convolution or pooling: stride, padding and dilation.

Padding is decided here, as numbers of pixels: `symmetric_padding` is torch's usual one,
and `same_padding` is TensorFlow's.
"""

import dataclasses

from jax import lax

# Pixels of padding above and below, then left and right.
Padding = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Positions of the windows that a convolution or a pooling sees.

    Attributes:
      stride: Distance in pixels between two windows, along both axes.
      padding: Pixels of padding above and below, then left and right.
      dilation: Distance in pixels between two taps of a window.
    """

    stride: int = 1
    padding: Padding = ((0, 0), (0, 0))
    dilation: int = 1

    def output_length(self, length: int, axis: int, side: int) -> int:
        """Returns the length of the output along an axis, in pixels.

        Args:
          length: The length of the input along that axis.
          axis: 0 for the height, 1 for the width.
          side: The side of the window in taps.
        """
        span = self.dilation * (side - 1) + 1
        return max((length + sum(self.padding[axis]) - span) // self.stride + 1, 0)


def symmetric_padding(
    height: int, width: int, kernel: int, stride: int, dilation: int = 1
) -> Geometry:
    """Returns the geometry with `dilation * (kernel - 1) // 2` pixels on each side.

    That is what torch's networks pass as `padding`.

    Args:
      height: The height of the input in pixels; any height has the same padding.
      width: The width of the input in pixels; any width has the same padding.
      kernel: The side of the kernel in taps.
      stride: Distance in pixels between two windows.
      dilation: Distance in pixels between two taps.
    """
    pad = dilation * (kernel - 1) // 2
    return Geometry(stride, ((pad, pad), (pad, pad)), dilation)


def same_padding(
    height: int, width: int, kernel: int, stride: int, dilation: int = 1
) -> Geometry:
    """Returns the geometry with TensorFlow's padding 'SAME'.

    At even input sizes and stride 2 it pads one pixel less above and on the left than
    `symmetric_padding`, which shifts the output by one pixel.

    Args:
      height: The height of the input in pixels.
      width: The width of the input in pixels.
      kernel: The side of the kernel in taps.
      stride: Distance in pixels between two windows.
      dilation: Distance in pixels between two taps.
    """
    side = dilation * (kernel - 1) + 1
    rows, columns = lax.padtype_to_pads(
        (height, width), (side, side), (stride, stride), "SAME"
    )
    return Geometry(stride, (rows, columns), dilation)
