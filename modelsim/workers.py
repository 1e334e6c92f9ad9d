"""Work side by side: one function for many indices, in processes of this computer or on a cluster."""

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from distributed import Client

Function = Callable[[Any, int], None]

_SECONDS_TO_WAIT = 60
"""How long a scheduler may take to offer the first worker."""


def side_by_side(
    function: Function,
    shared: object,
    indices: Sequence[int],
    *,
    workers: int,
    scheduler: str | None,
    done: Callable[[int], None],
) -> None:
    """Call `function(shared, index)` for every index on several workers, and `done(index)` after each.

    `shared` is sent once to every worker. An exception of one call is raised here, and the calls that
    haven't finished by then are given up.

    Parameters
    ----------
    workers : int
        Processes to start on this computer, which share torch's threads.
    scheduler : str, optional
        Address of a running Dask scheduler, such as `"tcp://10.0.0.1:8786"`, whose workers, with
        torch's threads as they are there, are used instead.

    Raises
    ------
    TypeError
        If `shared` can't be pickled.
    ValueError
        If a worker of the scheduler has several threads.
    RuntimeError
        If a script calls this outside `if __name__ == "__main__":`, which its own processes import.
    OSError
        If there is no scheduler at the address, it has no worker, or a worker died.
    """
    # Imported here because it takes a second, which work in one process needn't wait for.
    from distributed import KilledWorker, as_completed

    _check_picklable(shared)
    threads = None if scheduler else max(1, torch.get_num_threads() // workers)
    with _connected(workers, scheduler) as client:
        sent = client.scatter(shared, broadcast=True, hash=False)
        calls = {client.submit(_call, function, sent, index, threads, pure=False): index for index in indices}
        try:
            for call in as_completed(calls, loop=client.loop):
                call.result()
                done(calls[call])
        except (KilledWorker, CancelledError) as error:
            raise ChildProcessError(f"a worker died, perhaps of too little memory: {error}") from error
        finally:
            client.cancel(list(calls))


def _call(function: Function, shared: object, index: int, threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    function(shared, index)


def _check_picklable(shared: object) -> None:
    from distributed.protocol import pickle

    try:
        pickle.dumps(shared)
    except Exception as error:  # whatever an object's own way of pickling raises
        raise TypeError(
            "with several workers the zoo and the attack are sent to other processes, and one of them "
            f"can't be pickled ({error}): load the models by functions at the top level of a module, "
            "or use one worker"
        ) from error


@contextmanager
def _connected(workers: int, scheduler: str | None) -> "Iterator[Client]":
    """Connect to a scheduler, or to one of our own with as many processes as `workers`."""
    from distributed import Client, LocalCluster

    if scheduler:
        with Client(scheduler, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=_SECONDS_TO_WAIT)
            _check_threads(client)
            yield client
        return
    # What goes wrong in a call is raised in this process; there is no need to log it as well.
    with (
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
                f"worker {address} has {threads} threads: start it with `dask worker --nthreads 1` "
                "(and --nworkers for several)"
            )


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
