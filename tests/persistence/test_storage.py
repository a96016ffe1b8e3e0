"""What is written to an object store is there, and what it refuses is told."""

import functools
import itertools
import json
import pathlib
import pickle
import socket
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from resnet_jax import predict
from resnet_jax.data import sources
from resnet_jax.errors import UserError
from resnet_jax.parallel import processes
from resnet_jax.persistence import storage, workdir, writers
from resnet_jax.persistence.storage import path_of
from resnet_jax.persistence.workdir import Lock, claimed
from resnet_jax.reports import curves
from resnet_jax.reports.samples import SamplePredictions, save_samples
from resnet_jax.weights import load as weights
from resnet_jax.weights.save import save
from tests.helpers import stores
from tests.helpers.tfds_datasets import prepare
from tests.persistence.test_checkpoints import (
    assert_equal,
    like,
    open_at,
    progress_at,
    state_of,
)
from tests.persistence.test_writers import VALUES

pytestmark = pytest.mark.slow
STORES = {"s3": stores.s3, "gs": stores.gcs}
_numbers = itertools.count()


@pytest.fixture(params=STORES)
def folder(request):
    """A new folder of each object store."""
    with stores.known(STORES[request.param]()):
        yield path_of(f"{request.param}://bucket/{next(_numbers)}")


def test_only_paths_of_object_stores_are_not_those_of_pathlib(tmp_path):
    assert type(path_of(str(tmp_path))) is type(tmp_path)
    assert path_of("runs/a:b") == pathlib.Path("runs/a:b")
    assert str(path_of("s3://bucket/a") / "b") == "s3://bucket/a/b"


def test_a_client_that_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda _: None)
    for where, client in (("gs://bucket/run", "gcsfs"), ("s3://bucket/run", "s3fs")):
        match = f"{where} needs the package {client}, .*: pip install {client}$"
        with pytest.raises(UserError, match=match):
            path_of(where)


def test_paths_that_lead_nowhere_are_told():
    with pytest.raises(UserError, match="gs:// and s3:// are"):
        path_of("hdfs://node/run")
    with pytest.raises(UserError, match="s3://BUCKET/FOLDER"):
        path_of("s3://")
    with pytest.raises(UserError, match="must be on a file system"):
        storage.local_path_of("gs://bucket/data", "It")


@pytest.mark.parametrize(("every", "before"), [(60.0, "a\n"), (0.0, "a\nb\n")])
def test_an_object_grows_at_a_flush_and_after_some_seconds(folder, every, before):
    path = folder / "lines"
    lines = storage.GrowingFile(path, "a\n", every)
    lines.add("b\n")
    assert path.read_text() == before
    lines.flush()
    assert path.read_text() == "a\nb\n"


def test_a_folder_is_moved_and_removed_with_all_that_is_in_it(folder):
    for name in ("a/b/c", "a/d"):
        (folder / name).write_text(name)
    storage.move_tree(folder / "a", folder / "damaged" / "a")
    moved = {
        str(file.relative_to(folder)): file.read_text()
        for file in storage.files_of(folder)
    }
    assert moved == {"damaged/a/b/c": "a/b/c", "damaged/a/d": "a/d"}
    storage.remove_tree(folder)
    assert not folder.exists()


def test_a_run_writes_its_rows_events_and_report(folder):
    with writers.Writer(folder, step=0, total_steps=9, active=True) as writer:
        for step in (1, 2, 3):
            writer.train(step, VALUES, eta=1.0)
    with writers.Writer(folder, step=2, total_steps=9, active=True) as writer:
        writer.train(3, VALUES | {"loss": 2.0}, eta=1.0)
    rows = [(row["step"], row["train/loss"]) for row in writers.read_metrics(folder)]
    assert rows == [(1, 1.0), (2, 1.0), (3, 2.0)]
    # A file for each second in which one was begun.
    events = [file.stat().length for file in (folder / "tensorboard").iterdir()]
    assert events and min(events) > 100
    samples = SamplePredictions()
    samples.rows.append(
        {"image": np.zeros((8, 8, 3), np.uint8), "label": 0, "predicted": 1}
        | {"probability": 0.5, "right": False}
    )
    save_samples(folder, samples, ("cat", "dog"))
    assert curves.draw(folder).read_bytes().startswith(b"\x89PNG")


def test_checkpoints_come_back_and_the_last_and_best_are_kept(folder):
    states = {step: state_of(step) for step in (1, 2, 3, 4)}
    with open_at(folder / "checkpoints", keep_last=1) as saved:
        for step, state in states.items():
            saved.save(state, progress_at(step, top1=0.9 if step == 2 else 0.1))
        saved.wait()
        assert saved.steps() == [2, 4]
    with open_at(folder / "checkpoints", keep_last=1) as saved:
        assert saved.best_step() == 2
        state, progress = saved.restore_latest(like(states[4], devices=1))
    assert progress.step == 4
    assert_equal(state, states[4])


def test_a_checkpoint_that_was_cut_off_does_not_count_and_a_damaged_one_goes(folder):
    states = {step: state_of(step) for step in (1, 2, 3)}
    with open_at(folder / "checkpoints", keep_last=3) as saved:
        for step, state in states.items():
            saved.save(state, progress_at(step))
    # Killed while it was written; the other lost an object.
    (folder / "checkpoints" / "3" / "commit_success.txt").unlink()
    (folder / "checkpoints" / "2" / "state" / "manifest.ocdbt").unlink()
    with open_at(folder / "checkpoints", keep_last=3) as saved:
        state, progress = saved.restore_latest(like(states[1], devices=1))
        assert progress.step == 1
        assert_equal(state, states[1])
    assert (folder / "damaged" / "2" / "commit_success.txt").exists()


@pytest.fixture
def quick(monkeypatch):
    """A tenth of a second for one of a second, about."""
    monkeypatch.setattr(workdir, "BEAT", 0.1)
    monkeypatch.setattr(workdir, "DEAD", 3.0)
    monkeypatch.setattr(workdir, "SETTLED", 0.5)


def theirs(folder: storage.Path, **changes) -> None:
    """Writes a lock of a process of another host, or as `changes` say."""
    owner = {"host": "elsewhere", "pid": 7, "started": 0.0, "token": "theirs"}
    (folder / "running.json").write_text(json.dumps(owner | changes))


def test_an_object_that_is_written_anew_can_be_read_meanwhile(folder):
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


def test_a_workdir_of_a_store_is_one_runs(folder, quick, monkeypatch):
    with Lock(folder) as held:
        assert workdir.token_of(folder) == held.token
        # As on another host, where no process can be looked at.
        monkeypatch.setattr(workdir.socket, "gethostname", lambda: "another")
        with pytest.raises(UserError, match="in use by a run on host"):
            Lock(folder).__enter__()
    assert not (folder / "running.json").exists()


def test_a_run_of_a_store_that_gave_no_sign_of_life_is_dead(folder, quick):
    theirs(folder)
    before = time.monotonic()
    with Lock(folder) as held:
        assert time.monotonic() - before > workdir.DEAD
        assert workdir.token_of(folder) == held.token


def test_of_runs_that_begin_in_a_store_at_once_one_goes_on(folder, quick, monkeypatch):
    monkeypatch.setattr(workdir, "_is_running", lambda owner: True)
    held, refused = [], []

    def run():
        lock = Lock(folder)
        try:
            lock.__enter__()
            held.append(lock)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 3)
    assert workdir.token_of(folder) == held[0].token
    held[0].__exit__()


def test_a_run_stops_whose_workdir_in_a_store_was_taken(folder, quick, monkeypatch):
    said = []
    monkeypatch.setattr(processes, "end_all", lambda text: said.append(text))
    with Lock(folder):
        theirs(folder)
        deadline = time.monotonic() + 5
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "taken over by a run on host elsewhere" in said[0]
    assert workdir.token_of(folder) == "theirs"


def test_weights_are_written_to_a_store_and_read_from_it(folder, tmp_path):
    card, variables = small_weights()
    for name in ("w.safetensors", "w.npz", "weights"):
        save(str(folder / name), variables, card)
        found, read = weights.load(str(folder / name))
        assert found.network == card.network
        jax.tree.map(np.testing.assert_array_equal, variables, read)
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    (folder / "image.png").write_bytes((tmp_path / "image.png").read_bytes())
    drawn = str(folder / "drawn.png")
    predict.main(["", str(folder / name), str(folder / "image.png"), "--save", drawn])
    assert path_of(drawn).read_bytes().startswith(b"\x89PNG")


@functools.cache
def small_weights():
    from resnet_jax.models import build, get_spec
    from resnet_jax.weights.card import default_card

    name = "cifar_resnet20"
    spec = get_spec(name, stage_sizes=(1, 1, 1))
    model = build(spec)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3)))
    return default_card(name, spec), jax.tree.map(np.asarray, dict(variables))


def test_weights_that_are_not_in_a_store_are_told(folder):
    with pytest.raises(UserError, match=f"no file {folder}/none.safetensors"):
        weights.load(str(folder / "none.safetensors"))


def test_a_data_set_of_a_store_is_copied_once_to_the_host(
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

    fetched = []
    download = storage._download
    monkeypatch.setattr(
        storage, "_download", lambda *pair: (fetched.append(pair[0]), download(*pair))
    )
    monkeypatch.setattr(storage, "SMALL", 0)
    (folder / "train" / "dog" / "1.png").write_bytes(content + b"more")
    storage.kept_copy.cache_clear()
    assert sources.open_source(f"folder:{folder}", "train")[2][0] == content + b"more"
    assert [path.name for path in fetched] == ["1.png"]


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
        # Workers, which get it by pickle, need no way to the store.
        monkeypatch.setattr(storage, "kept_copy", None)
        assert pickle.loads(pickle.dumps(source))[1] == expected[1]
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_data_set_that_is_not_in_a_store_or_too_large_is_told(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"There is no folder {folder}"):
        sources.open_source(f"folder:{folder}", "train")
    (folder / "train" / "cat" / "1.png").write_bytes(b"1234")
    full = storage.shutil.disk_usage(tmp_path)._replace(free=3)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match="XDG_CACHE_HOME says where else"):
        sources.open_source(f"folder:{folder}", "train")


# What the store says, as its clients tell it, and what helps.


def refusal(where: str, environment: dict[str, str]) -> str:
    """What a run is told that is to begin at a path."""
    with (
        stores.known(environment),
        pytest.raises(UserError) as told,
        claimed(path_of(where)),
    ):
        pass
    message = str(told.value)
    assert where in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("store", STORES)
def test_a_bucket_that_is_not_there_is_told(store):
    told = refusal(f"{store}://nobody/run", STORES[store]())
    assert f"not even a bucket {store}://nobody;" in told


def test_missing_credentials_of_s3_are_told():
    environment = {**stores.s3()}
    del environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    told = refusal("s3://bucket/run", environment)
    assert "no valid credentials" in told and "aws configure" in told


def test_what_s3_does_not_allow_is_told():
    with stores.s3_that_asks(allowed="s3:List*") as environment:
        assert "not allowed" in refusal("s3://bucket/run", environment)


@pytest.mark.parametrize(
    ("status", "said", "told"),
    [
        (401, "Anonymous caller does not have storage.objects.get access", "no valid"),
        (403, "x@y does not have storage.objects.create access", "not allowed"),
    ],
)
def test_what_gcs_refuses_is_told(status, said, told):
    with stores.refusing_gcs(status, said) as environment:
        assert told in refusal("gs://bucket/run", environment)


def test_a_store_that_does_not_answer_is_told(monkeypatch):
    monkeypatch.setattr(storage, "ANSWERS_WITHIN", 2.0)
    # It takes connections, and nothing from them.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = "http://{}:{}".format(*silent.getsockname())
        for where, environment in {
            "s3://bucket/run": {**stores.s3(), "AWS_ENDPOINT_URL": address},
            "gs://bucket/run": stores.at_gcs(address),
        }.items():
            assert "did not answer within 2 s" in refusal(where, environment)


def test_a_store_that_nothing_leads_to_is_told():
    # Nothing listens at the port for bytes to be discarded.
    nothing = {**stores.s3(), "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    assert "does not answer" in refusal("s3://bucket/run", nothing)


def test_weights_and_images_that_s3_does_not_give_are_told(tmp_path):
    with stores.known(stores.s3()):
        path_of("s3://bucket/secret/w.npz").write_bytes(b"1")
        with stores.s3_that_asks(allowed="iam:*") as environment:
            weights_file, image = "s3://bucket/secret/w.npz", "s3://bucket/secret/i.png"
            with stores.known(environment):
                with pytest.raises(UserError, match=f"{weights_file} cannot be used"):
                    weights.load(weights_file)
                card, _ = small_weights()
                with pytest.raises(UserError, match=f"{image} cannot be used"):
                    card.preprocess(image)
                with pytest.raises(UserError, match="s3://bucket/secret cannot be"):
                    curves.draw(path_of("s3://bucket/secret"))


def test_a_checkpoint_that_a_store_refuses_is_told():
    path = "s3://bucket/refused/checkpoints"
    with stores.known(stores.s3()), open_at(path_of(path)) as saved:
        # Keys that were good when the run began.
        with (
            stores.s3_that_asks(allowed="s3:List*"),
            pytest.raises(UserError, match="step 1 could not be written to") as told,
        ):
            saved.save(state_of(1), progress_at(1))
            saved.wait()
        assert path in str(told.value)
        assert "not allowed" in str(told.value)


def test_a_checkpoint_that_a_store_does_not_give_is_not_a_damaged_one():
    folder = path_of("s3://bucket/kept")
    with stores.known(stores.s3()):
        with open_at(folder / "checkpoints") as saved:
            saved.save(state := state_of(1), progress_at(1))
            saved.wait()
            with (
                stores.s3_that_asks(allowed="s3:List*"),
                pytest.raises(UserError, match=r"step 1 cannot be read .*not allowed"),
            ):
                saved.restore_latest(like(state, devices=1))
            assert saved.restore_latest(like(state, devices=1))[1].step == 1
        assert not (folder / "damaged").exists()
