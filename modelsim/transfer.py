"""The engine: attack each source once, show the result to every target, and keep all predictions."""

import inspect
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import xarray as xr
import zarr
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from zarr.codecs import Crc32cCodec, ZstdCodec

from modelsim.attacks import checked_logits, frozen, pgd
from modelsim.images import ImageSet, check_images
from modelsim.workers import side_by_side
from modelsim.zoo import CANVAS_RULE, fingerprint

Attack = Callable[..., Tensor]

_STORE = "study.zarr"
_FORMAT = "modelsim study 1"
_CHUNK_KEYS: Any = {"name": "default", "separator": "."}
_ABSENT: Mapping[str, Any] = {
    "source": "",
    "target": "",
    "image": "",
    "class": "",
    "label": -1,
    "clean_prediction": -1,
    "adversarial_prediction": -1,
    "perturbation": -128,
    "finished": False,
    "test_image": "",
    "test_label": -1,
    "clean_probability": 65_535,
}
"""The arrays of a store, and the value, never a real one, that zarr puts where a chunk is missing."""

_OF_ONE_MODEL = ("adversarial_prediction", "perturbation", "clean_probability")
_OF_TEST_IMAGES = ("test_image", "test_label", "clean_probability")
_PROBABILITY_STEPS = 10_000


@dataclass(frozen=True)
class _Work:
    """What is the same for every source; sent once to each worker."""

    store: Path
    zoo: Mapping[str, nn.Module]
    images: ImageSet
    attack: Attack
    batch_size: int
    device: str
    test_images: ImageSet | None


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
        it. Its settings are recorded; a `seed` among them is advanced for every batch.
    out : path
        Folder for the study, in `out/study.zarr`.
    test_images : ImageSet, optional
        A larger set, of the same classes, of which every classifier's probabilities are kept.
    batch_size : int
        Images attacked at a time.
    device : str, optional
        By default `"cuda"` where there is one, else `"cpu"`.
    workers : int
        Processes that finish sources side by side and share torch's threads. Each gets the images and
        the zoo once, so a plain dictionary of classifiers is in memory once a process, a `Zoo` is
        not. The predictions are those of one process with as many threads as a worker has: another
        number of threads may sum in another order, and tip an image on a decision boundary.
    scheduler : str, optional
        Address of a Dask scheduler, such as `"tcp://10.0.0.1:8786"`, whose workers are used instead.
        They need one thread each, this environment, the `device`, and `out` on a disk that all share.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Dataset
        The study, as from `open_study`.

    Raises
    ------
    ValueError
        If the zoo is empty, a classifier misbehaves (wrong shape, NaN, another number of classes than
        its peers), the attack leaves the canvas, or `out` holds a study with other settings: the
        message names the difference. What was finished before stays on disk. Also if `test_images`
        has other classes than `images`, `workers` is less than 1 or given beside
        `scheduler`, or a worker of the scheduler has several threads or another environment.
    TypeError
        If there are several workers and the zoo or the attack can't be pickled.
    RuntimeError
        If a script asks for several workers outside `if __name__ == "__main__":`.
    FileExistsError
        If `out/study.zarr` is something else than a study.
    OSError
        If `out` can't be written, no scheduler answers or it has no worker, or a worker died.
    """
    _check_workers(workers, scheduler)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not zoo:
        raise ValueError("the zoo is empty: give at least one classifier")
    if test_images is not None and test_images.classes != images.classes:
        raise ValueError(f"the test images have classes {test_images.classes}, the images {images.classes}")
    store = Path(out) / _STORE
    work = _Work(store.absolute(), zoo, images, attack, batch_size, device, test_images)
    settings = _settings(work)
    _finish_replacement(store)
    if not store.exists():
        _create(store, work, settings)
    group = _open_store(store, mode="r+")
    is_extended = _is_extended(store, group.attrs["settings"], settings)
    finished = _check_finished(group, store)
    if is_extended:
        _create(store, work, settings, known=group)
        finished = np.zeros(len(zoo), dtype=bool)
    for leftover in store.rglob("*.partial"):
        leftover.unlink()
    _finish(work, finished, workers, scheduler, progress=progress)
    return open_study(out)


def _check_workers(workers: int, scheduler: str | None) -> None:
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if workers > 1 and scheduler:
        raise ValueError(f"give workers={workers} or scheduler={scheduler!r}, not both")


def _finish(
    work: _Work, finished: NDArray[np.bool_], workers: int, scheduler: str | None, *, progress: bool
) -> None:
    """Finish every source that isn't, one after the other or side by side."""
    names, batches = list(work.zoo), -(-len(work.images) // work.batch_size)
    missing = np.flatnonzero(~finished).tolist()
    done = (len(names) - len(missing)) * batches
    with tqdm(total=len(names) * batches, initial=done, disable=not progress) as bar:

        def show(index: int) -> None:
            bar.set_description(names[index])
            bar.update(batches)

        if missing and (workers > 1 or scheduler):
            side_by_side(_finish_afar, work, missing, workers=workers, scheduler=scheduler, done=show)
        else:
            for index in missing:
                _finish_source(work, index, bar)


def _finish_afar(work: _Work, index: int) -> None:
    """Finish one source in another process."""
    if not work.store.is_dir():
        raise FileNotFoundError(
            f"a worker finds no {work.store}: give an `out` on a disk that all workers share"
        )
    there = cast("Mapping[str, Any]", zarr.open_group(work.store, mode="r").attrs["settings"])["versions"]
    if _versions() != there:
        raise ValueError(
            f"a worker has {_versions()}, the study is made with {there}: give all workers one environment"
        )
    _finish_source(work, index, tqdm(disable=True))


def _finish_source(work: _Work, index: int, bar: "tqdm[Any]") -> None:
    """Attack one source and evaluate every target, as far as this isn't stored, and mark it finished."""
    zoo, images, group = work.zoo, work.images, zarr.open_group(work.store, mode="r+")
    name = list(zoo)[index]
    bar.set_description(name)
    change = _stored(group, "perturbation", index)
    if _is_absent("perturbation", change).any():
        change = perturbation(
            name, zoo[name], images, work.attack, batch_size=work.batch_size, device=work.device, bar=bar
        )
        _array(group, "perturbation")[index] = change
    else:
        bar.update(-(-len(images) // work.batch_size))
    adversarial = perturbed(images, change)
    rows = _stored(group, "adversarial_prediction", index)
    for row, target in zip(rows, zoo, strict=True):
        if _is_absent("adversarial_prediction", row).any():
            row[:] = predictions(target, zoo[target], adversarial, images, device=work.device)
    _array(group, "adversarial_prediction")[index] = rows
    if work.test_images is not None:
        known = _stored(group, "clean_probability", index)
        if _is_absent("clean_probability", known).any():
            known = _probabilities(name, zoo[name], work.test_images, device=work.device)
            _array(group, "clean_probability")[index] = known
    _array(group, "finished")[index] = True


def _stored(group: zarr.Group, name: str, index: int) -> NDArray[Any]:
    """Read what is known of a source that isn't finished; what is missing or damaged counts as absent."""
    array = _array(group, name)
    try:
        return np.array(array[index])
    except (OSError, ValueError, KeyError, RuntimeError):
        # Damage in a finished source has been reported, with the advice to have it computed anew.
        return np.full(array.shape[1:], _ABSENT[name], array.dtype)


def _is_absent(name: str, values: NDArray[Any]) -> NDArray[np.bool_]:
    return values == _ABSENT[name]


def perturbation(
    name: str,
    source: nn.Module,
    images: ImageSet,
    attack: Attack,
    *,
    batch_size: int,
    device: str,
    bar: "tqdm[Any]",
) -> NDArray[np.int8]:
    """Attack one source batch by batch; return the change of every pixel, rounded to whole 255ths."""
    source, seed = source.to(device), attack_settings(attack).get("seed")
    adversarial = []
    for start in range(0, len(images), batch_size):
        x, y = images.images[start : start + batch_size], images.labels[start : start + batch_size]
        advanced = {} if seed is None else {"seed": seed + start}
        with _blamed_on(name):
            batch = attack(source, x.to(device), y.to(device), **advanced).cpu()
            if batch.shape != x.shape:
                raise ValueError(f"the attack turned {tuple(x.shape)} into {tuple(batch.shape)}")
            check_images(batch)
        adversarial.append(batch)
        bar.update()
    change = _to_8_bit(torch.cat(adversarial)) - _to_8_bit(images.images)
    if change.abs().max() > 127:
        raise ValueError(f"a perturbation of {int(change.abs().max())}/255 doesn't fit the store's 127/255")
    return change.numpy().astype(np.int8)


def _to_8_bit(images: Tensor) -> Tensor:
    """Round (not truncate) a canvas to whole 255ths, as int16."""
    return (images * 255).round().to(torch.int16)


def _logits(
    name: str, classifier: nn.Module, canvas: Tensor, images: ImageSet, *, device: str, batch_size: int = 100
) -> Tensor:
    """Return the logits (image, class) of one classifier, on the CPU."""
    logits = []
    with frozen(classifier.to(device)), torch.no_grad(), _blamed_on(name):
        for batch in canvas.split(batch_size):
            of_batch = checked_logits(classifier, batch.to(device))
            if of_batch.shape[1] != len(images.classes):
                raise ValueError(
                    f"it has {of_batch.shape[1]} classes, the image set and its peers {len(images.classes)}"
                )
            logits.append(of_batch.cpu())
    return torch.cat(logits)


def predictions(
    name: str, classifier: nn.Module, canvas: Tensor, images: ImageSet, *, device: str
) -> NDArray[np.int16]:
    """Return the predicted classes (image,) of one classifier."""
    return _logits(name, classifier, canvas, images, device=device).argmax(1).numpy().astype(np.int16)


def _probabilities(name: str, classifier: nn.Module, images: ImageSet, *, device: str) -> NDArray[np.uint16]:
    """Return the probabilities (image, class) of one classifier, in 1/10,000."""
    probabilities = _logits(name, classifier, images.images, images, device=device).double().softmax(1)
    return (probabilities * _PROBABILITY_STEPS).round().numpy().astype(np.uint16)


class _blamed_on:
    """Put the name of a model before the message of a TypeError or ValueError raised inside."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, TypeError | ValueError):
            raise ValueError(f"model {self.name!r}: {error}") from error


def attack_settings(attack: Attack) -> dict[str, Any]:
    """Read the settings of an attack: defaults, and what `functools.partial` has set.

    Examples
    --------
    >>> attack_settings(partial(pgd, steps=10))["steps"]
    10

    Raises
    ------
    ValueError
        If a setting without a default is not given, or a setting can't be recorded: only numbers,
        strings, booleans and None can.
    """
    settings = dict(attack.keywords) if isinstance(attack, partial) else {}
    for parameter in inspect.signature(attack).parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            settings[parameter.name] = parameter.default
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            raise ValueError(f"the attack needs {parameter.name}=…: give it with functools.partial")
    for name, value in settings.items():
        if not isinstance(value, bool | int | float | str | None):
            raise ValueError(f"can't record {name}={value!r} of the attack")
    return settings


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("modelsim", "torch", "timm", "numpy")}


def _settings(work: _Work) -> dict[str, Any]:
    """Everything that a study's numbers depend on, as it goes into the attributes."""
    function = work.attack.func if isinstance(work.attack, partial) else work.attack
    name = getattr(function, "__qualname__", type(function).__qualname__)
    test = work.test_images
    of_test = {} if test is None else {"test_images": test.name, "test_images_sha256": test.fingerprint()}
    return {
        "attack": f"{function.__module__}.{name}",
        "attack_settings": attack_settings(work.attack),
        "canvas_rule": CANVAS_RULE,
        "images": work.images.name,
        "images_sha256": work.images.fingerprint(),
        **of_test,
        "batch_size": work.batch_size,
        "device": work.device,
        "versions": _versions(),
        "models": {name: fingerprint(work.zoo[name]) for name in work.zoo},
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def setting_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say how the settings of what is stored differ from those asked for now."""
    return [
        f"{key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _is_extended(store: Path, stored: Any, settings: Mapping[str, Any]) -> bool:
    """Tell whether there is more to compute than was asked before; refuse what was made otherwise."""
    before, now = dict(_flat(stored)), dict(_flat(settings))
    added = {key for key in now.keys() - before.keys() if key.startswith(("models.", "test_images"))}
    if differences := setting_differences(before, {key: now[key] for key in now if key not in added}):
        raise ValueError(
            f"{store} was made with other settings ({'; '.join(differences)}): choose another folder, "
            "or delete it to start anew"
        )
    return bool(added) or list(stored["models"]) != list(settings["models"])


def _create(
    store: Path, work: _Work, settings: Mapping[str, Any], *, known: zarr.Group | None = None
) -> None:
    """Write a store with everything but the attacks that aren't `known`; it appears whole or not at all."""
    zoo, images = work.zoo, work.images
    clean = np.stack([predictions(n, zoo[n], images.images, images, device=work.device) for n in zoo])
    unfinished = store.with_name(f"{store.name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        attributes = {
            "format": _FORMAT,
            "settings": dict(settings),
            "hardware": f"{os.cpu_count()} CPUs, {platform.machine()}",
        }
        group = zarr.create_group(unfinished, attributes=attributes)
    except OSError as error:
        raise OSError(f"can't write the study to {store.parent}: {error}") from error
    names = np.array(list(zoo), dtype=object)
    n, shape = len(names), images.images.shape
    _write(group, "source", names, ("source",))
    _write(group, "target", names, ("target",))
    _write(group, "image", np.array(images.ids, dtype=object), ("image",))
    _write(group, "class", np.array(images.classes, dtype=object), ("class",))
    _write(group, "label", images.labels.numpy().astype(np.int16), ("image",))
    _write(group, "clean_prediction", clean, ("target", "image"))
    pixels = ("source", "image", "channel", "y", "x")
    _add(group, "perturbation", pixels, (n, *shape), (1, *shape), "int8", {"units": "1/255"})
    triples = ("source", "target", "image")
    _add(group, "adversarial_prediction", triples, (n, n, shape[0]), (1, n, shape[0]), "int16")
    if work.test_images is not None:
        _add_test_images(group, work.test_images, n)
    _add(group, "finished", ("source",), (n,), (1,), "bool")
    if known is not None:
        _inherit(group, known)
        store.rename(_replaced(store))
    unfinished.rename(store)
    _finish_replacement(store)


def _inherit(group: zarr.Group, known: zarr.Group) -> None:
    """Copy what a store of fewer models knows of each source."""
    before, now = (list(cast("Any", g.attrs["settings"])["models"]) for g in (known, group))
    places = [now.index(name) for name in before]
    for index, place in enumerate(places):
        for name in set(_names(known)) & set(_OF_ONE_MODEL) - {"adversarial_prediction"}:
            _array(group, name)[place] = _stored(known, name, index)
        rows = _stored(group, "adversarial_prediction", place)
        rows[places] = _stored(known, "adversarial_prediction", index)
        _array(group, "adversarial_prediction")[place] = rows


def _replaced(store: Path) -> Path:
    return store.with_name(f"{store.name}.replaced")


def _finish_replacement(store: Path) -> None:
    """Bring a store back if the run that replaced it was killed on the way, else remove it."""
    replaced = _replaced(store)
    if replaced.exists() and not store.exists():
        replaced.rename(store)
    elif replaced.exists():
        shutil.rmtree(replaced)


def _add_test_images(group: zarr.Group, images: ImageSet, n: int) -> None:
    """Add what is known of the test images, and room for the probabilities of `n` models."""
    _write(group, "test_image", np.array(images.ids, dtype=object), ("test_image",))
    _write(group, "test_label", images.labels.numpy().astype(np.int16), ("test_image",))
    shape = (len(images), len(images.classes))
    # By this attribute xarray, and others that know the CF convention, read floats in 0 … 1.
    scale = {"scale_factor": 1 / _PROBABILITY_STEPS}
    dimensions = ("target", "test_image", "class")
    _add(group, "clean_probability", dimensions, (n, *shape), (1, *shape), "uint16", scale)


def _add(
    group: zarr.Group,
    name: str,
    dimensions: tuple[str, ...],
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: Any,
    attributes: dict[str, Any] | None = None,
) -> "zarr.Array[Any]":
    """Add an empty array, compressed and with a checksum for every chunk."""
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=_ABSENT[name],
        dimension_names=dimensions,
        compressors=[ZstdCodec(level=19), Crc32cCodec()],
        chunk_key_encoding=_CHUNK_KEYS,
        attributes=attributes,
    )


def _write(group: zarr.Group, name: str, values: NDArray[Any], dimensions: tuple[str, ...]) -> None:
    """Add an array of one chunk, filled with `values`."""
    dtype = str if values.dtype == object else values.dtype
    _add(group, name, dimensions, values.shape, values.shape, dtype)[:] = values


def _array(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    return cast("zarr.Array[Any]", group[name])


def _open_store(store: Path, *, mode: Literal["r", "r+"]) -> zarr.Group:
    """Open a store and read every array but the large ones once, so that damage is found at once.

    Raises
    ------
    FileExistsError
        If it is something else than a study.
    ValueError
        If an array can't be read back whole.
    """
    try:
        group = zarr.open_group(store, mode=mode)
    except (OSError, ValueError, KeyError) as error:
        raise FileExistsError(f"{store} is not a study, or its zarr.json is damaged: {error}") from error
    if group.attrs.get("format") != _FORMAT:
        raise FileExistsError(f"{store} is not a modelsim study: choose another folder")
    for name in _names(group):
        if name not in _OF_ONE_MODEL:
            _read(group, store, name, advice=f"delete {store} and run the transfer again")
    return group


def _names(group: zarr.Group) -> list[str]:
    """Names of the arrays that a store must have."""
    settings = cast("Mapping[str, Any]", group.attrs["settings"])
    return [name for name in _ABSENT if name not in _OF_TEST_IMAGES or "test_images" in settings]


def _check_finished(group: zarr.Group, store: Path) -> NDArray[np.bool_]:
    """Return which sources are finished, after reading each of them back whole."""
    finished: NDArray[np.bool_] = np.asarray(_array(group, "finished")[:])
    for index in map(int, np.flatnonzero(finished)):
        marker = store / "finished" / f"c.{index}"
        advice = f"delete {marker} and run the transfer again: it recomputes this source only"
        for name in set(_names(group)) & set(_OF_ONE_MODEL):
            _read(group, store, name, index, advice=advice)
    return finished


def _read(group: zarr.Group, store: Path, name: str, index: int | None = None, *, advice: str) -> None:
    """Raise, naming store, array and advice, unless an array (or one source of it) can be read whole."""
    what = name if index is None else f"{name} of source {index}"
    try:
        values = np.asarray(_array(group, name)[slice(None) if index is None else index])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        why = str(error)
    else:
        if name == "finished" or bool((values != _ABSENT[name]).all()):
            return
        why = "missing"
    raise ValueError(
        f"study {store}: {what} is truncated or corrupted ({why}). "
        f"Restore the store from where it came, or {advice}"
    )


def open_study(path: str | Path) -> xr.Dataset:
    """Open a study that `transfer` has written.

    Examples
    --------
    >>> study = open_study("data/fashion69")
    >>> study.adversarial_prediction.sel(source="resnet50", target="convnext_tiny")

    Parameters
    ----------
    path : path
        The folder that was given to `transfer` as `out`.

    Returns
    -------
    Dataset
        `adversarial_prediction` (source, target, image), `clean_prediction` (target, image), `label`
        (image): class indices; `perturbation` (source, image, channel, y, x): int8 in 1/255, read
        from disk when it is used. Names of models, images and classes are coordinates; attack,
        settings, canvas rule and versions are attributes. If test images were given: also
        `clean_probability` (target, test_image, class), float in steps of 0.0001, read from disk when
        it is used, and the coordinates `test_image` (ids) and `test_label` (class indices).

    Raises
    ------
    FileNotFoundError
        If there is no study.
    ValueError
        If the study isn't finished or is damaged.
    """
    store = Path(path) / _STORE
    if not store.is_dir():
        raise FileNotFoundError(
            f"no study at {store}: make one with `python -m modelsim transfer --out {path}`"
        )
    finished = _check_finished(_open_store(store, mode="r"), store)
    if not finished.all():
        raise ValueError(
            f"study {store} has {int(finished.sum())} of {len(finished)} sources: "
            "run the same `transfer` again to finish it"
        )
    study = xr.open_zarr(store, consolidated=False, chunks=None).drop_vars("finished")
    for name in set(study.variables) - {"perturbation", "clean_probability"}:
        study[name].load()
    names = [n for n in ("source", "target", "image", "class", "test_image") if n in study.variables]
    study = study.assign_coords({name: np.array(study[name].values.tolist()) for name in names})
    if "test_label" in study:
        study = study.set_coords("test_label")
    settings = study.attrs.pop("settings")
    return study.assign_attrs(settings)


def adversarial_images(study: xr.Dataset, source: str, images: ImageSet) -> Tensor:
    """Rebuild the adversarial images of one source exactly as the targets saw them.

    Parameters
    ----------
    study : Dataset
        From `open_study`.
    source : str
        A source of the study.
    images : ImageSet
        The image set of the study.

    Returns
    -------
    Tensor
        float32 (n, channel, height, width) in [0, 1].

    Raises
    ------
    ValueError
        If `images` is another set than the study's, or `source` is not in it.
    """
    if images.fingerprint() != study.attrs["images_sha256"]:
        raise ValueError(
            f"these are not the images of the study ({study.attrs['images']}, n={study.sizes['image']})"
        )
    if source not in study.source:
        raise ValueError(f"{source!r} is not a source of the study: it has {', '.join(study.source.values)}")
    return perturbed(images, study.perturbation.sel(source=source).values)


def perturbed(images: ImageSet, change: NDArray[np.int8]) -> Tensor:
    """Return the canvas of `images` after a change in whole 255ths, exactly as the targets see it."""
    return (_to_8_bit(images.images) + torch.from_numpy(change).to(torch.int16)).float() / 255
