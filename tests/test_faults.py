"""Workers, clients and schedulers that are killed in mid-attack: what they lose is made again, the same."""

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial

import dask
import processes
import psutil
import pytest
import tiny
from distributed.protocol.pickle import dumps
from distributed.scheduler import Scheduler

import modelsim as ms
from modelsim.training import train_side_by_side
from modelsim.workers import side_by_side

NAMES = ("first", "second", "third")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no SIGKILL")


class Marked(tiny.Odd):
    """A network that notes each step of attacks on it, and kills the first processes at their second."""

    def __init__(self, notes, seed, *, kills=0, seconds=0):
        super().__init__(inside=tiny.linear(seed))
        self.notes, self.kills, self.seconds = notes, kills, seconds

    def forward(self, x):
        if x.requires_grad:
            with self.notes.open("a") as notes:
                notes.write(f"{os.getpid()}\n")
            time.sleep(self.seconds)
            steps = self.notes.read_text().split()
            if steps.count(str(os.getpid())) == 2 and len(set(steps)) <= self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def transfer(folder, kills=(0, 0, 0), *, seconds=0, **changed):
    """Make a study of three networks; what is noted of their attacks begins anew."""
    marked = {name: Marked(folder / name, seed) for seed, name in enumerate(NAMES)}
    for network, times in zip(marked.values(), kills, strict=True):
        network.notes.unlink(missing_ok=True)
        network.kills, network.seconds = times, seconds
    return tiny.transfer(folder / "study", zoo=marked, **changed)


def steps(folder):
    return [len((folder / name).read_text().split()) for name in NAMES]


def dead(folder, name):
    """How many processes have begun to attack a network, but for the last."""
    return len(set((folder / name).read_text().split())) - 1


def at_work(folder):
    """The processes that have begun to attack a network, dead ones among them."""
    notes = [folder / name for name in NAMES]
    return {pid for note in notes if note.exists() for pid in note.read_text().split()}


def finished(folder):
    return {path.name for path in (folder / "study" / "study.zarr" / "finished").glob("c.*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The study of one process, and what that notes."""
    folder = tmp_path_factory.mktemp("whole")
    transfer(folder)
    return folder


@pytest.fixture(autouse=True)
def forking():
    with processes.forking():
        yield


@pytest.fixture(scope="module")
def address():
    with processes.cluster() as one:
        yield one.scheduler_address


def test_killed_worker_loses_only_the_source_it_was_at(whole, tmp_path):
    study = transfer(tmp_path, (0, 1, 0), workers=2)
    assert tiny.files(tmp_path / "study") == tiny.files(whole / "study")
    assert study.identical(ms.open_study(whole / "study"))
    first, second, third = steps(whole)
    assert steps(tmp_path) == [first, second + 2, third]
    assert dead(tmp_path, "second") == 1


def test_death_of_all_workers_and_what_they_hold_is_survived(whole, address, tmp_path):
    transfer(tmp_path, (1, 1, 1), scheduler=address)
    assert tiny.files(tmp_path / "study") == tiny.files(whole / "study")
    assert [dead(tmp_path, name) for name in NAMES] == [1, 1, 1]


@pytest.mark.parametrize("where", ["here", "cluster"])
def test_source_that_kills_every_worker_is_named_and_all_others_are_finished(where, whole, address, tmp_path):
    given = dict(workers=2) if where == "here" else dict(scheduler=address)
    with pytest.raises(ChildProcessError, match=r"^first: every worker that took it died"):
        transfer(tmp_path, (99, 0, 0), **given)
    assert finished(tmp_path) == {"c.1", "c.2"}
    assert dead(tmp_path, "first") == 3  # and the last one
    assert steps(tmp_path)[1:] == steps(whole)[1:]
    transfer(tmp_path, **given)
    assert tiny.files(tmp_path / "study") == tiny.files(whole / "study")


def test_client_killed_and_started_again_makes_the_same(whole, address, tmp_path):
    run = processes.start(transfer, tmp_path, seconds=0.1, scheduler=address)
    processes.wait_for(lambda: (tmp_path / "second").exists() or run.exitcode is not None)
    run.kill()
    assert processes.end(run) == -signal.SIGKILL
    assert finished(tmp_path) < {"c.0", "c.1", "c.2"}
    transfer(tmp_path, scheduler=address)
    assert tiny.files(tmp_path / "study") == tiny.files(whole / "study")


def test_scheduler_killed_is_an_error_and_another_one_makes_the_same(whole, tmp_path):
    note = tmp_path / "address"
    one = processes.start(processes.serve, note)
    processes.wait_for(lambda: note.exists() or one.exitcode is not None)
    run = processes.start(expect_no_scheduler, tmp_path, seconds=0.1, scheduler=note.read_text())
    processes.wait_for(lambda: (tmp_path / "second").exists() or run.exitcode is not None)
    one.kill()
    assert processes.end(one) == -signal.SIGKILL
    start = time.monotonic()
    assert processes.end(run) == 0
    assert time.monotonic() - start < 30
    transfer(tmp_path, workers=2)
    assert tiny.files(tmp_path / "study") == tiny.files(whole / "study")


def expect_no_scheduler(folder, **options):
    with pytest.raises(ConnectionError, match="lost the scheduler or its workers: start the same again"):
        transfer(folder, **options)


def test_interruption_after_a_death_is_said_once_and_leaves_nothing_running(tmp_path):
    # Long enough for a worker to be started anew while the other is at its source.
    zoo = {name: Marked(tmp_path / name, 0, kills=name == "first", seconds=2) for name in NAMES}
    errors = tmp_path / "errors"
    os.mkfifo(errors)
    given = dict(zoo=zoo, device="cpu")
    run = processes.start(processes.transfer_in_a_terminal, str(tmp_path / "study"), str(errors), **given)
    with errors.open() as pipe:
        processes.wait_for(lambda: len(at_work(tmp_path)) == 3 or run.exitcode is not None)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        start = time.monotonic()
        said = pipe.read()  # until the last process that holds the pipe is gone
    assert processes.end(run) == 1
    assert time.monotonic() - start < 30
    assert said.count("Traceback") == 1
    assert said.endswith("KeyboardInterrupt\n")


def die_once(folder, _):
    """Kill the first process that does this; all others take long."""
    if not (note := folder / "dead").exists():
        note.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(processes.SECONDS)


def side_by_side_in_a_terminal(folder, errors):
    processes.as_in_a_terminal(errors)
    dask.config.set({"distributed.worker.multiprocessing-method": "spawn"})
    side_by_side(die_once, folder, [0, 1], print, workers=2)


def is_started_anew(folder, run):
    """Tell whether there is a process that is to take the place of the dead one."""
    if not (note := folder / "dead").exists() or not note.read_text():
        return False
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(run.pid).children(recursive=True)
        workers = [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]
        return len(workers) == 2 and int(note.read_text()) not in workers
    return False


def test_interruption_while_a_worker_is_started_anew_is_said_once(tmp_path):
    errors = tmp_path / "errors"
    os.mkfifo(errors)
    run = processes.start(side_by_side_in_a_terminal, tmp_path, errors)
    with errors.open() as pipe:
        processes.wait_for(lambda: is_started_anew(tmp_path, run) or run.exitcode is not None)
        time.sleep(0.3)  # in which it gets as far as to import
        os.killpg(run.pid, signal.SIGINT)
        said = pipe.read()
    assert processes.end(run) == 1
    assert said.count("Traceback") == 1
    assert said.endswith("KeyboardInterrupt\n")


def test_worker_that_dies_as_it_hands_on_what_all_share_is_no_end_of_the_run(monkeypatch):
    copied, dead = Scheduler.gather_on_worker, []

    async def dying(scheduler, address, who_has):
        if not dead:
            dead.extend(*who_has.values())
            end = {"op": "run", "function": dumps(os._exit), "args": dumps((1,))}
            await scheduler.broadcast(msg=end, workers=dead, on_error="ignore")
            while dead[0] in scheduler.workers:
                await asyncio.sleep(0.01)
            return {*who_has}
        return await copied(scheduler, address, who_has)

    monkeypatch.setattr(Scheduler, "gather_on_worker", dying)
    found = {}
    side_by_side(lambda shared, item: shared + item, 10, range(4), found.__setitem__, workers=2)
    assert len(dead) == 1
    assert found == {item: 10 + item for item in range(4)}


def train(folder, name):
    """Train a network whose name says how it goes."""
    (folder / f"{name} {os.getpid()}").touch()
    if name == "killing" or (name == "killed" and len(list(folder.glob("killed *"))) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "diverging":
        raise FloatingPointError("loss is nan")
    return name.upper()


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["killing"], ChildProcessError, "^killing: every worker that took it died"),
        (["diverging"], FloatingPointError, "^diverging: loss is nan. The 3 others are trained"),
        (["killing", "diverging"], ChildProcessError, "^diverging: loss is nan; killing: every worker"),
    ],
)
def test_training_that_kills_or_diverges_is_named_and_all_others_are_stored(names, error, message, tmp_path):
    stored, work = {}, partial(train, tmp_path)
    items = [*names, "killed", "one", "other"]
    with pytest.raises(error, match=message):
        train_side_by_side(work, items, stored.__setitem__, workers=2, scheduler=None)
    assert stored == {name: name.upper() for name in ("killed", "one", "other")}
    assert len(list(tmp_path.glob("killed *"))) > 1


FAKE = """
from distributed import LocalCluster

class LocalCUDACluster(LocalCluster):
    def __init__(self, *, n_workers, device_memory_limit, **options):
        super().__init__(n_workers=0, **options)
        self.scale(n_workers)
        self.sync(self._correct_state)

    def new_worker_spec(self):
        gpu = len(self.worker_spec)
        env = {"CUDA_VISIBLE_DEVICES": str(gpu)}
        return {gpu: self.new_spec | {"options": self.new_spec["options"] | {"env": env}}}
"""


def seen(_, item):
    time.sleep(0.5)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_each_of_several_workers_for_gpus_is_one_of_dask_cuda(tmp_path, monkeypatch):
    (tmp_path / "dask_cuda.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found = {}
    side_by_side(seen, None, range(4), found.__setitem__, workers=2, device="cuda:0")
    assert set(found.values()) == {"0", "1"}


@pytest.mark.parametrize(
    ("workers", "message"),
    [(3, "3 workers for 2 GPUs: give at most one a GPU"), (2, r"pip install 'modelsim\[gpu\]', or give one")],
)
def test_workers_without_gpus_or_dask_cuda_are_refused_before_anything_is_written(
    workers, message, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with pytest.raises(ValueError, match=message):
        tiny.transfer(tmp_path / "study", device="cuda", workers=workers)
    assert not (tmp_path / "study").exists()
