"""The command `zoo`, which prints the table of networks."""

import json

import pytest

from resnet_jax import zoo
from resnet_jax.errors import UserError
from resnet_jax.models import ZOO, build, list_models
from resnet_jax.models.cost import cost_of_image


def printed(capsys, *arguments: str) -> str:
    """Runs the command; returns its output."""
    zoo.main(["zoo", *arguments])
    return capsys.readouterr().out


def test_json_has_the_rows_that_match(capsys):
    rows = json.loads(printed(capsys, "resnet18*", "--json"))
    assert [row["name"] for row in rows] == list_models("resnet18*")
    row = rows[0]
    assert row["params"] == ZOO["resnet18"].params == 11_689_512
    # timm counts 1.82 GMACs, of which convolutions and the head take 1.8141, and 2.48 M
    # outputs of convolutions.
    assert row["macs"] / 1e9 == pytest.approx(1.8141, abs=5e-4)
    assert row["activation_bytes"] / 4e6 == pytest.approx(2.48, abs=0.01)
    assert (row["oracle"], row["scan"], row["top1"]) == ("timm", True, 69.758)


def test_several_patterns_list_each_network_once_in_their_order(capsys):
    patterns = ("plain20", "cifar_resnet20", "*resnet20")
    rows = json.loads(printed(capsys, *patterns, "--json"))
    names = [row["name"] for row in rows]
    assert names == ["plain20", "cifar_resnet20", "akamaster_resnet20"]


def test_the_text_has_a_line_for_each_network_and_aligned_columns(capsys):
    header, *lines = printed(capsys, "cifar_resnet*").splitlines()
    assert [line.split()[0] for line in lines] == list_models("cifar_resnet*")
    column = header.index("oracle")
    assert {line[column:].split()[0] for line in lines} == {"torch"}


def test_scanned_blocks_have_the_same_cost():
    spec = ZOO["resnet50"].spec
    scanned = cost_of_image(build(spec, scan_blocks=True), 224)
    assert scanned == cost_of_image(build(spec), 224)


def test_the_message_for_a_pattern_without_networks_names_the_nearest():
    with pytest.raises(UserError, match=r"'resnet51'.*resnet50"):
        zoo.main(["zoo", "resnet51"])
