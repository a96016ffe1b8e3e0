"""What an augmentation does to an image: Pillow's operations by name, and a few more.

Nothing here is random; `policies.py` draws which of them are done, and how much.
"""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance, ImageOps

# An operation and how much of it.
Step = tuple[str, float | int]

ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
# Of the colours of ImageNet, in units of 0 to 1; a column is a component.
# fb.resnet.torch, datasets/imagenet.lua, after Krizhevsky et al. 2012, section 4.1.
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
    """Does one operation.

    Args:
      image: RGB or L.
      op: its name.
      amount: `shear_x`, `shear_y`: the tangent of the angle. `translate_x`,
        `translate_y`: pixels, to the left and up. `rotate`: degrees, counter-clockwise.
        `brightness`, `color`, `contrast`, `sharpness`: a factor, 1 changes nothing.
        `hue`: part of a turn, -0.5 to 0.5. `posterize`: bits that are kept, 0 to 8.
        `solarize`: the level from which on colours are inverted. `solarize_add`: what
        is added to levels below 128. Others take none.
      resample: how geometric operations interpolate.
      fill: colour of what they bring in from outside, one level a channel.

    Raises:
      ValueError: there is no such operation.
    """
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
            # Not Pillow's, which refuses to keep no bit at all.
            mask = 256 - (1 << 8 - int(amount))
            return image.point(lambda level: level & mask)
        case "solarize":
            return ImageOps.solarize(image, amount)
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
    """Turns the hue by a part of a circle, in Pillow's 256 steps of it; RGB or L."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    steps = int(turn * 255)
    hue = hue.point(lambda level: (level + steps) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert(image.mode)


def add_lighting(
    pixels: UInt8[np.ndarray, "h w 3"], weights: Float[np.ndarray, "3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Adds weights of the principal components of ImageNet's colours to every pixel.

    Krizhevsky et al. 2012, section 4.1. Levels are rounded, and clipped to 0 to 255,
    which its sources, whose pixels are floats, do not.
    """
    added = 255 * COLOR_VECTORS @ (COLOR_VALUES * weights)
    levels = np.arange(256)[:, None] + added
    table = np.rint(levels).clip(0, 255).astype(np.uint8)
    return np.stack([table[pixels[:, :, c], c] for c in range(3)], axis=-1)


def to_image(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """Pixels as Pillow has them: RGB or L."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels)


def to_pixels(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of an RGB or L image."""
    return np.asarray(image).reshape(image.height, image.width, -1)
