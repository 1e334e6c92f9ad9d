"""Work side by side: one function for many items, here, in processes of this computer or on a cluster."""

import logging
import os
import pickle
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from modelsim.images import check_whole

if TYPE_CHECKING:
    from distributed import Client, Future, LocalCluster

_Function = Callable[[Any, Any], Any]

_SECONDS_TO_WAIT = 60  # how long a scheduler may take to offer the first worker

# Of Dask, for our own processes.
_SETTINGS = {
    # Dask's defaults have every tensor mapped and unmapped anew: three times slower.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 2**30,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 2**30,
    # Long enough to start all workers anew, even from a slow disk.
    "distributed.scheduler.no-workers-timeout": "5 minutes",
    # What all share is large, and sent once.
    "distributed.admin.large-graph-warning-threshold": "1 PB",
}


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


def check_workers(workers: int, scheduler: str | None, device: str = "cpu") -> None:
    """Raise unless the work is for at least one process of our own, with a GPU if asked, or a scheduler's."""
    check_whole(workers=workers)
    if workers == 1:
        return
    if scheduler:
        raise ValueError(f"give workers={workers} or scheduler={scheduler!r}, not both")
    if is_gpu(device) and workers > (n := torch.cuda.device_count()):
        raise ValueError(f"{workers} workers for {n} GPUs: give at most one a GPU")
    if is_gpu(device) and find_spec("dask_cuda") is None:
        what = f"{workers} workers on GPUs need dask-cuda, which is for Linux"
        raise ValueError(f"{what}: pip install 'modelsim[gpu]', or give one worker")


def is_gpu(device: str) -> bool:
    """Tell whether a device, such as `"cuda:0"`, is a GPU."""
    return torch.device(device).type == "cuda"


def side_by_side(
    function: _Function,
    shared: object,
    items: Sequence[Any],
    done: _Function,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    device: str = "cpu",
) -> None:
    """Call `function(shared, item)` for every item, and `done(item, result)` here after each.

    One worker is this process, and works in the order of the items. Others get `shared` once. An
    exception of one call is raised here, and the calls that haven't finished by then are given up.
    A worker that dies loses only the call that it was in, which is begun anew elsewhere.

    Parameters
    ----------
    workers : int
        If there are several: processes to start on this computer, which share torch's threads.
    scheduler : str, optional
        Address of a running Dask scheduler, such as `"tcp://10.0.0.1:8786"`, whose workers, with
        torch's threads as they are there, are used instead.
    device : str
        If it is `"cuda"`, each of several processes here sees one GPU, its own.

    Raises
    ------
    TypeError
        If `shared` can't be pickled.
    ValueError
        If `workers` is less than 1 or given beside `scheduler`, a worker of the scheduler has several
        threads, or several workers for GPUs are more than these or lack dask-cuda.
    RuntimeError
        If a script calls this outside `if __name__ == "__main__":`, which its own processes import.
    ChildProcessError
        If every worker that took an item died of it: the message names the item, and all others are done.
    OSError
        If there is no scheduler at the address, it goes away, or it has no worker.
    """
    check_workers(workers, scheduler, device)
    if not items or (workers == 1 and not scheduler):
        for item in items:
            done(item, function(shared, item))
        return
    packed = _packed(shared)
    threads = None if scheduler else max(1, torch.get_num_threads() // workers)
    with _connected(workers, scheduler, device) as client:
        # Made by a call, it is made again when the workers that have it are dead.
        sent = client.submit(_Shared, packed, pure=False)
        # Of Dask, if a worker dies at that: the calls ask for it themselves.
        with suppress(AssertionError, ValueError):
            client.replicate([sent])
        finish = partial(_finish, client, partial(_call, function, threads), sent, done=done)
        # Where a worker died, what only waited there is under suspicion as well, until it is tried alone.
        killers = [item for suspect in finish(items) for item in finish([suspect])]
    if killers:
        what = "every worker that took it died, perhaps of too little memory. All others are finished"
        raise ChildProcessError(f"{', '.join(map(str, killers))}: {what}")


class _Shared:
    """What all calls share, sent on from worker to worker as it came, whatever a call does with it."""

    def __init__(self, packed: bytes) -> None:
        self.packed = packed

    def __reduce__(self) -> tuple[type, tuple[bytes]]:
        return _Shared, (self.packed,)

    @cached_property
    def content(self) -> Any:
        return pickle.loads(self.packed)


def _call(function: _Function, threads: int | None, shared: _Shared, item: Any) -> Any:
    if threads is not None:
        torch.set_num_threads(threads)
    return function(shared.content, item)


def _finish(
    client: "Client", call: _Function, sent: "Future[_Shared]", items: Sequence[Any], *, done: _Function
) -> list[Any]:
    """Call for each item, and `done` here; return those whose workers died time and again."""
    from distributed import KilledWorker, as_completed
    from distributed.scheduler import NoWorkerError

    calls = {client.submit(call, sent, item, pure=False): item for item in items}
    suspects: list[Any] = []
    try:
        for future in as_completed(calls, loop=client.loop):
            try:
                result = future.result()
            except KilledWorker:
                suspects.append(calls[future])
            else:
                done(calls[future], result)
    except (CancelledError, NoWorkerError) as error:
        raise ConnectionError(f"lost the scheduler or its workers: start the same again ({error})") from error
    finally:
        client.cancel(list(calls))
    return suspects


def _packed(shared: object) -> bytes:
    from distributed.protocol.pickle import dumps

    try:
        return dumps(shared)
    except Exception as error:  # whatever an object's own way of pickling raises
        raise TypeError(
            "with several workers what is worked on is sent to other processes, and a part of it "
            f"can't be pickled ({error}): load models by functions at the top level of a module, "
            "or use one worker"
        ) from error


@contextmanager
def _connected(workers: int, scheduler: str | None, device: str) -> "Iterator[Client]":
    """Connect to a scheduler, or to one of our own with as many processes as `workers`."""
    import dask
    from distributed import Client

    with dask.config.set(_SETTINGS):
        if scheduler:
            with Client(scheduler, set_as_default=False) as client:
                client.wait_for_workers(1, timeout=_SECONDS_TO_WAIT)
                _check_threads(client)
                yield client
            return
        # A terminal sends Ctrl-C to the workers too: this process alone ends them.
        with _interrupts_held():
            started = _cluster(workers, device)
        with started as cluster, Client(cluster, set_as_default=False) as client:
            client.register_worker_callbacks(_ignore_interrupt)
            yield client


def _cluster(workers: int, device: str) -> "LocalCluster":
    """Start processes of our own, each with a GPU of its own if it works on one."""
    from distributed import LocalCluster

    options: dict[str, Any] = dict(
        n_workers=workers,
        threads_per_worker=1,
        memory_limit=None,
        # Any free port: the usual one is taken where another scheduler runs.
        dashboard_address="127.0.0.1:0",
        # A call whose worker died is given to one more, and then under suspicion.
        scheduler_kwargs={"dashboard": False, "allowed_failures": 1},
        # What goes wrong in a call is raised in this process; there is no need to log it as well.
        silence_logs=logging.CRITICAL,
    )
    if is_gpu(device):
        from dask_cuda import LocalCUDACluster

        return LocalCUDACluster(device_memory_limit=None, **options)
    return LocalCluster(**options)


def _check_threads(client: "Client") -> None:
    """Refuse workers that would run several calls in one process, at once on the same objects."""
    for address, threads in client.nthreads().items():
        if threads != 1:
            raise ValueError(
                f"worker {address} has {threads} threads: start it with `dask worker --nthreads 1`"
            )


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Have threads and processes that are started here, and what they start later, take no interrupt."""
    if sys.platform == "win32":  # which has no masks of signals
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
