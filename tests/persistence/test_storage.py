"""Object stores: what is written can be read, and refusals are explained."""

import functools
import itertools
import json
import pathlib
import pickle
import socket
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from resnet_jax import predict
from resnet_jax.data import sources
from resnet_jax.errors import UserError
from resnet_jax.persistence import metric_writers, storage
from resnet_jax.persistence.lock import Lock, token_of
from resnet_jax.persistence.storage import path_of
from resnet_jax.persistence.workdir import claimed
from resnet_jax.reports import curves
from resnet_jax.reports.samples import SamplePredictions, save_samples
from resnet_jax.weights import load as weights
from resnet_jax.weights.save import save
from tests.helpers import stores
from tests.helpers.checkpoints import (
    TRAIN_METRICS,
    assert_same_bits,
    open_for_writing,
    progress_at,
    random_state,
    shapes_of,
)
from tests.helpers.tfds_datasets import prepare

pytestmark = pytest.mark.slow
STORES = {"s3": stores.s3, "gs": stores.gcs}
_numbers = itertools.count()


@pytest.fixture(params=STORES)
def folder(request):
    """A new folder in each of the object stores."""
    with stores.known(STORES[request.param]()):
        yield path_of(f"{request.param}://bucket/{next(_numbers)}")


def test_local_paths_are_of_pathlib_and_others_of_epath(tmp_path):
    assert type(path_of(str(tmp_path))) is type(tmp_path)
    assert path_of("runs/a:b") == pathlib.Path("runs/a:b")
    assert str(path_of("s3://bucket/a") / "b") == "s3://bucket/a/b"


def test_a_client_that_is_not_installed_is_named_with_the_command_to_install_it(
    monkeypatch,
):
    # An import of a module that is None here fails.
    for client in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, client, None)
    for location, client in (("gs://bucket/run", "gcsfs"), ("s3://bucket/run", "s3fs")):
        match = f"{location} needs the package {client}, .*: pip install {client}$"
        with pytest.raises(UserError, match=match):
            path_of(location)


def test_wrong_locations_are_explained():
    with pytest.raises(UserError, match="only gs:// and s3:// and local paths"):
        path_of("hdfs://node/run")
    with pytest.raises(UserError, match="s3://BUCKET/FOLDER"):
        path_of("s3://")
    with pytest.raises(UserError, match="must be on a file system"):
        storage.local_path_of("gs://bucket/data", "It")


@pytest.mark.parametrize(("interval", "before"), [(60.0, "a\n"), (0.0, "a\nb\n")])
def test_an_object_grows_at_a_flush_and_after_some_seconds(folder, interval, before):
    path = folder / "lines"
    lines = storage.GrowingFile(path, "a\n", interval)
    lines.add("b\n")
    assert path.read_text() == before
    lines.flush()
    assert path.read_text() == "a\nb\n"


def test_a_folder_is_moved_with_all_its_files(folder):
    for name in ("a/b/c", "a/d"):
        (folder / name).write_text(name)
    storage.move_tree(folder / "a", folder / "damaged" / "a")
    moved = {
        str(file.relative_to(folder)): file.read_text()
        for file in storage.files_of(folder)
    }
    assert moved == {"damaged/a/b/c": "a/b/c", "damaged/a/d": "a/d"}
    assert not (folder / "a").exists()


def test_metrics_events_and_the_report_are_written_to_a_store(folder):
    with metric_writers.Writer(folder, step=0, total_steps=9, active=True) as writer:
        for step in (1, 2, 3):
            writer.train(step, TRAIN_METRICS, eta=1.0)
    with metric_writers.Writer(folder, step=2, total_steps=9, active=True) as writer:
        writer.train(3, TRAIN_METRICS | {"loss": 2.0}, eta=1.0)
    rows = [
        (row["step"], row["train/loss"]) for row in metric_writers.read_metrics(folder)
    ]
    assert rows == [(1, 1.0), (2, 1.0), (3, 2.0)]
    # There is one file for each second in which a writer was opened.
    events = [file.stat().length for file in (folder / "tensorboard").iterdir()]
    assert events and min(events) > 100
    samples = SamplePredictions()
    samples.rows.append(
        {"image": np.zeros((8, 8, 3), np.uint8), "label": 0, "predicted": 1}
        | {"probability": 0.5, "right": False}
    )
    save_samples(folder, samples, ("cat", "dog"))
    assert curves.draw(folder).read_bytes().startswith(b"\x89PNG")


def test_checkpoints_are_restored_and_the_last_and_best_are_kept(folder):
    states = {step: random_state(step) for step in (1, 2, 3, 4)}
    with open_for_writing(folder / "checkpoints", keep_last=1) as saved:
        for step, state in states.items():
            saved.save(state, progress_at(step, top1=0.9 if step == 2 else 0.1))
        saved.wait()
        assert saved.steps() == [2, 4]
    with open_for_writing(folder / "checkpoints", keep_last=1) as saved:
        assert saved.best_step() == 2
        state, progress = saved.restore_latest(shapes_of(states[4]))
    assert progress.step == 4
    assert_same_bits(state, states[4])


def test_an_unfinished_checkpoint_is_ignored_and_a_damaged_one_is_moved_away(folder):
    states = {step: random_state(step) for step in (1, 2, 3)}
    with open_for_writing(folder / "checkpoints", keep_last=3) as saved:
        for step, state in states.items():
            saved.save(state, progress_at(step))
    # The first was being written when the run was killed; the second lost an object.
    (folder / "checkpoints" / "3" / "commit_success.txt").unlink()
    (folder / "checkpoints" / "2" / "state" / "manifest.ocdbt").unlink()
    with open_for_writing(folder / "checkpoints", keep_last=3) as saved:
        state, progress = saved.restore_latest(shapes_of(states[1]))
        assert progress.step == 1
        assert_same_bits(state, states[1])
    assert (folder / "damaged" / "2" / "commit_success.txt").exists()


# About a tenth of a second for a second of the real ones.
QUICK = {"heartbeat": 0.1, "dead_after": 3.0, "settle_time": 0.5}


def write_lock(folder: storage.Path) -> None:
    """Writes a lock of a process on another host."""
    owner = {"host": "elsewhere", "pid": 7, "started": 0.0, "token": "another"}
    (folder / "running.json").write_text(json.dumps(owner))


def test_an_object_can_be_read_while_it_is_replaced(folder):
    path, done = folder / "beats", threading.Event()
    contents = [b"a" * 10, b"b" * 2000]
    storage.write(path, contents[0])

    def beat():
        for content in itertools.cycle(contents):
            if done.is_set():
                return
            storage.write(path, content)

    writing = threading.Thread(target=beat)
    writing.start()
    try:
        assert {storage.read(path) for _ in range(100)} == set(contents)
    finally:
        done.set()
        writing.join()


def test_one_run_at_a_time_holds_a_workdir_in_a_store(folder):
    with Lock(folder, **QUICK) as held:
        assert token_of(folder) == held.token
        # A process on another host cannot see whether this one runs.
        with pytest.raises(UserError, match="in use by a run on host"):
            Lock(folder, host="another", **QUICK).__enter__()
    assert not (folder / "running.json").exists()


def test_a_run_in_a_store_is_dead_after_seconds_without_a_heartbeat(folder):
    write_lock(folder)
    before = time.monotonic()
    with Lock(folder, **QUICK) as held:
        assert time.monotonic() - before > QUICK["dead_after"]
        assert token_of(folder) == held.token


@pytest.mark.parametrize("after", ["no run", "a dead run"])
def test_one_of_several_runs_that_start_in_a_store_at_once_continues(folder, after):
    held, refused = [], []
    if after == "a dead run":
        write_lock(folder)

    def run(number: int) -> None:
        lock = Lock(folder, host=f"host {number}", **QUICK)
        try:
            lock.__enter__()
            held.append(lock)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 3)
    assert token_of(folder) == held[0].token
    held[0].__exit__()
    assert list(folder.glob("running.*")) == []


def test_a_run_notices_that_its_workdir_in_a_store_is_gone(folder):
    messages, called = [], threading.Event()

    def stop(message: str) -> None:
        messages.append(message)
        called.set()

    with Lock(folder, **QUICK, on_loss=stop) as held:
        (folder / "config.json").write_text("{}")
        (folder / "running.json").unlink()
        # Only the lock was removed, so it is written again.
        while token_of(folder) != held.token:
            time.sleep(0.1)
        (folder / "config.json").unlink()
        # A heartbeat that is under way may write the lock once more.
        while not called.wait(1.0):
            (folder / "running.json").unlink(missing_ok=True)
    assert "was removed, moved or replaced while this run used it" in messages[0]
    assert not (folder / "running.json").exists()


def test_a_run_whose_workdir_in_a_store_was_taken_over_stops(folder):
    messages, called = [], threading.Event()

    def stop(message: str) -> None:
        messages.append(message)
        called.set()

    with Lock(folder, **QUICK, on_takeover=stop):
        write_lock(folder)
        assert called.wait(60)
    assert "taken over by a run on host elsewhere" in messages[0]
    assert token_of(folder) == "another"


def test_weights_are_written_to_a_store_and_loaded_from_it(folder, tmp_path):
    card, variables = small_weights()
    for name in ("w.safetensors", "w.npz", "weights"):
        save(str(folder / name), variables, card)
        loaded_card, loaded = weights.load(str(folder / name))
        assert loaded_card.network == card.network
        jax.tree.map(np.testing.assert_array_equal, variables, loaded)
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    (folder / "image.png").write_bytes((tmp_path / "image.png").read_bytes())
    picture = str(folder / "picture.png")
    predict.main(["", str(folder / name), str(folder / "image.png"), "--save", picture])
    assert path_of(picture).read_bytes().startswith(b"\x89PNG")


@functools.cache
def small_weights():
    from resnet_jax.models import build, get_spec
    from resnet_jax.weights.card import default_card

    name = "cifar_resnet20"
    spec = get_spec(name, stage_sizes=(1, 1, 1))
    model = build(spec)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3)))
    return default_card(name, spec), jax.tree.map(np.asarray, dict(variables))


def test_missing_weights_in_a_store_are_reported(folder):
    with pytest.raises(UserError, match=f"no file {folder}/none.safetensors"):
        weights.load(str(folder / "none.safetensors"))


def test_a_data_set_in_a_store_is_copied_to_the_host_once(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (folder / "train" / name).write_bytes(content)
    source = sources.open_source(f"folder:{folder}", "train")
    assert (len(source), source.classes) == (3, ("cat", "dog"))
    assert source[2] == (content, 1)
    assert source.root.is_relative_to(tmp_path / "cache")

    files = list(source.root.rglob("*.png"))
    inodes = {file: file.stat().st_ino for file in files}
    (folder / "train" / "dog" / "1.png").write_bytes(content + b"more")
    storage.kept_copy.cache_clear()
    storage.kept_copy(folder, small=0)
    changed = [file for file in files if file.stat().st_ino != inodes[file]]
    assert [file.read_bytes() for file in changed] == [content + b"more"]
    # What is deleted in the store goes, with the folders that it leaves empty.
    (folder / "train" / "cat" / "1.png").unlink()
    (folder / "train" / "dog" / "1.png").unlink()
    unfinished = source.root / "cat" / ".partial-3.png"
    unfinished.touch()
    storage.kept_copy.cache_clear()
    source = sources.open_source(f"folder:{folder}", "train")
    assert (source.paths, source.classes) == (["cat/2.png"], ("cat",))
    assert unfinished.exists()


def test_a_data_set_of_tfds_is_read_from_a_store(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare(tmp_path / "data", "imagenet_v2/topimages", {"test": [7, 3, 7]})
    for file in (tmp_path / "data").rglob("*.*"):
        if file.is_file():
            (folder / file.relative_to(tmp_path / "data")).write_bytes(
                file.read_bytes()
            )
    (prepared,) = (tmp_path / "data" / "imagenet_v2" / "topimages").iterdir()
    expected = sources.open_source(f"tfds:{prepared}", "test")
    directory = folder / "imagenet_v2" / "topimages" / prepared.name
    for source in (
        sources.open_source(f"tfds:{directory}", "test"),
        sources.open_source("tfds:imagenet_v2/topimages", "test", data_dir=str(folder)),
    ):
        assert [source[index] for index in range(3)] == [
            expected[index] for index in range(3)
        ]
        # Workers, which get the source by pickle, do not need the store.
        monkeypatch.setattr(storage, "kept_copy", None)
        assert pickle.loads(pickle.dumps(source))[1] == expected[1]
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_data_set_that_is_missing_or_too_large_is_reported(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"There is no folder {folder}"):
        sources.open_source(f"folder:{folder}", "train")
    (folder / "train" / "cat" / "1.png").write_bytes(b"1234")
    full = storage.shutil.disk_usage(tmp_path)._replace(free=3)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to use"):
        sources.open_source(f"folder:{folder}", "train")


# Errors of the stores, as the clients raise them, are explained with advice.


def refusal(address: str, environment: dict[str, str]) -> str:
    """Returns the error of a run that starts with a workdir in a store."""
    with (
        stores.known(environment),
        pytest.raises(UserError) as raised,
        claimed(path_of(address)),
    ):
        pass
    message = str(raised.value)
    assert address in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("store", STORES)
def test_a_missing_bucket_is_reported(store):
    message = refusal(f"{store}://nobody/run", STORES[store]())
    assert f"not even a bucket {store}://nobody;" in message


def test_missing_credentials_of_s3_are_explained():
    environment = {**stores.s3()}
    del environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    message = refusal("s3://bucket/run", environment)
    assert "no valid credentials" in message and "aws configure" in message


def test_a_missing_permission_at_s3_is_explained():
    with stores.s3_that_asks(allowed="s3:List*") as environment:
        assert "not have the permission" in refusal("s3://bucket/run", environment)


@pytest.mark.parametrize(
    ("status", "answer", "expected"),
    [
        (401, "Anonymous caller does not have storage.objects.get access", "no valid"),
        (
            403,
            "x@y does not have storage.objects.create access",
            "not have the permission",
        ),
    ],
)
def test_a_refusal_of_gcs_is_explained(status, answer, expected):
    with stores.refusing_gcs(status, answer) as environment:
        assert expected in refusal("gs://bucket/run", environment)


def test_a_store_that_does_not_answer_is_reported():
    # The server accepts connections and reads nothing from them.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = "http://{}:{}".format(*silent.getsockname())
        for path, environment in {
            "s3://bucket/run": {**stores.s3(), "AWS_ENDPOINT_URL": address},
            "gs://bucket/run": stores.at_gcs(address),
        }.items():
            with (
                stores.known(environment),
                pytest.raises(UserError, match=f"{path} .* did not answer within 2 s"),
                storage.explaining_errors(path_of(path), timeout=2.0),
            ):
                pass


def test_a_store_that_cannot_be_reached_is_reported():
    # No program listens at port 9, which is that of the discard protocol.
    nothing = {**stores.s3(), "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    assert "does not answer" in refusal("s3://bucket/run", nothing)


def test_weights_images_and_workdirs_that_s3_refuses_are_reported(tmp_path):
    with stores.known(stores.s3()):
        path_of("s3://bucket/secret/w.npz").write_bytes(b"1")
        with stores.s3_that_asks(allowed="iam:*") as environment:
            weights_file, image = "s3://bucket/secret/w.npz", "s3://bucket/secret/i.png"
            with stores.known(environment):
                with pytest.raises(UserError, match=f"{weights_file} cannot be used"):
                    weights.load(weights_file)
                card, variables = small_weights()
                for target in ("s3://bucket/secret/new", "s3://bucket/secret/w.npz"):
                    with pytest.raises(UserError, match=f"{target} cannot be used"):
                        save(target, variables, card)
                with pytest.raises(UserError, match=f"{image} cannot be used"):
                    card.preprocess(image)
                with pytest.raises(UserError, match="s3://bucket/secret cannot be"):
                    curves.draw(path_of("s3://bucket/secret"))


def test_a_checkpoint_that_a_store_does_not_accept_is_reported():
    path = "s3://bucket/refused/checkpoints"
    with stores.known(stores.s3()), open_for_writing(path_of(path)) as saved:
        # The keys were valid when the run started, and no longer are.
        with (
            stores.s3_that_asks(allowed="s3:List*"),
            pytest.raises(UserError, match="step 1 could not be written to") as raised,
        ):
            saved.save(random_state(1), progress_at(1))
            saved.wait()
        assert path in str(raised.value)
        assert "not have the permission" in str(raised.value)


def test_a_checkpoint_that_a_store_does_not_send_is_not_a_damaged_one():
    folder = path_of("s3://bucket/kept")
    with stores.known(stores.s3()):
        with open_for_writing(folder / "checkpoints") as saved:
            saved.save(state := random_state(1), progress_at(1))
            saved.wait()
            with (
                stores.s3_that_asks(allowed="s3:List*"),
                pytest.raises(
                    UserError, match=r"step 1 cannot be read .*the permission"
                ),
            ):
                saved.restore_latest(shapes_of(state))
            assert saved.restore_latest(shapes_of(state))[1].step == 1
        assert not (folder / "damaged").exists()
