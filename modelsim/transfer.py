"""The engine: attack each source once, show the result to every target, and keep all predictions."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import count
from math import isfinite
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from modelsim import __version__, attacks
from modelsim import study as studies
from modelsim.attacks import checked_logits, frozen, input_gradients, logits, pgd
from modelsim.images import ImageSet, check_images, check_number, check_strings, check_whole
from modelsim.study import Change, Classes
from modelsim.workers import check_workers, is_gpu, side_by_side, sole_writer
from modelsim.zoo import CANVAS_RULE, fingerprint, naming
from modelsim.zoo import fold as fold_classifier

Attack = Callable[..., Tensor]
Precision = Literal["fp32", "tf32", "bf16"]

ASKED_AGAIN = 60
"""Images on which a network must tell the same in batches of other sizes and other company."""

_UNSTEADY = 0.02  # share of their answers that may differ, by rounding
_ENOUGH = 500  # images on which an accuracy is known well enough to stop a run


@dataclass(eq=False)
class Engine:
    """Networks as they are attacked and asked: by name, on the device, and folded if that is set.

    What goes wrong in a network is raised with its name.
    """

    zoo: Mapping[str, nn.Module]
    images: ImageSet
    attack: Attack
    batch_size: int
    device: str
    fold: bool = True
    network_memory: float = 2
    """GiB of this computer's memory; see `transfer`."""
    precision: Precision = "fp32"
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of the networks that have been loaded."""
    _kept: dict[str, nn.Module] = field(default_factory=dict)
    # Bytes that are left for networks, by the device where they are kept.
    _room: dict[str, float] = field(default_factory=dict)
    # The network asked for last, on the device.
    _last: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number(least=0, network_memory=self.network_memory)
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be fp32, tf32 or bf16, got {self.precision!r}")

    def __getstate__(self) -> dict[str, Any]:
        """Send no network that can be loaded again."""
        return self.__dict__ | {"_kept": {}, "_room": {}, "_last": {}}

    def network(self, name: str) -> nn.Module:
        """Load a network, or find it on the device or in memory, where networks stay while there is room."""
        if name not in self._last:
            self._last.clear()  # before another takes its memory
            kept = self._kept.get(name)
            self._last[name] = self._loaded(name) if kept is None else _on_device(kept, self.device)
        return self._last[name]

    def _keep(self, name: str, network: nn.Module) -> nn.Module:
        """Keep a network on the device, else in memory, else not at all; return it."""
        self._room = self._room or _room(self.device, self.network_memory)
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(network))
        if place := next((place for place in self._room if size <= self._room[place]), None):
            self._room[place] -= size
            self._kept[name] = _on_device(network, place)
        return network

    def _loaded(self, name: str) -> nn.Module:
        """Load a network, check it, and prepare it."""
        loaded = self.zoo[name]
        with self._at_work(name), frozen(loaded) as network:
            if self.fingerprints.setdefault(name, found := fingerprint(network)) != found:
                raise ValueError("the zoo gives another network each time that it is asked for it")
            network = _on_device(network, self.device)
            few = self.images[:8].images.to(self.device)
            with torch.no_grad():
                told = checked_logits(network, few)
            if (told >= 0).all() and torch.allclose(told.sum(1), torch.ones_like(told[:, 0]), atol=1e-4):
                raise ValueError("it returns probabilities instead of logits: leave out its softmax")
            network = fold_classifier(network, few) if self.fold else network
        return self._keep(name, _InBfloat16(network) if self.precision == "bf16" else network)

    @contextmanager
    def _at_work(self, name: str) -> Iterator[None]:
        """Have errors name the network, and a GPU multiply matrices as the precision says, for a while."""
        cudnn: Any = torch.backends.cudnn
        with naming(name), ExitStack() as after:
            for setting in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn):
                after.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
                setting.fp32_precision = "tf32" if self.precision == "tf32" else "ieee"
            yield

    def perturbation(self, name: str, attacked: Callable[[], object] = int) -> Change:
        """Attack a network batch by batch; return the change of every pixel, rounded to whole 255ths.

        `attacked` is called after every batch.
        """
        change, network = np.empty(self.images.pixels.shape, np.int8), self.network(name)
        for start in range(0, len(self.images), self.batch_size):
            with self._at_work(name), frozen(network) as still:
                part = self.images[start : start + self.batch_size]
                made = studies.to_8_bit(self._attacked(still, part, start)).short() - studies.to_8_bit(
                    part.pixels
                )
                if (most := int(made.abs().max())) > 127:
                    raise ValueError(
                        f"a perturbation of {most}/255 doesn't fit the store's 127/255: return the images in "
                        "their order, changed by less than half of the canvas"
                    )
            change[start : start + self.batch_size] = made
            attacked()
        return change

    def _attacked(self, network: nn.Module, part: ImageSet, start: int) -> Tensor:
        settings = attack_settings(self.attack)
        seed, eps = settings.get("seed"), settings.get("eps")
        advanced = {} if seed is None else {"seed": seed + start}
        x, y = part.images.to(self.device), part.labels.to(self.device)
        try:
            made = self.attack(network, x.clone(), y, **advanced)
        except RuntimeError as error:
            if "require grad" not in str(error):
                raise
            what = f"the attack {_function(self.attack).__qualname__} takes no gradient by the images"
            raise ValueError(f"{what} ({error}): begin it with images.requires_grad_()") from error
        plain = made.detach().cpu() if isinstance(made, Tensor) else made
        check_images(plain, what="what the attack returns", advice="end it with .float().clamp(0, 1)")
        if plain.shape != x.shape:
            raise ValueError(f"the attack turned {tuple(x.shape)} into {tuple(plain.shape)}")
        # No pixel changes by more than the change as a whole, whatever the norm in which that is at most eps.
        most = float((plain - part.images).abs().max())
        if isinstance(eps, int | float) and most > eps + 1e-5:
            raise ValueError(f"the attack changes a pixel by {most:.4g}, more than its eps={eps:.4g}")
        return plain

    def logits(self, name: str, canvas: Tensor, *, batch_size: int = 100) -> Tensor:
        """Return the logits (image, class) of a network, which must have the classes of the images."""
        network = self.network(name)
        with self._at_work(name):
            found = logits(network, canvas, batch_size=batch_size, device=self.device)
            if found.shape[1] != (n := len(self.images.classes)):
                raise ValueError(
                    f"it has {found.shape[1]} classes, the image set and its peers {n} (does it return "
                    "features instead of logits? or do folders of pictures for networks of ImageNet lack "
                    "the names of its synsets?)"
                )
        return found

    def predictions(self, name: str, canvas: Tensor) -> Classes:
        """Return the predicted classes (image,)."""
        return self.logits(name, canvas).argmax(1).numpy().astype(np.int16)

    def probabilities(self, name: str, canvas: Tensor) -> NDArray[np.uint16]:
        """Return the probabilities (image, class), in parts of `PROBABILITY_STEPS`."""
        probabilities = self.logits(name, canvas).double().softmax(1)
        return (probabilities * studies.PROBABILITY_STEPS).round().numpy().astype(np.uint16)

    def first_predictions(self, name: str) -> Classes:
        """Return the predicted classes (image,) of the clean images.

        Raises
        ------
        ValueError
            If the network misbehaves, or tells images otherwise in batches of another size or in other
            company: it is random, or takes statistics of the batch.
        """
        few = self.images.pixels[:ASKED_AGAIN]
        expected = self.logits(name, few, batch_size=len(few)).argmax(1)
        differing = []
        for order, size in ((expected.argsort(stable=True), 7), (expected.argsort(descending=True), 11)):
            again = self.logits(name, few[order], batch_size=size).argmax(1)
            differing.append(float((again != expected[order]).float().mean()))
        if (share := np.mean(differing)) > _UNSTEADY:
            raise ValueError(
                f"model {name!r}: it tells {share:.0%} of {len(few)} images otherwise when they come in "
                "batches of other sizes and company: switch off what is random or averages over the batch"
            )
        return self.predictions(name, self.images.pixels)

    def images_without_gradient(self, name: str) -> int:
        """Count the clean images that leave an attack no gradient to follow: it is zero, NaN or infinite."""
        network, without = self.network(name), 0
        with self._at_work(name), frozen(network) as still:
            for start in range(0, len(self.images), self.batch_size):
                part = self.images[start : start + self.batch_size]
                x, y = part.images.to(self.device), part.labels.to(self.device)
                gradient = input_gradients(still, x, y).flatten(1)
                without += int(((gradient == 0).all(1) | ~gradient.isfinite().all(1)).sum())
        return without

    def adversarial(self, change: Change) -> Tensor:
        """Return all images after a change in whole 255ths, as uint8, on the device for every target."""
        return studies.perturbed(self.images, change).to(self.device)


class _InBfloat16(nn.Module):
    """A network that computes in bfloat16, forward and so back, where torch holds that to be safe."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, canvas: Tensor) -> Tensor:
        with torch.autocast(canvas.device.type, torch.bfloat16):
            return self.network(canvas)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _on_device(network: nn.Module, device: str) -> nn.Module:
    """Return the network if it is on that kind of device, else a copy of it that is."""
    is_there = all(tensor.device.type == torch.device(device).type for tensor in _tensors(network))
    return network if is_there else copy.deepcopy(network).to(device)


def _room(device: str, memory: float) -> dict[str, float]:
    """Return how many bytes networks may take on the device, and in memory."""
    if not is_gpu(device):
        return {device: memory * 2**30}
    return {device: torch.cuda.mem_get_info(device)[0] / 2, "cpu": memory * 2**30}


@dataclass(frozen=True)
class _Work:
    """What is the same for every source; sent once to each worker."""

    store: studies.Store
    engine: Engine
    test_images: ImageSet | None
    expected_accuracy: Mapping[str, float] | None = None
    attacked: Callable[[], object] = int


def transfer(
    zoo: Mapping[str, nn.Module],
    images: ImageSet,
    attack: Attack = pgd,
    out: str | Path = "runs/study",
    *,
    test_images: ImageSet | None = None,
    batch_size: int = 250,
    device: str | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    fold: bool | None = None,
    perturbations: bool | None = None,
    expected_accuracy: Mapping[str, float] | None = None,
    network_memory: float = 2,
    precision: Precision = "fp32",
    progress: bool = True,
) -> xr.Dataset:
    """Attack every classifier of `zoo` and show the adversarial images to all of them.

    N attacks and N² evaluations. Every attack is on disk as soon as it is done: a run that was killed
    goes on where it stopped when it is started again with the same settings, also with another number
    of workers. Started again with more models in the zoo (or with `test_images`, where there were
    none), it extends the study: no source is attacked twice, no pair evaluated twice.

    Examples
    --------
    >>> zoo, images = load_zoo("fashion69"), fashion_mnist("test", n=1000)
    >>> study = transfer(zoo, images, partial(pgd, steps=10), "runs/mine")

    Two sources at a time. New processes import the script that started them, so in a script (not in a
    notebook) the call has to stand under `if __name__ == "__main__":`.

    >>> study = transfer(zoo, images, partial(pgd, steps=10), "runs/mine", workers=2)

    Parameters
    ----------
    zoo : mapping
        Classifiers by name. They are asked for one at a time, so a lazy mapping such as `Zoo` keeps
        the memory flat.
    images : ImageSet
        What to attack.
    attack : callable
        `attack(classifier, images, labels, **settings)`, such as `pgd` or a `functools.partial` of
        it. Its settings are recorded, and its code if it isn't one of modelsim's; a `seed` among them is
        advanced for every batch, an `eps` bounds the change of every pixel.
    out : path
        Folder for the study, in `out/study.zarr`.
    test_images : ImageSet, optional
        A larger set, of the same classes, of which every classifier's probabilities are kept.
    batch_size : int
        Images attacked at a time.
    device : str, optional
        By default `"cuda"` where there is one, else `"cpu"`.
    workers : int
        Processes that finish sources side by side and share torch's threads; on `"cuda"` each has a GPU,
        by dask-cuda. One that dies is started anew and has lost the source that it was at. Each gets the
        images and the zoo once, so a plain dictionary of classifiers is in memory once a process, a `Zoo`
        is not. The predictions are those of one process with as many threads as a worker has: another
        number of threads may sum in another order, and tip an image on a decision boundary.
    scheduler : str, optional
        Address of a Dask scheduler, such as `"tcp://10.0.0.1:8786"`, whose workers are used instead.
        They need one thread each, this environment, the `device`, and `out` on a disk that all share.
    fold : bool, optional
        Make one convolution of each that a batch normalisation follows, before anything is computed: exact
        but for rounding, and faster. By default as in the study that is there, else yes.
    perturbations : bool, optional
        Keep the change of every pixel, so that adversarial images can be rebuilt. Without, a source that
        is half done is attacked anew when the run goes on, and so is every source when the study is
        extended; `compare` refuses the study. By default as in the study that is there, else yes.
    expected_accuracy : mapping, optional
        Accuracy on clean images, 0 … 1, of those models of which it is known. With it, empty too, a model
        stops the run before any attack if on 500 images or more it is 10 points less accurate, or less than
        half as accurate as the median of its peers.
    network_memory : float
        GiB in which each process keeps networks, so that it asks the zoo for each of N only once; those
        beyond are loaded anew for every source. On a GPU half of the memory that is free there comes first.
    precision : {"fp32", "tf32", "bf16"}
        In which networks compute: 32 bit; on a GPU, matrices multiplied with 10 bits of mantissa
        (TensorFloat-32); or bfloat16 by torch's autocast. All but the first are recorded.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Dataset
        The study, as from `open_study`.

    Warns
    -----
    UserWarning
        Once a model whose scores are doubtful: it knows little of what its peers know, it leaves an
        attack no gradient to follow, or the attack on itself fails.

    Raises
    ------
    ValueError
        If the zoo is empty, a classifier misbehaves (raises, returns another shape, NaN, infinity, or
        another number of classes than its peers; tells an image otherwise when it is asked again or in
        other company; is less accurate than expected), the attack leaves the canvas or its `eps`, or can't
        be recorded, or `out` holds a study with other settings or other networks: the message names the
        difference. What was finished before stays on disk. Also if `precision` is unknown, `test_images` has
        other classes than `images`, `workers` is less than 1, more than there are GPUs or given beside
        `scheduler`, or a worker of the scheduler has several threads or another environment.
    TypeError
        If the zoo, the images, a name or a classifier isn't one, or there are several workers and the zoo or
        the attack can't be pickled.
    BlockingIOError
        If another run writes to `out`.
    RuntimeError
        If a script asks for several workers outside `if __name__ == "__main__":`.
    FileExistsError
        If `out/study.zarr` is something else than a study.
    OSError
        If `out` can't be written, no scheduler answers or it has no worker, or every worker died that was at
        some source: the message names it, and all others are finished.
    """
    device = device or default_device()
    check_workers(workers, scheduler, device)
    _check_input(zoo, images, test_images, batch_size)
    path = studies.check_folder(out).absolute() / studies.STORE
    stored = studies.stored_settings(path)
    kept = stored.get("perturbations", True) if perturbations is None else perturbations
    fold = stored.get("fold", True) if fold is None else fold
    engine = Engine(zoo, images, attack, batch_size, device, fold, network_memory, precision)
    store = studies.Store(path, _settings(engine, test_images, perturbations=kept))
    work = _Work(store, engine, test_images, expected_accuracy)
    return warned(_made(work, workers, scheduler, progress=progress), list(zoo))


def _made(work: _Work, workers: int, scheduler: str | None, *, progress: bool) -> xr.Dataset:
    """Make or extend a study as its only writer."""
    store, engine, folder = work.store, work.engine, work.store.path.parent
    # A folder that isn't there is made only after all models have answered.
    with sole_writer(folder) if folder.exists() else nullcontext():
        store.check_settings()
        names = tqdm(engine.zoo, desc="clean images", disable=not progress, leave=False)
        clean = {name: engine.first_predictions(name) for name in names}
        if work.expected_accuracy is not None and len(engine.images) >= _ENOUGH:
            _check_accuracy(clean, engine.images, work.expected_accuracy)
    with sole_writer(folder):
        missing = store.prepare(clean, engine.images, work.test_images)
        _finish(work, missing, workers, scheduler, progress=progress)
        return studies.open_study(folder)


def default_device() -> str:
    """Return `"cuda"` where there is one, else `"cpu"`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_input(
    zoo: Mapping[str, nn.Module], images: ImageSet, test_images: ImageSet | None, batch_size: int
) -> None:
    if not hasattr(zoo, "keys"):  # as a torch.nn.ModuleDict has
        raise TypeError(f"a zoo must be a mapping from names to classifiers, got {type(zoo).__name__}")
    for what, given in {"images": images, "test_images": test_images}.items():
        if not isinstance(given, ImageSet | None):
            raise TypeError(f"{what} must be a modelsim.ImageSet, got {type(given).__name__}")
    if not zoo:
        raise ValueError("the zoo is empty: give at least one classifier")
    check_strings("names of models", zoo)
    check_whole(batch_size=batch_size)
    if test_images is not None and test_images.classes != images.classes:
        raise ValueError(f"the test images have classes {test_images.classes}, the images {images.classes}")


def _check_accuracy(clean: Mapping[str, Classes], images: ImageSet, expected: Mapping[str, float]) -> None:
    """Raise if a model is much less accurate on clean images than it should be."""
    found = pd.Series({name: (told == images.labels.numpy()).mean() for name, told in clean.items()})
    for name, accuracy in found.items():
        # Without a peer the second is NaN, below which nothing is.
        least = {"10 points less than expected": expected.get(str(name), 0) - 0.1}
        least["half of its peers'"] = found.drop(name).median() / 2
        for what, bound in least.items():
            if accuracy < bound:
                raise ValueError(
                    f"model {name!r} is right on {accuracy:.1%} of {len(images)} clean images, below "
                    f"{bound:.1%} ({what}): look at the order of its classes, the mean and deviation of its "
                    "inputs, and whether the canvas is as large as its input"
                )


def _finish(work: _Work, missing: list[str], workers: int, scheduler: str | None, *, progress: bool) -> None:
    """Finish the sources that are missing, one after the other or side by side."""
    engine, batches = work.engine, -(-len(work.engine.images) // work.engine.batch_size)
    done = (len(engine.zoo) - len(missing)) * batches
    goals = count(done + batches, batches)
    with tqdm(total=len(engine.zoo) * batches, initial=done, disable=not progress) as bar:

        def show(name: str, _: None) -> None:
            bar.set_description(name)
            bar.update(next(goals) - bar.n)

        if workers == 1 and not scheduler:
            work = replace(work, attacked=bar.update)
        side_by_side(
            _finish_source, work, missing, show, workers=workers, scheduler=scheduler, device=engine.device
        )


def _finish_source(work: _Work, name: str) -> None:
    """Attack one source and evaluate every target, as far as this isn't stored, and mark it finished."""
    store, engine = work.store, work.engine
    _check_worker(store)
    change = store.fill("perturbation", name, lambda: engine.perturbation(name, work.attacked))
    adversarial = engine.adversarial(change)
    rows = store.known("adversarial_prediction", name)
    for row, target in zip(rows, engine.zoo, strict=True):
        if studies.is_absent("adversarial_prediction", row):
            row[:] = engine.predictions(target, adversarial)
    store.write("adversarial_prediction", name, rows)
    store.fill("images_without_gradient", name, lambda: np.array(engine.images_without_gradient(name)))
    if (test := work.test_images) is not None:
        store.fill("clean_probability", name, lambda: engine.probabilities(name, test.pixels))
    store.write("finished", name, values=True)


def _check_worker(store: studies.Store) -> None:
    """Raise if this process, perhaps on another machine, doesn't see the store or has another environment."""
    if not store.path.is_dir():
        raise FileNotFoundError(f"a worker finds no {store.path}: give an `out` on a disk that all share")
    if (ours := _versions()) != (others := store.settings["versions"]):
        raise ValueError(f"a worker has {ours}, the study has {others}: give all workers one environment")


def warned(study: xr.Dataset, names: Sequence[str]) -> xr.Dataset:
    """Warn of models whose scores are doubtful, as from where the caller of this was called."""
    for concern in concerns(study, names):
        warnings.warn(concern, stacklevel=3)
    return study


def concerns(study: xr.Dataset, names: Sequence[str]) -> Iterator[str]:
    """Say what makes the scores of single models doubtful: at most one sentence a model."""
    correct = (study.clean_prediction == study.label).to_pandas().astype(float)
    both = correct @ correct.T / correct.shape[1]
    accuracy = correct.mean(axis=1)
    for name in names:
        peers = accuracy.drop(name)
        # Of two models that have little in common, the less accurate one is named.
        better = peers[(peers > accuracy[name]) | ((peers == accuracy[name]) & (peers.index > name))]
        apart = [peer for peer in better.index if both.loc[name, peer] < 0.5]
        found = []
        if accuracy[name] < peers.median() / 2:
            found.append(
                f"it is right on {accuracy[name]:.0%} of the clean images, its peers on "
                f"{peers.median():.0%} (another order of classes, or nothing learned?)"
            )
        if apart:
            more = f" and {len(apart) - 1} more" if apart[1:] else ""
            share = f"{both.loc[name, apart].min():.0%}"
            found.append(f"it and {apart[0]!r}{more} are both right on few of the images ({share})")
        found += _gradient_concerns(study.sel(source=name, target=name))
        if found:
            yield f"model {name!r}: {'; '.join(found)}: its scores say little"


def _gradient_concerns(own: xr.Dataset) -> Iterator[str]:
    """Say what is wrong with the attack of one model on itself."""
    blind, n = int(own.get("images_without_gradient", 0)), own.sizes["image"]
    if blind > 0.05 * n:
        yield f"on {blind} of {n} clean images its gradient is zero or not finite: no attack can follow it"
    right = (own.clean_prediction == own.label).values
    fooled = (own.adversarial_prediction != own.label).values[right]
    if right.any() and fooled.mean() < 0.1:
        yield f"the attack on itself succeeds on {fooled.mean():.0%} of {right.sum()} images"


def describe_attack(attack: Attack) -> dict[str, Any]:
    """Tell one attack from another: its name, its settings and, unless it is modelsim's, its code.

    Raises
    ------
    TypeError, ValueError
        As `attack_settings`.
    """
    settings, function = attack_settings(attack), _function(attack)
    described = {"attack": f"{function.__module__}.{function.__qualname__}", "attack_settings": settings}
    if function.__module__ != attacks.__name__:
        described["attack_code"] = sha256("".join(_code(function)).encode()).hexdigest()
    return described


def attack_settings(attack: Attack) -> dict[str, Any]:
    """Read the settings of an attack: defaults, and what `functools.partial` has set.

    Examples
    --------
    >>> attack_settings(partial(pgd, steps=10))["steps"]
    10

    Raises
    ------
    TypeError
        If it isn't a function, or `functools.partial` of one.
    ValueError
        If a setting without a default is not given, or a setting can't be recorded: only numbers,
        strings, booleans and None can, and only where they are parameters.
    """
    function = _function(attack)
    settings = dict(attack.keywords) if isinstance(attack, partial) else {}
    try:
        parameters = inspect.signature(attack).parameters
    except ValueError as error:  # of a partial that can't be called
        takes = f"{function.__qualname__}{inspect.signature(function)}"
        raise ValueError(f"the attack {takes} can't be given {', '.join(settings)}") from error
    for parameter in parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            settings[parameter.name] = parameter.default
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            raise ValueError(f"the attack needs {parameter.name}=…: give it with functools.partial")
    for name, value in settings.items():
        is_finite = not isinstance(value, float) or isfinite(value)
        if not isinstance(value, bool | int | float | str | None) or not is_finite:
            raise ValueError(
                f"can't record {name}={value!r} of the attack: give a finite number, string, bool or None"
            )
    return settings


def _function(attack: Attack) -> FunctionType:
    """Return the function of an attack, or raise if some of its settings are hidden."""
    function, hidden = (attack.func, attack.args) if isinstance(attack, partial) else (attack, ())
    if not isinstance(function, FunctionType):
        raise TypeError(
            f"an attack must be a function(classifier, images, labels, *, …), got {type(function).__name__}: "
            "call it from a function, with its settings as keyword parameters"
        )
    if hidden := (*hidden, *function.__code__.co_freevars):
        raise ValueError(
            f"can't record what the attack {function.__qualname__} takes from around it {hidden}: make it "
            "keyword parameters, and set them with functools.partial(attack, name=value)"
        )
    return function


def _code(function: FunctionType, seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield what a function does: its instructions, and what they name around it in its module."""
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        plain = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
        # Not in the order of a set, which changes from process to process.
        constants = [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in plain]
        yield f"{code.co_code.hex()} {code.co_names} {constants}"
    for name in sorted({name for code in codes for name in code.co_names} - seen):
        value = function.__globals__.get(name)
        if all(isinstance(leaf, bool | int | float | str) for leaf in tree_leaves(value)):
            yield f"{name}={value!r}"
        elif isinstance(value, FunctionType) and value.__module__ == function.__module__:
            yield from _code(value, seen | {name})


def _versions() -> dict[str, str]:
    return {"modelsim": __version__} | studies.versions()


def _settings(engine: Engine, test_images: ImageSet | None, *, perturbations: bool) -> dict[str, Any]:
    """Everything that a study's numbers depend on, as it goes into the attributes."""
    for name in engine.zoo:
        engine.network(name)
    settings = describe_attack(engine.attack) | {
        "batch_size": engine.batch_size,
        "canvas_rule": CANVAS_RULE,
        "device": engine.device,
        "fold": engine.fold,
        "versions": _versions(),
        "models": dict(engine.fingerprints),
    }
    if engine.precision != "fp32":  # without which studies were stored before there was a choice
        settings["precision"] = engine.precision
    for key, image_set in (("images", engine.images), ("test_images", test_images)):
        if image_set is not None:
            settings |= {key: image_set.name, f"{key}_sha256": image_set.fingerprint()}
    return settings | {"perturbations": perturbations}
