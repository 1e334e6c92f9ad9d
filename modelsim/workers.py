"""Work side by side: one function for many items, here, in processes of this computer or on a cluster."""

import logging
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from modelsim.images import check_whole

if TYPE_CHECKING:
    from distributed import Client

_SECONDS_TO_WAIT = 60
"""How long a scheduler may take to offer the first worker."""

_ENVIRONMENT = {
    f"distributed.nanny.pre-spawn-environ.MALLOC_{what}_THRESHOLD_": 2**30 for what in ("TRIM", "MMAP")
}
"""Of our own processes. Dask's default has every tensor mapped and unmapped anew: three times slower."""


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for writing, and make it if it isn't there.

    Raises
    ------
    BlockingIOError
        If another run holds it: the message names process and host.
    OSError
        If it can't be made or written.
    """
    lock, note = FileLock(folder / ".writer.lock", timeout=0), folder / ".writer.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        holder = note.read_text() if note.exists() else "another process"
        raise BlockingIOError(
            f"{folder} is being written by {holder}: wait until it is finished, or choose another folder"
        ) from error
    except OSError as error:
        hint = "it is a file, give a folder" if folder.is_file() else error
        raise OSError(f"can't write to {folder}: {hint}") from error
    try:
        note.write_text(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%F %T %z')}")
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def check_workers(workers: int, scheduler: str | None) -> None:
    """Raise unless the work is for at least one process of our own, or for a scheduler's."""
    check_whole(workers=workers)
    if workers > 1 and scheduler:
        raise ValueError(f"give workers={workers} or scheduler={scheduler!r}, not both")


def side_by_side(
    function: Callable[[Any, Any], Any],
    shared: object,
    items: Sequence[Any],
    done: Callable[[Any, Any], None],
    *,
    workers: int = 1,
    scheduler: str | None = None,
) -> None:
    """Call `function(shared, item)` for every item, and `done(item, result)` here after each.

    One worker is this process, and works in the order of the items. Others get `shared` once. An
    exception of one call is raised here, and the calls that haven't finished by then are given up.

    Parameters
    ----------
    workers : int
        If there are several: processes to start on this computer, which share torch's threads.
    scheduler : str, optional
        Address of a running Dask scheduler, such as `"tcp://10.0.0.1:8786"`, whose workers, with
        torch's threads as they are there, are used instead.

    Raises
    ------
    TypeError
        If `shared` can't be pickled.
    ValueError
        If `workers` is less than 1 or given beside `scheduler`, or a worker of the scheduler has
        several threads.
    RuntimeError
        If a script calls this outside `if __name__ == "__main__":`, which its own processes import.
    OSError
        If there is no scheduler at the address, it has no worker, or a worker died.
    """
    check_workers(workers, scheduler)
    if not items or (workers == 1 and not scheduler):
        for item in items:
            done(item, function(shared, item))
        return
    # Imported here because it takes a second, which work in one process needn't wait for.
    from distributed import KilledWorker, as_completed

    _check_picklable(shared)
    threads = None if scheduler else max(1, torch.get_num_threads() // workers)
    with _connected(workers, scheduler) as client:
        sent = client.scatter(shared, broadcast=True, hash=False)
        calls = {client.submit(_call, function, sent, item, threads, pure=False): item for item in items}
        try:
            for call in as_completed(calls, loop=client.loop):
                done(calls[call], call.result())
        except (KilledWorker, CancelledError) as error:
            raise ChildProcessError(f"a worker died, perhaps of too little memory: {error}") from error
        finally:
            client.cancel(list(calls))


def _call(function: Callable[[Any, Any], Any], shared: object, item: Any, threads: int | None) -> Any:
    if threads is not None:
        torch.set_num_threads(threads)
    return function(shared, item)


def _check_picklable(shared: object) -> None:
    from distributed.protocol import pickle

    try:
        pickle.dumps(shared)
    except Exception as error:  # whatever an object's own way of pickling raises
        raise TypeError(
            "with several workers what is worked on is sent to other processes, and a part of it "
            f"can't be pickled ({error}): load models by functions at the top level of a module, "
            "or use one worker"
        ) from error


@contextmanager
def _connected(workers: int, scheduler: str | None) -> "Iterator[Client]":
    """Connect to a scheduler, or to one of our own with as many processes as `workers`."""
    import dask
    from distributed import Client, LocalCluster

    if scheduler:
        with Client(scheduler, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=_SECONDS_TO_WAIT)
            _check_threads(client)
            yield client
        return
    # What goes wrong in a call is raised in this process; there is no need to log it as well.
    with (
        dask.config.set(_ENVIRONMENT),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=None,
            # Any free port: the usual one is taken where another scheduler runs.
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False, "allowed_failures": 0},
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        # A terminal sends Ctrl-C to the workers too: this process alone ends them.
        client.run(_ignore_interrupt)
        yield client


def _check_threads(client: "Client") -> None:
    """Refuse workers that would run several calls in one process, at once on the same objects."""
    for address, threads in client.nthreads().items():
        if threads != 1:
            raise ValueError(
                f"worker {address} has {threads} threads: start it with `dask worker --nthreads 1`"
            )


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
