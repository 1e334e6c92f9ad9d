"""Runs in processes of their own, which can be killed, and which wait where a test wants them to."""

import os
import time
from functools import partial
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest.mock import patch

import dask
import tiny
import torch
from torch import nn

import modelsim as ms

SECONDS = 120
"""After which a test gives up waiting, on a machine that is busy with other things."""

# One process imports torch; those that are started are its forks, which takes no time.
_context = get_context("forkserver")
_context.set_forkserver_preload(["processes", "distributed"])

_attacked = 0


def start(function, *args, **options):
    """Call a function in another process."""
    if forkserver._forkserver._forkserver_pid is None:
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), _package()])):
            forkserver.ensure_running()
    process = _context.Process(target=function, args=args, kwargs=options)
    process.start()
    return process


def _package():
    return str(Path(ms.__file__).parents[1])


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
        return self

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


class Waiting(nn.Module):
    """A network that may be told to wait: at `"evaluate 0"` before anything has been attacked."""

    def __init__(self, inside, pauses):
        super().__init__()
        self.inside, self.pauses = inside, str(pauses)

    def forward(self, x):
        if not torch.is_grad_enabled():
            _pause(self.pauses, f"evaluate {_attacked}")
        return self.inside(x)


def zoo(names, pauses):
    networks = {"m": tiny.convolutional(3), "a": Waiting(tiny.linear(1), pauses), "b": tiny.mlp(2)}
    return {name: networks[name] for name in names}


def begin():
    """Count the attacks of this process from here."""
    global _attacked
    _attacked = 0


def transfer(out, names="ab", *, pauses, **changed):
    """Run the study of some of `"m"`, `"a"` and `"b"`, one batch a source."""
    begin()
    given = dict(attack=partial(attack, pauses=str(pauses)), batch_size=12)
    return tiny.transfer(out, zoo=zoo(names, pauses), **(given | changed))


def transfer_or_be_refused(out, names, answer, *, pauses, **changed):
    """Note in the file `answer` whether it was done or who holds the folder; anything else is an error."""
    try:
        transfer(out, names, pauses=pauses, **changed)
    except BlockingIOError as error:
        Path(answer).write_text(str(error))
    else:
        Path(answer).write_text("done")


def transfer_by_forks(out, names, *, pauses, workers, is_tested, **changed):
    """Run a study whose own workers, if there are several, are forks as this process is one."""
    test_images = tiny.image_set(30, seed=1) if is_tested else None
    with (
        patch.object(forkserver._forkserver, "ensure_running", lambda: None),
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
    ):
        transfer(out, names, pauses=pauses, workers=workers, test_images=test_images, **changed)
    os._exit(0)  # without taking down what was imported, so that most of its life is the run


def files(folder):
    """Everything of a study in a folder, but not the locks beside it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    }
