"""A thousand images that are broken in known ways, in ArrayRecord: each is named."""

import numpy as np
import pytest

from resnet_jax.data.augment import Augment
from resnet_jax.data.decode import Picture
from resnet_jax.data.loader import Examples, bad_indices, eval_batches, train_batches
from resnet_jax.data.sources import open_source
from resnet_jax.errors import BadImageError
from resnet_jax.prepare import main
from tests.helpers.breakages import BREAKAGES
from tests.helpers.pictures import encode, noise

NUMBER = 1000
KINDS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
SUFFIXES = {"JPEG": "jpg", "TIFF": "tif"}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The training split of a data set in which one image in ten is not broken."""
    root = tmp_path_factory.mktemp("broken")
    rng = np.random.default_rng(0)
    files = {kind: encode(noise(0, 40, 30), kind) for kind in KINDS}
    for i in range(NUMBER):
        kind = KINDS[i % len(KINDS)]
        content = files[kind]
        if i % 10:
            content = BREAKAGES[i % len(BREAKAGES)](content, rng)
        suffix = SUFFIXES.get(kind, kind.lower())
        path = root / "images" / "train" / str(i % 2) / f"{i:04}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    out = root / "packed"
    main(["prepare", f"folder:{root / 'images'}", f"--out={out}", "--num_workers=1"])
    return open_source(f"tfds:{out}", "train")


@pytest.mark.slow
# Pillow warns of broken files.
@pytest.mark.filterwarnings("ignore")
def test_every_broken_image_is_decoded_or_named(broken):
    center, random = Augment(size=16), Augment(size=16, crop="random_resized")
    common = {"source": broken, "channels": 3, "skip_bad": True}
    named = []
    for augment in (center, random):
        named.append(set())
        for index in range(NUMBER):
            image, _ = broken[index]
            try:
                augment(Picture(image, 3, broken.name(index)), key=0)
            except BadImageError as error:
                assert broken.name(index) in str(error)
                named[-1].add(index)
    # The same images are bad if they are decoded smaller or in part.
    assert named[0] == named[1]
    # Most breakages are noticed, and the unbroken images are decoded.
    assert NUMBER / 10 < len(named[0]) <= 0.9 * NUMBER

    bad, seen = set(), set()
    skipping = Examples(augment=center, **common)
    with eval_batches(skipping, batch_size=64, num_workers=0) as batches:
        for batch in batches:
            bad |= bad_indices(batch)
            seen |= set(batch["index"][batch["mask"]].tolist())
    assert bad == named[0]
    assert seen == set(range(NUMBER)) - bad

    skipping = Examples(augment=random, **common)
    with train_batches(
        skipping, seed=0, batch_size=50, steps=range(20), num_workers=0
    ) as batches:
        used = {index for batch in batches for index in batch["index"].tolist()}
    assert not used & bad
