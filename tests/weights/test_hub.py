"""Weights of timm are fetched from the hub, which a local server imitates."""

import hashlib
import http.server
import json
import threading

import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

from resnet_jax.errors import UserError
from resnet_jax.models import get_spec
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.load import load, read_card
from resnet_jax.weights.naming import to_foreign
from tests.helpers import keyed, small_networks
from tests.helpers.timm_config import CONFIG

NAME = "test_resnet.r160_in1k"
COMMIT = "0" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """A handler that answers as the hub does, for one repository."""

    files: dict[str, bytes]
    requests: list[str]

    def do_HEAD(self):
        """Answers with the headers of a file."""
        self.answer(with_content=False)

    def do_GET(self):
        """Answers with a file."""
        self.answer(with_content=True)

    def answer(self, with_content: bool):
        """Answers with a file of the repository, or with the hub's error."""
        self.requests.append(self.path)
        repository, _, file = self.path.partition("/resolve/main/")
        known = repository == f"/timm/{NAME}"
        content = self.files.get(file) if known else None
        self.send_response(200 if content is not None else 404)
        if content is None:
            code = "EntryNotFound" if known else "RepoNotFound"
            self.send_header("X-Error-Code", code)
        content = content or b""
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *_):
        """Logs nothing."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Starts a hub with one network, and an empty cache; yields its handler."""
    spec = get_spec("test_resnet")
    tensors = to_foreign(keyed.variables(spec), spec, SCHEMES["timm"])
    tensors = {name: np.array(x, order="C") for name, x in tensors.items()}
    config = CONFIG | {"architecture": "test_resnet"}
    handler = type("LocalHub", (Hub,), {"files": {}, "requests": []})
    handler.files["model.safetensors"] = safetensors.numpy.save(tensors)
    handler.files["config.json"] = json.dumps(config).encode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    server.server_close()


def test_weights_are_fetched_once_and_then_read_from_the_cache(hub):
    card, variables = load(f"timm:{NAME}")
    small_networks.assert_equal(variables, keyed.variables(get_spec("test_resnet")))
    assert (card.network, card.image_size) == ("test_resnet", 176)
    assert card.mean == (0.1, 0.2, 0.3)
    assert card.license == "apache-2.0"
    requests = len(hub.requests)
    load(f"timm:{NAME}")
    assert len(hub.requests) == requests > 0


def test_a_card_is_read_before_the_arrays_and_both_are_fetched_once(hub):
    card = read_card(f"timm:{NAME}")
    assert (card.image_size, card.interpolation) == (176, "bicubic")
    requests = len(hub.requests)
    assert load(f"timm:{NAME}")[0].mean == card.mean
    assert len(hub.requests) == requests > 0


def test_weights_of_the_hub_are_adapted_to_other_classes(hub, caplog):
    card, _ = load(f"timm:{NAME}", num_classes=3)
    assert card.spec["num_classes"] == 3
    assert "the head for 3 is randomly initialised" in caplog.text


@pytest.mark.parametrize("cache", ["file/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written_is_named(cache, hub, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / cache))
    with pytest.raises(UserError, match=rf"{cache}: .*Set HF_HOME to use another"):
        load(f"timm:{NAME}")


def test_unknown_weights_and_files_of_the_hub_are_named(hub):
    with pytest.raises(UserError, match=r"no weights 'resnet18\.x' at .*lists those"):
        load("timm:resnet18.x")
    del hub.files["model.safetensors"]
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load(f"timm:{NAME}")


def test_without_a_network_the_error_names_the_file_and_the_cache(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = r"cannot be reached, and model\.safetensors of timm/resnet50\.a1_in1k"
    with pytest.raises(UserError, match=message) as error:
        load("timm:resnet50.a1_in1k")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_error_for_a_missing_tag_gives_an_example():
    with pytest.raises(UserError, match=r"timm:resnet50\.a1_in1k"):
        load("timm:resnet50")


def test_a_local_copy_of_a_repository_is_read(tmp_path, hub):
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert load(str(source))[0].image_size == 176
    assert not hub.requests


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_copy_of_a_repository_may_have_other_names_and_several_files(
    name, shards, tmp_path, hub
):
    tensors = safetensors.numpy.load(hub.files["model.safetensors"])
    (tmp_path / "config.json").write_bytes(hub.files["config.json"])
    names = [f"{i}-{name}" for i in range(shards)] if shards > 1 else [name]
    weight_map = {key: names[i % shards] for i, key in enumerate(tensors)}
    for file in names:
        part = {key: x for key, x in tensors.items() if weight_map[key] == file}
        safetensors.numpy.save_file(part, tmp_path / file)
    if shards > 1:
        index = tmp_path / f"{name}.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    _, variables = load(str(tmp_path))
    small_networks.assert_equal(variables, keyed.variables(get_spec("test_resnet")))


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"pretrained_cfg": {}}, r"as timm does \(it has no 'input_size'\)\. Correct"),
        ({"num_classes": -3}, r"num_classes=-3.*\. Correct or remove it"),
        ({"model_args": {"act_layer": "silu"}}, r"act_layer='silu'; give such changes"),
        ({"model_args": {"layers": [1, 1, 1, 2]}}, r"layers=\[1, 1, 1, 2\]; give"),
        ({"architecture": "gpt"}, r"There is no network 'gpt'.{,900}$"),
    ],
)
def test_a_config_of_another_network_is_one_sentence(change, pattern, tmp_path, hub):
    (tmp_path / "model.safetensors").write_bytes(hub.files["model.safetensors"])
    config = json.loads(hub.files["config.json"]) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=pattern) as error:
        load(str(tmp_path))
    assert "Error" not in str(error.value)


def test_arguments_that_change_no_function_are_taken(tmp_path, hub):
    (tmp_path / "model.safetensors").write_bytes(hub.files["model.safetensors"])
    config = json.loads(hub.files["config.json"])
    config["model_args"] = {"num_classes": 1000, "in_chans": 3, "drop_rate": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(str(tmp_path))[0].network == "test_resnet"
