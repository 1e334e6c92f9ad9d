import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import dask
import pytest
import tiny
import torch
from distributed import LocalCluster
from torch import nn

import modelsim as ms
from modelsim.study import Store
from modelsim.transfer import Engine, _finish_source, _versions, _Work
from modelsim.workers import side_by_side


def write_identity(folder, index):
    (folder / str(index)).write_text(str(id(folder)))


def ignore(index, result):
    pass


def sleep(seconds, index):
    time.sleep(seconds)


SLOW = """
import signal
import tiny
if __name__ == "__main__":
    # As in a terminal: what a shell starts in the background inherits an interrupt that is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tiny.transfer({out!r}, test_images=tiny.image_set(30, seed=1), workers=2)
"""


class BreakingUnderAttack(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :3] * (torch.nan if images.requires_grad else 1)


class Dying(nn.Module):
    def forward(self, images):
        if images.requires_grad:
            os._exit(1)
        return images.flatten(1)[:, :3]


class Unsendable(nn.Module):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, images):
        return images.flatten(1)[:, :3]


def load(name):
    return tiny.zoo()[name]


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def finished(out):
    return {path.name for path in (Path(out) / "study.zarr" / "finished").glob("c.*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The finished study of one process, with test images."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.transfer(folder, test_images=tiny.image_set(30, seed=1))
    return folder


@pytest.fixture(scope="module")
def cluster():
    """One process, started once, since that takes seconds."""
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        memory_limit=None,
        dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"allowed_failures": 0},
    ) as one:
        yield one


def test_two_processes_write_the_same_bytes_as_one_without_a_word(whole, tmp_path, capfd):
    zoo = ms.Zoo(list(tiny.zoo()), load)
    study = tiny.transfer(tmp_path, zoo=zoo, test_images=tiny.image_set(30, seed=1), workers=2)
    assert files(tmp_path) == files(whole)
    assert study.identical(ms.open_study(whole))
    assert capfd.readouterr() == ("", "")


def test_study_begun_by_one_process_is_finished_by_a_cluster(whole, cluster, tmp_path, capfd):
    out = Path(shutil.copytree(whole, tmp_path / "begun"))
    for chunk in ("finished/c.1", "perturbation/c.1.0.0.0.0"):
        (out / "study.zarr" / chunk).unlink()
    kept = out / "study.zarr" / "adversarial_prediction" / "c.0.0.0"
    before = kept.stat().st_mtime_ns
    given = dict(test_images=tiny.image_set(30, seed=1), scheduler=cluster.scheduler_address)
    tiny.transfer(out, progress=True, **given)
    assert files(out) == files(whole)
    assert kept.stat().st_mtime_ns == before
    assert "second: 100%" in capfd.readouterr().err
    assert tiny.transfer(out, **given).identical(ms.open_study(whole))


@pytest.mark.filterwarnings("ignore:model")
def test_attack_and_models_may_be_defined_where_they_are_used(cluster, tmp_path):
    def inner(classifier, images, labels, *, eps=0.1):
        return (images + eps).clamp(max=1)

    class Inner(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :3]

    given = dict(zoo={"inner": Inner(), "other": tiny.linear(1)}, attack=partial(inner, eps=0.2))
    study = tiny.transfer(tmp_path / "afar", scheduler=cluster.scheduler_address, **given)
    assert study.identical(tiny.transfer(tmp_path / "here", **given))


def test_error_of_a_source_is_raised_as_by_one_process_and_others_are_kept(cluster, tmp_path, capfd):
    zoo = {"first": tiny.linear(1), "breaking": BreakingUnderAttack()}
    with pytest.raises(ValueError, match=r"model 'breaking': .*NaN logits for 5 of 5 images"):
        tiny.transfer(tmp_path, zoo=zoo, scheduler=cluster.scheduler_address)
    assert finished(tmp_path) == {"c.0"}


def test_folder_that_a_worker_cannot_see_is_named(cluster, tmp_path):
    store = Store(tmp_path / "study.zarr", {"versions": _versions()})
    engine = Engine(tiny.zoo(), tiny.image_set(), tiny.attack, 5, "cpu")
    elsewhere = _Work(store, engine, None)
    with pytest.raises(FileNotFoundError, match=r"a worker finds no .*study\.zarr: give an `out` on a disk"):
        side_by_side(_finish_source, elsewhere, ["first"], print, scheduler=cluster.scheduler_address)


def test_worker_with_another_environment_is_refused(cluster, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["modelsim.transfer"], "version", lambda package: f"{package} of tomorrow")
    with pytest.raises(ValueError, match=r"a worker has .* of tomorrow.*: give all workers one environment"):
        tiny.transfer(tmp_path, scheduler=cluster.scheduler_address)


def test_worker_of_several_threads_is_refused(tmp_path):
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            protocol="tcp",
            dashboard_address="127.0.0.1:0",
        ) as threaded,
        pytest.raises(ValueError, match="has 2 threads: start it with `dask worker --nthreads 1`"),
    ):
        tiny.transfer(tmp_path, scheduler=threaded.scheduler_address)


def test_shared_object_is_unpickled_once_a_worker(cluster, tmp_path):
    side_by_side(write_identity, tmp_path, range(5), ignore, scheduler=cluster.scheduler_address)
    assert len({path.read_text() for path in tmp_path.iterdir()}) == 1


def test_interruption_gives_up_what_has_not_begun(cluster, tmp_path):
    def interrupt(index, result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(sleep, 0.2, range(50), interrupt, scheduler=cluster.scheduler_address)
    start = time.monotonic()
    side_by_side(sleep, 0, [0], ignore, scheduler=cluster.scheduler_address)
    assert time.monotonic() - start < 5


def test_what_cannot_be_sent_is_refused_in_one_line(tmp_path):
    with pytest.raises(TypeError, match=r"a part of it can't be pickled \(.*lock.*\): load models by"):
        tiny.transfer(tmp_path, zoo={"unsendable": Unsendable()}, workers=2)


def test_address_without_a_scheduler_is_an_error_of_the_system(tmp_path, capfd):
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(OSError, match=r"127\.0\.0\.1:9"),
    ):
        tiny.transfer(tmp_path, scheduler="tcp://127.0.0.1:9")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"workers": 2, "scheduler": "tcp://x"}, "give workers=2 or scheduler='tcp://x', not both"),
    ],
)
def test_workers_that_make_no_sense_are_refused_and_nothing_written(given, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny.transfer(tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups to interrupt")
def test_interrupted_run_of_two_processes_says_so_once_and_leaves_nothing_running(whole, tmp_path):
    out, script = tmp_path / "ended", tmp_path / "script.py"
    script.write_text(SLOW.format(out=str(out)))
    environment = os.environ | {"TINY_SLEEP": "0.5", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.Popen(
        [sys.executable, script], env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not finished(out) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    # The pipe is at its end when the last process that holds it is gone.
    _, errors = run.communicate(timeout=120)
    assert errors.count("Traceback") == 1
    assert errors.endswith("KeyboardInterrupt\n")
    assert {"c.0", "c.1"} & finished(out)
    tiny.transfer(out, test_images=tiny.image_set(30, seed=1))
    assert files(out) == files(whole)


def test_worker_that_dies_is_reported(cluster, tmp_path):
    with pytest.raises(OSError, match="a worker died, perhaps of too little memory"):
        tiny.transfer(tmp_path, zoo={"dying": Dying()}, scheduler=cluster.scheduler_address)
    assert finished(tmp_path) == set()
