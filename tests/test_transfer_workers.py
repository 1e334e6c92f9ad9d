"""Several processes or a cluster finish the sources of a study."""

import os
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import dask
import processes
import pytest
import tiny
import torch
from distributed import LocalCluster
from tiny import files
from torch import nn

import modelsim as ms
from modelsim.study import Store
from modelsim.transfer import Engine, _finish_source, _versions, _Work
from modelsim.workers import side_by_side

TESTED = dict(test_images=tiny.image_set(30, seed=1))


class Kept(nn.Module):
    """A network of our own, which does something else as soon as it is attacked."""

    def __init__(self, under_attack):
        super().__init__()
        self.under_attack = under_attack

    def forward(self, images):
        return images.flatten(1)[:, :3] * (self.under_attack() if images.requires_grad else 1)


def not_a_number():
    return torch.nan


def finished(out):
    return {path.name for path in (Path(out) / "study.zarr" / "finished").glob("c.*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The finished study of one process, with test images."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.transfer(folder, **TESTED)
    return folder


@pytest.fixture(scope="module")
def address():
    with processes.cluster() as one:
        yield one.scheduler_address


def test_two_processes_extend_a_study_to_the_bytes_of_one_without_a_word(whole, tmp_path, capfd):
    zoo = ms.Zoo(list(tiny.zoo()), lambda name: tiny.zoo()[name])
    tiny.transfer(tmp_path, zoo={"second": zoo["second"]})
    study = tiny.transfer(tmp_path, zoo=zoo, workers=2, **TESTED)
    assert files(tmp_path) == files(whole)
    assert study.identical(ms.open_study(whole))
    assert capfd.readouterr() == ("", "")


def test_study_begun_by_one_process_is_finished_by_a_cluster(whole, address, tmp_path, capfd):
    out = Path(shutil.copytree(whole, tmp_path / "begun"))
    for chunk in ("finished/c.1", "perturbation/c.1.0.0.0.0"):
        (out / "study.zarr" / chunk).unlink()
    kept = out / "study.zarr" / "adversarial_prediction" / "c.0.0.0"
    before = kept.stat().st_mtime_ns
    study = tiny.transfer(out, progress=True, scheduler=address, **TESTED)
    assert files(out) == files(whole)
    assert kept.stat().st_mtime_ns == before
    assert "second: 100%" in capfd.readouterr().err
    assert tiny.transfer(out, scheduler=address, **TESTED).identical(study)


@pytest.mark.filterwarnings("ignore:model")
def test_attack_and_models_may_be_defined_where_they_are_used(address, tmp_path):
    def inner(classifier, images, labels, *, eps=0.1):
        return (images + eps).clamp(max=1)

    class Inner(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :3]

    given = dict(zoo={"inner": Inner(), "other": tiny.linear(1)}, attack=partial(inner, eps=0.2))
    study = tiny.transfer(tmp_path / "afar", scheduler=address, **given)
    assert study.identical(tiny.transfer(tmp_path / "here", **given))


def test_error_of_a_source_is_raised_as_by_one_process_and_others_are_kept(address, tmp_path):
    zoo = {"first": tiny.linear(1), "breaking": Kept(not_a_number)}
    with pytest.raises(ValueError, match=r"model 'breaking': .*NaN logits for 5 of 5 images"):
        tiny.transfer(tmp_path, zoo=zoo, scheduler=address)
    assert finished(tmp_path) == {"c.0"}


def test_folder_that_a_worker_cannot_see_is_named(address, tmp_path):
    store = Store(tmp_path / "study.zarr", {"versions": _versions()})
    elsewhere = _Work(store, Engine(tiny.zoo(), tiny.image_set(), tiny.attack, 5, "cpu"), None)
    with pytest.raises(FileNotFoundError, match=r"a worker finds no .*study\.zarr: give an `out` on a disk"):
        side_by_side(_finish_source, elsewhere, ["first"], print, scheduler=address)


def test_worker_with_another_environment_is_refused(address, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["modelsim.study"], "version", lambda package: f"{package} of tomorrow")
    with pytest.raises(ValueError, match=r"a worker has .* of tomorrow.*: give all workers one environment"):
        tiny.transfer(tmp_path, scheduler=address)


def test_worker_of_several_threads_is_refused(tmp_path):
    inside = dict(processes=False, protocol="tcp", dashboard_address="127.0.0.1:0")
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, **inside) as threaded,
        pytest.raises(ValueError, match="has 2 threads: start it with `dask worker --nthreads 1`"),
    ):
        tiny.transfer(tmp_path, scheduler=threaded.scheduler_address)


def test_shared_object_is_unpickled_once_a_worker(address, tmp_path):
    found = []
    given = dict(done=lambda *done: found.append(done), scheduler=address)
    side_by_side(lambda shared, _: id(shared), tmp_path, range(5), **given)
    assert sorted(item for item, _ in found) == list(range(5))
    assert len({made for _, made in found}) == 1


def test_interruption_gives_up_what_has_not_begun(address):
    def interrupt(index, result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(lambda seconds, _: time.sleep(seconds), 0.2, range(50), interrupt, scheduler=address)
    start = time.monotonic()
    side_by_side(lambda *_: None, None, [0], lambda *_: None, scheduler=address)
    assert time.monotonic() - start < 5


def test_what_cannot_be_sent_is_refused_in_one_line(tmp_path):
    unsendable = Kept(threading.Lock())
    with pytest.raises(TypeError, match=r"a part of it can't be pickled \(.*lock.*\): load models by"):
        tiny.transfer(tmp_path, zoo={"unsendable": unsendable}, workers=2)


def test_address_without_a_scheduler_is_an_error_of_the_system(tmp_path):
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(OSError, match=r"127\.0\.0\.1:9"),
    ):
        tiny.transfer(tmp_path, scheduler="tcp://127.0.0.1:9")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups to interrupt")
def test_interrupted_run_of_two_processes_says_so_once_and_leaves_nothing_running(whole, tmp_path):
    out, errors = tmp_path / "ended", tmp_path / "errors"
    os.mkfifo(errors)
    run = processes.start(processes.transfer_in_a_terminal, str(out), str(errors), **TESTED)
    with errors.open() as pipe:
        processes.wait_for(lambda: finished(out) or run.exitcode is not None)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        said = pipe.read()  # until the last process that holds the pipe is gone
    assert processes.end(run) == 1
    assert said.count("Traceback") == 1
    assert said.endswith("KeyboardInterrupt\n")
    tiny.transfer(out, **TESTED)
    assert files(out) == files(whole)


def test_source_whose_workers_die_is_reported(address, tmp_path):
    with pytest.raises(OSError, match=r"^dying: every worker that took it died, perhaps of too"):
        tiny.transfer(tmp_path, zoo={"dying": Kept(partial(os._exit, 1))}, scheduler=address)
    assert finished(tmp_path) == set()
