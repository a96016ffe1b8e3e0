"""The geometry of a convolution or pooling: stride, padding and dilation."""

import dataclasses

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
