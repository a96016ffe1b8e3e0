"""Operations of augmentations on one image: Pillow's by name, and a few more.

Nothing here is random: `policies.py` draws the operations and their amounts.
"""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance, ImageOps

# The name of an operation, and its amount.
Step = tuple[str, float | int]

ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
# The principal components of the colours of ImageNet, in units of 0 to 1; each column
# of COLOR_VECTORS is a component. They are those of fb.resnet.torch
# (datasets/imagenet.lua), after Krizhevsky et al. 2012, section 4.1.
COLOR_VALUES = np.array([0.2175, 0.0188, 0.0045])
COLOR_VECTORS = np.array(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ]
)


def apply(
    image: Image.Image,
    op: str,
    amount: float | int = 0.0,
    *,
    resample: Image.Resampling = Image.Resampling.NEAREST,
    fill: int | tuple[int, ...] = 0,
) -> Image.Image:
    """Applies one operation to an image.

    Args:
      image: The image, of mode RGB or L.
      op: The name of the operation.
      amount: The amount, whose meaning depends on the operation. `shear_x`, `shear_y`:
        the tangent of the angle. `translate_x`, `translate_y`: pixels, to the left and
        up. `rotate`: degrees, counter-clockwise. `brightness`, `color`, `contrast`,
        `sharpness`: a factor; 1 changes nothing. `hue`: a fraction of a full turn, -0.5
        to 0.5. `posterize`: the number of bits that are kept, 0 to 8. `solarize`: the
        lowest level that is inverted. `solarize_add`: the number that is added to
        levels below 128. Other operations ignore it.
      resample: The interpolation of geometric operations.
      fill: The colour that geometric operations bring in from outside, one level per
        channel.

    Raises:
      ValueError: There is no such operation.
    """
    # The first two rows of the matrix of an affine map, which Pillow takes.
    matrix: tuple[float, ...]
    match op:
        case "identity":
            return image
        case "shear_x":
            matrix = (1, amount, 0, 0, 1, 0)
        case "shear_y":
            matrix = (1, 0, 0, amount, 1, 0)
        case "translate_x":
            matrix = (1, 0, amount, 0, 1, 0)
        case "translate_y":
            matrix = (1, 0, 0, 0, 1, amount)
        case "rotate":
            return image.rotate(amount, resample, fillcolor=fill)
        case "brightness" | "color" | "contrast" | "sharpness":
            return ENHANCERS[op](image).enhance(amount)
        case "hue":
            return shift_hue(image, amount)
        case "posterize":
            # ImageOps.posterize does not accept 0 bits.
            mask = 256 - (1 << 8 - int(amount))
            return image.point(lambda level: level & mask)
        case "solarize":
            return ImageOps.solarize(image, amount)  # type: ignore[arg-type]  # takes floats
        case "solarize_add":
            add = int(amount)
            return image.point(lambda x: min(255, x + add) if x < 128 else x)
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
        case _:
            raise ValueError(f"There is no operation {op!r}.")
    affine = Image.Transform.AFFINE
    return image.transform(image.size, affine, matrix, resample, fillcolor=fill)


def shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Rotates the hue of an RGB image, or returns an L image as it is.

    Args:
      image: The image, of mode RGB or L.
      turn: The rotation as a fraction of a full turn, of which Pillow has 256 steps.
    """
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    steps = int(turn * 255)
    hue = hue.point(lambda level: (level + steps) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert(image.mode)


def add_lighting(
    pixels: UInt8[np.ndarray, "h w 3"], weights: Float[np.ndarray, "3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Adds a weighted sum of ImageNet's principal colour components to every pixel.

    This is AlexNet's colour augmentation (Krizhevsky et al. 2012, section 4.1). Levels
    are rounded and clipped to 0 to 255, unlike in the original implementations, whose
    pixels are floats.

    Args:
      pixels: The pixels of an RGB image.
      weights: The weight of each component.
    """
    added = 255 * COLOR_VECTORS @ (COLOR_VALUES * weights)
    levels = np.arange(256)[:, None] + added
    table = np.rint(levels).clip(0, 255).astype(np.uint8)
    return np.stack([table[pixels[:, :, c], c] for c in range(3)], axis=-1)


def to_image(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """Converts pixels to an image of Pillow's, of mode RGB or L."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels)


def to_pixels(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    """Returns the pixels of an RGB or L image."""
    return np.asarray(image).reshape(image.height, image.width, -1)
