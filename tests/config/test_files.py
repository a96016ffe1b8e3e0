"""Config files and recipes: golden texts, variants, and errors that name the line."""

import re
import runpy

import pytest

from resnet_jax import config as config_lib
from resnet_jax.config.saved import (
    as_text,
)
from resnet_jax.errors import UserError
from tests.helpers.golden_configs import CONFIGS, GOLDEN, RECIPES, golden, load


@pytest.mark.parametrize("name", RECIPES)
def test_the_config_of_every_recipe_equals_its_golden_text(name):
    """Run `python -m tests.helpers.golden_configs` to accept a change."""
    assert as_text(load(name)) == golden(name).read_text()


def test_every_golden_text_has_a_recipe():
    assert set(GOLDEN.glob("*.txt")) == {golden(name) for name in RECIPES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_without_a_variant_is_one_of_its_variants(path):
    variants = [name for name in RECIPES if name.partition(":")[0] == path.stem]
    default = as_text(load(path.stem))
    assert default in [as_text(load(name)) for name in variants]


def test_an_unknown_variant_is_an_error_that_lists_the_variants():
    with pytest.raises(UserError, match=r"no variant 'a4'.*a1, a2, a3"):
        load("rsb:a4")


@pytest.mark.parametrize(
    ("text", "variant", "message"),
    [
        ("def get_config(): ...", ":x", r"c\.py has no variants; leave :x out\.$"),
        (
            "def get_config(x): ...",
            "",
            r"c\.py needs a variant; write .*c\.py:VARIANT\.$",
        ),
        ("x = 1", "", r"c\.py is not a config; it has no function get_config\.$"),
        (
            "def get_config(): return 1",
            "",
            r"c\.py is not a config; get_config returned int",
        ),
        (
            "import notthere",
            "",
            r"c\.py cannot be imported: No .* 'notthere'",
        ),
        ("a\nroot:x:0:0", "", r"c\.py is not valid Python: line 2: "),
    ],
)
def test_a_file_that_is_not_a_config_is_an_error_that_says_why(
    text, variant, message, tmp_path
):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match=message):
        config_lib.load(f"{tmp_path}/c.py{variant}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no function get_config"),
        (b"get_config = 3", "it has no function get_config"),
        (b"\xff\xfe\x00config", "is not valid Python"),
        (b"x = '\xe9'", "is not valid Python"),
        (b"x = 1\0", "is not valid Python"),
        (b"x = " + 500 * b"(" + 500 * b")", "is not valid Python"),
        (b"def get_config(a, b): ...", "get_config may have one argument"),
        (b"def get_config(*, a): ...", "get_config may have one argument"),
        (b"def get_config(): pass", "get_config returned NoneType"),
        (b"\n1 / 0", "line 2: ZeroDivisionError: division by zero"),
        (b"\ndef get_config():\n  return x", "line 3: NameError: name 'x'"),
        (b"def get_config():\n open('/no/such')", "line 2: FileNotFoundError: "),
        (b"def get_config():\n return get_config()", "line 2: RecursionError"),
        (b"def get_config():\n raise SystemExit(3)", "line 2: The code ends the"),
        (b"import sys\nsys.exit()", "line 2: The code ends the program"),
        (b"import json\n\njson.loads('{')", "line 3: JSONDecodeError: Expecting"),
    ],
)
def test_code_that_fails_is_an_error_with_its_line(content, message, tmp_path):
    (tmp_path / "c.py").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        config_lib.load(tmp_path / "c.py")
    assert f"{tmp_path}/c.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_in_the_package_keeps_its_traceback(tmp_path):
    (tmp_path / "c.py").write_text(
        "from resnet_jax.config import rescaled_ema_decay\n"
        "rescaled_ema_decay(0.5, batch_size=1, every=1, epochs=0)\n"
    )
    with pytest.raises(ZeroDivisionError):
        config_lib.load(tmp_path / "c.py")


def test_the_error_of_a_module_that_a_config_calls_names_both_places(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_of_a_config.py").write_text("def help():\n    {}['lr']\n")
    (tmp_path / "c.py").write_text(
        "import helper_of_a_config\ndef get_config():\n  helper_of_a_config.help()"
    )
    message = r"c\.py, line 3: KeyError: 'lr' \(in .*helper_of_a_config\.py, line 2\)"
    with pytest.raises(UserError, match=message):
        config_lib.load(tmp_path / "c.py")


def test_what_a_config_prints_does_not_mix_with_the_output_of_a_command(
    tmp_path, capsys
):
    (tmp_path / "c.py").write_text(
        "from resnet_jax.config import defaults\n"
        "print('top')\n"
        "def get_config():\n"
        "    print('inside')\n"
        "    return defaults.get_config()\n"
    )
    config_lib.load(tmp_path / "c.py")
    assert capsys.readouterr() == ("", "top\ninside\n")


def test_a_place_that_holds_no_file_is_not_a_config(tmp_path, monkeypatch):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "loop.py").symlink_to("loop.py")
    (tmp_path / "nowhere.py").symlink_to("no_such_file.py")
    for name, message in {
        "folder.py": "is a directory; a config is a Python file",
        "loop.py": "Too many levels of symbolic links",
        "nowhere.py": "There is no config",
        f"{'n' * 300}.py": "File name too long",
        "a\0.py": "embedded null byte",
    }.items():
        with pytest.raises(UserError, match=message):
            config_lib.load(tmp_path / name)
    with pytest.raises(UserError, match=r"file:///x\.py is an address"):
        config_lib.load("file:///x.py")
    with pytest.raises(UserError, match="is empty"):
        config_lib.load("")


def test_a_config_is_found_in_the_home_directory_and_below_a_colon(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "c.py").write_text(
        "from resnet_jax.config import defaults\n"
        "def get_config(variant):\n"
        "    config = defaults.get_config()\n"
        "    config.model.name = variant\n"
        "    return config\n"
    )
    assert config_lib.load("~/a:b/c.py:x.py:y").model.name == "x.py:y"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_docstring_of_every_recipe_has_the_command_that_runs_it(path):
    doc = runpy.run_path(str(path))["__doc__"]
    command = rf"python -m resnet_jax.main --config=configs/({path.stem}.py\S*) --work"
    (named,) = re.findall(command, doc)
    assert named.replace(".py", "") in (*RECIPES, path.stem)


def test_an_unknown_key_is_an_error_that_names_the_nearest():
    config = load("quickstart")
    with pytest.raises(UserError, match=r"Did you mean optim\.learning_rate"):
        config_lib.override(config, ["--config.optim.learnin_rate=1"])


def test_the_decay_rate_of_an_ema_is_rescaled_as_in_torchvision():
    # Eight GPUs with 128 images, every 32 steps, 600 epochs.
    decay = config_lib.rescaled_ema_decay(
        0.99998, batch_size=1024, every=32, epochs=600
    )
    assert 1 - decay == pytest.approx(2e-5 * 8 * 128 * 32 / 600)


def test_a_users_config_may_start_from_a_recipe(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from resnet_jax.config import RECIPES, load\n"
        "def get_config():\n"
        '    config = load(RECIPES / "rsb.py:a2")\n'
        "    config.batch_size = 48\n"
        "    return config\n"
    )
    config = config_lib.load(tmp_path / "mine.py")
    expected = load("rsb:a2")
    expected.batch_size = 48
    assert as_text(config) == as_text(expected)


@pytest.mark.parametrize(
    "line", ["config.optim.learning_rat = 1", 'config["batchsize"] = 8']
)
def test_a_file_that_sets_an_unknown_key_is_an_error_with_the_line(line, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from resnet_jax.config import defaults\n"
        "def get_config():\n"
        "    config = defaults.get_config()\n"
        f"    {line}\n"
        "    return config\n"
    )
    with pytest.raises(
        UserError, match=r"mine\.py, line 4: There is no key '\w+'\. Did you mean"
    ):
        config_lib.load(tmp_path / "mine.py")


def test_the_json_of_a_run_is_not_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is not a config; .* Python"):
        config_lib.load(tmp_path / "config.json")


def test_a_config_file_of_version_0_1_is_an_error_with_the_new_imports(tmp_path):
    (tmp_path / "old.py").write_text("from configs import common\n")
    (tmp_path / "older.py").write_text("import configs.common\n")
    with pytest.raises(UserError, match=r"resnet_jax\.config\.defaults"):
        config_lib.load(tmp_path / "old.py")
    with pytest.raises(UserError, match=r"resnet_jax\.config\.defaults"):
        config_lib.load(tmp_path / "older.py")


def test_recipes_are_found_from_any_directory_and_a_users_file_is_preferred(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("configs/wrn_28_10.py").model.name == "wrn28_10"
    with pytest.raises(UserError, match=r"Did you mean configs/quickstart\.py"):
        config_lib.load("configs/quickstrat.py")
    (tmp_path / "configs").mkdir()
    # Recipes that start from cifar10.py still find the one that they ship with.
    own = (
        "from resnet_jax.config import defaults\n"
        "def get_config(): return defaults.get_config()"
    )
    (tmp_path / "configs" / "cifar10.py").write_text(own)
    own_config = config_lib.load("configs/cifar10.py")
    assert own_config == config_lib.defaults.get_config()
    assert config_lib.load("configs/wrn_28_10.py").model.name == "wrn28_10"
