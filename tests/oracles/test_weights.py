"""Files of torch are read as timm and torchvision write them, and vice versa."""

import argparse
import json
import pathlib
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import nn

from resnet_jax import predict
from resnet_jax.convert import main
from resnet_jax.errors import UserError
from resnet_jax.models import get_spec
from resnet_jax.weights.adapt import adapt_channels
from resnet_jax.weights.card import default_card
from resnet_jax.weights.load import load
from resnet_jax.weights.save import save
from tests.helpers import keyed, small_networks
from tests.helpers.real_data import real_data
from tests.oracles import networks


def make(name: str) -> nn.Module:
    """Returns a network as its library makes it, with its own initial values."""
    if name.startswith("torchvision_"):
        return torchvision.models.get_model(name.removeprefix("torchvision_"))
    return timm.create_model(name)


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a network's `state_dict` without torch's counters."""
    return {
        name: value
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


# One network for each scheme of torch. Only the names of VGG are tested, since its
# weights have half a gigabyte.
@pytest.mark.parametrize(
    "name",
    ["test_resnet", "torchvision_resnet18", "resnetv2_18", "nf_resnet50"],
)
@pytest.mark.parametrize("format", ["w.pth", "w.safetensors"])
def test_written_files_load_strictly_into_torch(tmp_path, name, format):
    spec = get_spec(name)
    path = tmp_path / format
    save(str(path), keyed.variables(spec), default_card(name))
    if path.suffix == ".pth":
        tensors = torch.load(path, weights_only=True)
    else:
        tensors = load_file(path)
    network = make(name)
    network.load_state_dict(tensors, strict=True)
    for key, value in weights_of(network).items():
        assert torch.equal(value, tensors[key]), key


def test_written_bit_files_load_with_the_reader_of_timm(tmp_path):
    name = "resnetv2_50x1_bit"
    path = tmp_path / "w.npz"
    save(str(path), keyed.variables(get_spec(name)), default_card(name))
    network = timm.create_model(name)
    network.load_pretrained(str(path))
    expected = networks.build(name).state_dict()
    for key, value in weights_of(network).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["test_resnet", "torchvision_resnet18"])
def test_a_file_of_torch_survives_two_conversions_bit_for_bit(tmp_path, name):
    network = make(name)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    native, back = str(tmp_path / "native"), str(tmp_path / "back.pth")
    main(["convert", str(tmp_path / "w.pth"), native, f"--model={name}"])
    main(["convert", native, back])
    tensors, expected = torch.load(back, weights_only=True), weights_of(network)
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(tensors[key], value), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(tmp_path, dtype):
    network = make("test_resnet").to(dtype)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    _, variables = load(str(tmp_path / "w.pth"))
    kernel = variables["params"]["stem_conv1"]["kernel"]
    assert kernel.dtype == np.float32
    expected = network.conv1[0].weight.detach().float().numpy()
    np.testing.assert_array_equal(kernel, expected.transpose(2, 3, 1, 0))


def test_checkpoints_of_training_programs_are_unwrapped(tmp_path):
    network = make("test_resnet")
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    checkpoint = {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    _, variables = load(str(tmp_path / "last.pth.tar"))
    kernel = network.fc.weight.detach().numpy().T
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], kernel)


class Code:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize(
    "write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))]
)
def test_a_pickle_with_code_is_rejected_and_not_run(tmp_path, write):
    path = tmp_path / "w.pth"
    write({"fc.weight": Code(tmp_path / "was run")}, path)
    with pytest.raises(UserError, match=r"is refused: .*could run code") as error:
        load(str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "was run").exists()


def test_the_error_for_a_pickled_network_names_its_class(tmp_path):
    torch.save(make("test_resnet"), tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"timm\.models\.resnet\.ResNet.*state_dict\(\)"
    ):
        load(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "contains a list instead of named tensors"),
        ({"epochs": 9}, "has no tensors"),
    ],
)
def test_the_error_for_other_content_names_it(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("size", [100, 1000])
def test_a_truncated_file_is_rejected(tmp_path, size):
    path = tmp_path / "w.pth"
    torch.save(make("test_resnet").state_dict(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"w\.pth is cut off or damaged"):
        load(str(path))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 7])
def test_first_kernels_are_adapted_as_timm_does(channels):
    kernel = keyed.generator("kernel").standard_normal((7, 7, 3, 4), np.float32)
    expected = adapt_input_conv(
        channels, torch.from_numpy(kernel.transpose(3, 2, 0, 1))
    )
    adapted = adapt_channels(kernel, channels).transpose(3, 2, 0, 1)
    # Three numbers are summed in another order.
    np.testing.assert_allclose(adapted, expected.numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "file"),
    [("resnet20", "resnet20-12fca82f.th"), ("resnet32", "resnet32-d509ac18.th")],
)
def test_published_weights_give_their_authors_logits(tmp_path, name, file, capsys):
    directory = real_data("cifar-resnet-weights")
    expected = json.loads((directory / "reference_logits.json").read_text())[name]
    paths = [str(real_data("cifar10-samples") / picture) for picture in expected]
    weights = str(directory / file)
    predict.main(["predict", weights, *paths, "--json", "--logits"])
    document = json.loads(capsys.readouterr().out)
    assert document["network"] == f"akamaster_{name}"
    for image, logits in zip(document["images"], expected.values(), strict=True):
        # Float32 rounds in 32 layers; the largest difference was 6e-5.
        np.testing.assert_allclose(image["logits"], logits, atol=1e-3, rtol=0)
        assert image["top"][0]["index"] == int(np.argmax(logits))

    main(["convert", weights, str(tmp_path / "w.safetensors")])
    small_networks.assert_equal(
        load(str(tmp_path / "w.safetensors"))[1], load(weights)[1]
    )


@pytest.mark.parametrize(
    ("interpolation", "channels"), [("bicubic", 3), ("bilinear", 3), ("bicubic", 1)]
)
def test_preprocessed_images_are_near_those_of_the_transform_of_timm(
    tmp_path, interpolation, channels
):
    pixels = np.random.default_rng(0).integers(256, size=(90, 130, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    spec = get_spec("resnet18", in_channels=channels)
    half = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    card = default_card(
        "resnet18", spec, image_size=56, interpolation=interpolation, **half
    )
    transform = timm.data.create_transform(
        (channels, 56, 56),
        interpolation=interpolation,
        crop_pct=card.crop_fraction,
        mean=card.mean,
        std=card.std,
    )
    expected = transform(picture.convert("L") if channels == 1 else picture)
    inputs = np.asarray(card.preprocess(picture)).transpose(0, 3, 1, 2)
    levels = np.abs(inputs[0] - expected.numpy()) * card.std[0] * 255
    # Only the kept box is resized here, which changes some levels by one or two.
    assert levels.max() < 2
    assert levels.mean() < 0.3
