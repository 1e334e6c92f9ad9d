"""Runs in processes of their own, which can be killed, and which wait where a test wants them to."""

import os
import resource
import signal
import time
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest.mock import patch

import dask
import tiny
import torch
from distributed import LocalCluster
from torch import nn
from torch.nn.utils import skip_init

import modelsim as ms
from modelsim.transfer import Engine

SECONDS = 120
"""After which a test gives up waiting, on a machine that is busy with other things."""

# One process imports torch; those that are started are its forks, which takes no time.
_context = get_context("forkserver")
_context.set_forkserver_preload(["processes", "distributed"])
_FORKING = {"distributed.worker.multiprocessing-method": "forkserver"}

_attacked = 0


def start(function, *args, **options):
    """Call a function in another process."""
    _start_server()
    process = _context.Process(target=function, args=args, kwargs=options)
    process.start()
    return process


def _start_server():
    if forkserver._forkserver._forkserver_pid is None:
        folders = Path(__file__).parent, Path(ms.__file__).parents[1]
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, folders))):
            forkserver.ensure_running()


def end(process):
    """Wait for the end of a process; return its exit code."""
    process.join(SECONDS)
    assert process.exitcode is not None, "a run does not end"
    return process.exitcode


def wait_for(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what is waited for does not come"
        time.sleep(0.005)


class Pause:
    """Where, in a run, a process is to wait until it is told to go on."""

    def __init__(self, folder, phase):
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True)
        for left in self.folder.iterdir():
            left.unlink()
        (self.folder / "wait").write_text(phase)

    def until_reached(self, process=None):
        wait_for(lambda: (self.folder / "here").exists() or (process and process.exitcode is not None))
        assert (self.folder / "here").exists(), "the run ended before it came there"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        (self.folder / "go").touch()


def _pause(folder, phase):
    wait = Path(folder) / "wait"
    if wait.exists() and wait.read_text() == phase:
        wait.unlink()
        (wait.parent / "here").touch()
        wait_for((wait.parent / "go").exists)
        (wait.parent / "gone").touch()


def attack(classifier, images, labels, *, eps=0.1, steps=2, step_size=0.05, seed=0, pauses=""):
    """PGD, not too fast, that may be told to wait: at `"attack 2"` before this process's second source."""
    global _attacked
    _pause(pauses, f"attack {_attacked + 1}")
    time.sleep(0.03)
    changed = ms.pgd(classifier, images, labels, eps=eps, steps=steps, step_size=step_size, seed=seed)
    _attacked += 1
    return changed


class Waiting(tiny.Odd):
    """A network that may be told to wait: at `"evaluate 0"` before anything has been attacked."""

    def __init__(self, pauses):
        super().__init__()
        self.pauses = str(pauses)

    def forward(self, x):
        if not torch.is_grad_enabled():
            _pause(self.pauses, f"evaluate {_attacked}")
        return super().forward(x)


def begin():
    """Count the attacks of this process from here."""
    global _attacked
    _attacked = 0


def options(names="ab", *, pauses):
    """Of the study of some of `"m"`, `"a"` and `"b"`, one batch a source."""
    networks = {"m": tiny.convolutional(3), "a": Waiting(pauses), "b": tiny.mlp(2)}
    zoo = {name: networks[name] for name in names}
    return dict(zoo=zoo, attack=partial(attack, pauses=str(pauses)), batch_size=12)


def transfer(out, names="ab", *, pauses, **changed):
    begin()
    return tiny.transfer(out, **(options(names, pauses=pauses) | changed))


def transfer_or_be_refused(out, names, answer, *, pauses):
    """Note in the file `answer` whether it was done or who holds the folder; anything else is an error."""
    try:
        transfer(out, names, pauses=pauses)
    except BlockingIOError as error:
        Path(answer).write_text(str(error))
    else:
        Path(answer).write_text("done")


def killed(out, phase, *, pauses, **changed):
    """Start a run and kill it where it waits; the pause is over when the caller says so."""
    pause = Pause(pauses, phase)
    run = start(transfer, out, pauses=pauses, **changed)
    pause.until_reached(run)
    os.kill(run.pid, signal.SIGKILL)
    assert end(run) == -signal.SIGKILL
    return pause


def transfer_by_forks(out, names, *, is_tested, **changed):
    """Run a study whose own workers, if there are several, are forks as this process is one."""
    test_images = tiny.image_set(30, seed=1) if is_tested else None
    with patch.object(forkserver._forkserver, "ensure_running", lambda: None), dask.config.set(_FORKING):
        transfer(out, names, test_images=test_images, **changed)
    os._exit(0)  # without taking down what was imported, so that most of its life is the run


def as_in_a_terminal(errors):
    """Make this process a group of its own, with its workers in it; what they say goes to a pipe."""
    os.setsid()
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def transfer_in_a_terminal(out, errors, **options):
    """Run a study as in a terminal."""
    as_in_a_terminal(errors)
    with dask.config.set(_FORKING), patch.dict(os.environ, TINY_SLEEP="0.2"):
        tiny.transfer(out, workers=2, **options)


def _large(name):
    torch.manual_seed(int(name))
    network = skip_init(nn.Linear, 5000, 5000, bias=False)  # whose own way to draw weights takes longer
    network.weight.data.uniform_(-1, 1)
    return nn.Sequential(nn.Flatten(), network, nn.Linear(5000, 2))


def note_memory(answer, n):
    """Show the images made on one of `n` large networks to all, with room for one; note the MB of it."""
    x, names = torch.rand(2, 1, 50, 100), [*map(str, range(n))]
    images = ms.ImageSet(x, torch.arange(2), ["a", "b"], ["x", "y"], "noise")
    engine = Engine(ms.Zoo(names, _large), images, ms.fgsm, 2, "cpu", network_memory=0.15)
    shown = engine.adversarial(engine.perturbation("1"))
    for name in names:
        engine.predictions(name, shown)
    answer.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10))


@contextmanager
def forking():
    """Make all processes that Dask starts forks as well."""
    _start_server()
    with dask.config.set(_FORKING):
        yield


@contextmanager
def cluster():
    """One worker, a fork as well, for what would take seconds to start anew each time."""
    settings = dict(n_workers=1, threads_per_worker=1, memory_limit=None, dashboard_address="127.0.0.1:0")
    with (
        forking(),
        LocalCluster(scheduler_kwargs={"allowed_failures": 1}, **settings) as one,
    ):
        one.wait_for_workers(1)
        yield one


def serve(note):
    """Run a cluster until it is killed; its address goes to a file."""
    forkserver._forkserver.ensure_running = lambda: None
    with patch(f"{__name__}._start_server"), cluster() as one:
        partly = Path(f"{note}.part")
        partly.write_text(one.scheduler_address)
        partly.rename(note)
        time.sleep(SECONDS)
