"""What a study will cost, told before anything is started."""

import time
from collections.abc import Callable
from functools import partial
from heapq import heapreplace
from math import ceil, log2, prod
from timeit import timeit

import numpy as np
import pandas as pd
import torch
from scipy.stats.qmc import Halton
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from modelsim.attacks import frozen, input_gradients, logits
from modelsim.images import check_whole
from modelsim.transfer import ASKED_AGAIN
from modelsim.workers import is_gpu
from modelsim.zoo import count_parameters, fold, naming

_Build = Callable[[str], nn.Module]
_Shape = tuple[int, int, int]

# That a perturbation takes in the store, by the book's study (ε = 18/255).
_BYTES_OF_A_PIXEL = 0.45


def plan(
    build: _Build,
    names: list[str],
    canvas: _Shape,
    *,
    images: int,
    steps: int = 50,
    test_images: int = 0,
    device: str = "cpu",
    seconds: float = 20,
    progress: bool = True,
) -> pd.DataFrame:
    """Foretell what `transfer` will cost, network by network.

    Operations are counted by tracing. Some networks are timed on the device, for some `seconds`; the time of
    the others is foretold from operations and activations, by a power law, at no faster or slower a pace than
    was timed.

    Examples
    --------
    >>> table = plan(at_full_size, list(CATALOGUE), (3, 224, 224), images=5000)
    >>> table[["attack", "evaluations"]].sum() / 3600

    Parameters
    ----------
    build : callable
        Returns an untrained classifier by its name, such as `build` or `at_full_size`.
    names : list of str
        Of all networks of the study.
    canvas : tuple of int
        Channels, height and width of an image.
    images, steps, test_images : int
        Of the study.
    device : str
        `"cpu"` or `"cuda"`.
    seconds : float
        Of calibration.

    Returns
    -------
    DataFrame
        A row a network: `parameters`; the `operations` that one image takes forward, and the bytes of
        `activations` that are kept for its gradient; whether it was `timed`; seconds an image of a pass
        `forward` and of a `gradient`; seconds of its `attack` and of its `evaluations`, of its own images
        and all others'; bytes of its `perturbation` in the store.

    Raises
    ------
    ValueError
        If a network can't be built, or there is no such device.
    """
    check_whole(images=images, steps=steps)
    check_whole(least=0, test_images=test_images)
    if is_gpu(device) and not torch.cuda.is_available():
        raise ValueError("there is no GPU to time the networks on: plan where it is, or with device 'cpu'")
    traced = {n: _traced(build, n, canvas) for n in tqdm(names, "traced", disable=not progress, leave=False)}
    table = pd.DataFrame(traced).T
    table = table.join(_timed(build, table, canvas, device, seconds)).pipe(_foretold)
    # `transfer` asks each once for the clean images, thrice for a few of them, and takes their gradients.
    shown = images * (len(names) + 1) + test_images + 3 * ASKED_AGAIN
    table["attack"] = table.gradient * images * (steps + 1)
    table["evaluations"] = table.forward * shown
    table["perturbation"] = _BYTES_OF_A_PIXEL * images * prod(canvas)
    return table


def _traced(build: _Build, name: str, canvas: _Shape) -> dict[str, float]:
    """Count parameters, and what one image takes: nothing is computed."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with naming(name), torch.device("meta"), frozen(classifier := build(name)) as still:
        with FlopCounterMode(display=False) as flops, saved_tensors_hooks(note, lambda tensor: tensor):
            made = still(torch.zeros(1, *canvas, requires_grad=True))
        weights = {t.untyped_storage()._cdata for t in (*still.parameters(), *still.buffers())}
        activations = sum(size for storage, size in kept.items() if storage not in weights)
        del made  # until here, lest a storage be given the place of another
    parameters = count_parameters(classifier)
    return dict(parameters=parameters, operations=flops.get_total_flops(), activations=activations)


def side_by_side_seconds(table: pd.DataFrame, devices: int) -> float:
    """Return how long several devices take, each of which gets the next source when it is free."""
    busy = [0.0] * devices
    for seconds in table.attack + table.evaluations.mean():  # a source's images are shown to all
        heapreplace(busy, busy[0] + seconds)
    return max(busy)


def _timed(build: _Build, table: pd.DataFrame, canvas: _Shape, device: str, seconds: float) -> pd.DataFrame:
    """Time networks far apart in operations, then those between them, until the time is over."""
    ranked, start = table.operations.sort_values().index, time.perf_counter()
    found: dict[str, dict[str, float]] = {}
    halves = Halton(1, scramble=False).random(2 ** ceil(log2(len(ranked)))).ravel()  # 0, 1/2, 1/4, 3/4, …
    images = torch.rand(100, *canvas, device=device)
    for place in dict.fromkeys((halves * len(ranked)).astype(int)):
        spent = time.perf_counter() - start
        if found and spent * (1 + 1 / len(found)) > seconds:
            break
        classifier = build(name := ranked[place]).eval().to(device)
        found[name] = _seconds_an_image(classifier, images)
    return pd.DataFrame(found).T.assign(timed=True)


def _seconds_an_image(classifier: nn.Module, canvas: Tensor) -> dict[str, float]:
    """Time both passes as `transfer` makes them, of all images or, where that takes long, of eight."""
    folded, labels = fold(classifier, canvas[:8]), torch.zeros(len(canvas), device=canvas.device).long()
    found = {}
    with frozen(folded) as still:
        passes = {
            "forward": lambda n: logits(still, canvas[:n]),
            "gradient": lambda n: input_gradients(still, canvas[:n], labels[:n]).cpu(),
        }
        for kind, once in passes.items():
            once(2)  # so that nothing is timed that is done once only
            few, n = timeit(partial(once, 8), number=1) / 8, len(canvas)
            found[kind] = timeit(partial(once, n), number=1) / n if few * n < 1 else few
    return found


def _foretold(table: pd.DataFrame) -> pd.DataFrame:
    """Fill in the seconds of passes that were not timed: operations, at a pace that depends on sizes."""
    table["timed"] = table.timed.notna()
    sizes = np.log(table[["operations", "activations"]].clip(lower=1))
    for kind in ("forward", "gradient"):
        pace = np.log(table[kind]) - sizes.operations
        # Ridge, since one network or two may be all that was timed.
        fit = Ridge().fit(sizes[table.timed], pace[table.timed])
        # Beyond what was timed a power law soon promises more than the machine can do.
        bounded = fit.predict(sizes).clip(pace.min(), pace.max())
        told = np.exp(bounded + sizes.operations)
        table[kind] = table[kind].fillna(told)
    return table
