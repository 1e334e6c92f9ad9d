"""The engine: attack each source once, show the result to every target, and keep all predictions."""

import inspect
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
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
}
"""The arrays of a store, and the value, never a real one, that zarr puts where a chunk is missing."""


def transfer(
    zoo: Mapping[str, nn.Module],
    images: ImageSet,
    attack: Attack = pgd,
    out: str | Path = "runs/study",
    *,
    batch_size: int = 250,
    device: str | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Attack every classifier of `zoo` and show the adversarial images to all of them.

    N attacks and N² evaluations. Each finished source is on disk before the next starts: a run that
    was killed goes on where it stopped when it is started again with the same settings.

    Examples
    --------
    >>> zoo, images = load_zoo("fashion69"), fashion_mnist("test", n=1000)
    >>> study = transfer(zoo, images, partial(pgd, steps=10), "runs/mine")

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
    batch_size : int
        Images attacked at a time.
    device : str, optional
        By default `"cuda"` where there is one, else `"cpu"`.
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
        message names the difference. What was finished before stays on disk.
    FileExistsError
        If `out/study.zarr` is something else than a study.
    OSError
        If `out` can't be written.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not zoo:
        raise ValueError("the zoo is empty: give at least one classifier")
    store = Path(out) / _STORE
    settings = _settings(zoo, images, attack, batch_size=batch_size, device=device)
    if not store.exists():
        _create(store, zoo, images, settings)
    group = _open_store(store, mode="r+")
    _check_same_settings(store, group.attrs["settings"], settings)
    for leftover in store.rglob("*.partial"):
        leftover.unlink()
    finished = _check_finished(group, store)
    batches = -(-len(images) // batch_size)
    with tqdm(total=len(zoo) * batches, initial=int(finished.sum()) * batches, disable=not progress) as bar:
        for index in map(int, np.flatnonzero(~finished)):
            _finish_source(group, index, zoo, images, attack, batch_size, device, bar)
    return open_study(out)


def _finish_source(
    group: zarr.Group,
    index: int,
    zoo: Mapping[str, nn.Module],
    images: ImageSet,
    attack: Attack,
    batch_size: int,
    device: str,
    bar: "tqdm[Any]",
) -> None:
    """Attack one source, evaluate every target, write both, and only then mark the source finished."""
    name = list(zoo)[index]
    bar.set_description(name)
    adversarial = _attack_in_batches(name, zoo[name], images, attack, batch_size, device, bar)
    predictions = np.stack(
        [_predict(target, zoo[target], adversarial, images, device=device) for target in zoo]
    )
    change = (_to_8_bit(adversarial) - _to_8_bit(images.images)).numpy()
    if np.abs(change).max() > 127:
        raise ValueError(f"a perturbation of {np.abs(change).max()}/255 doesn't fit the store's 127/255")
    _array(group, "perturbation")[index] = change.astype(np.int8)
    _array(group, "adversarial_prediction")[index] = predictions
    _array(group, "finished")[index] = True


def _attack_in_batches(
    name: str,
    source: nn.Module,
    images: ImageSet,
    attack: Attack,
    batch_size: int,
    device: str,
    bar: "tqdm[Any]",
) -> Tensor:
    """Return the adversarial images of one source, rounded to 8 bit, on the CPU."""
    source = source.to(device)
    seed = attack_settings(attack).get("seed")
    adversarial = []
    for start in range(0, len(images), batch_size):
        x = images.images[start : start + batch_size]
        y = images.labels[start : start + batch_size]
        advanced = {} if seed is None else {"seed": seed + start}
        with _blamed_on(name):
            batch = attack(source, x.to(device), y.to(device), **advanced).cpu()
            if batch.shape != x.shape:
                raise ValueError(f"the attack turned {tuple(x.shape)} into {tuple(batch.shape)}")
            check_images(batch)
        adversarial.append(_to_8_bit(batch).float() / 255)
        bar.update()
    return torch.cat(adversarial)


def _to_8_bit(images: Tensor) -> Tensor:
    """Round (not truncate) a canvas to whole 255ths, as int16."""
    return (images * 255).round().to(torch.int16)


def _predict(
    name: str, classifier: nn.Module, canvas: Tensor, images: ImageSet, *, device: str, batch_size: int = 500
) -> NDArray[np.int16]:
    """Return the predicted classes (image,) of one classifier."""
    predictions = []
    with frozen(classifier.to(device)), torch.inference_mode(), _blamed_on(name):
        for batch in canvas.split(batch_size):
            logits = checked_logits(classifier, batch.to(device))
            if logits.shape[1] != len(images.classes):
                raise ValueError(
                    f"it has {logits.shape[1]} classes, the image set and its peers {len(images.classes)}"
                )
            predictions.append(logits.argmax(1).cpu())
    return torch.cat(predictions).numpy().astype(np.int16)


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


def _settings(
    zoo: Mapping[str, nn.Module], images: ImageSet, attack: Attack, *, batch_size: int, device: str
) -> dict[str, Any]:
    """Everything that a study's numbers depend on, as it goes into the attributes."""
    function = attack.func if isinstance(attack, partial) else attack
    name = getattr(function, "__qualname__", type(function).__qualname__)
    packages = ("modelsim", "torch", "timm", "numpy")
    return {
        "attack": f"{function.__module__}.{name}",
        "attack_settings": attack_settings(attack),
        "canvas_rule": CANVAS_RULE,
        "images": images.name,
        "images_sha256": images.fingerprint(),
        "batch_size": batch_size,
        "device": device,
        "versions": {package: version(package) for package in packages},
        "models": {name: fingerprint(zoo[name]) for name in zoo},
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_same_settings(store: Path, stored: Any, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a study that was made otherwise, naming each difference."""
    before, now = dict(_flat(stored)), dict(_flat(settings))
    differences = [
        f"{key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differences or list(stored["models"]) != list(settings["models"]):
        what = "; ".join(differences) or "the order of the models"
        raise ValueError(
            f"{store} was made with other settings ({what}): choose another folder, "
            "or delete it to start anew"
        )


def _create(store: Path, zoo: Mapping[str, nn.Module], images: ImageSet, settings: Mapping[str, Any]) -> None:
    """Write a store with everything but the attacks; it appears whole or not at all."""
    clean = np.stack([_predict(n, zoo[n], images.images, images, device=settings["device"]) for n in zoo])
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
    _add(group, "finished", ("source",), (n,), (1,), "bool")
    unfinished.rename(store)


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
    for name in _ABSENT:
        if name not in ("perturbation", "adversarial_prediction"):
            _read(group, store, name, advice=f"delete {store} and run the transfer again")
    return group


def _check_finished(group: zarr.Group, store: Path) -> NDArray[np.bool_]:
    """Return which sources are finished, after reading each of them back whole."""
    finished: NDArray[np.bool_] = np.asarray(_array(group, "finished")[:])
    for index in map(int, np.flatnonzero(finished)):
        marker = store / "finished" / f"c.{index}"
        advice = f"delete {marker} and run the transfer again: it recomputes this source only"
        for name in ("adversarial_prediction", "perturbation"):
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
        settings, canvas rule and versions are attributes.

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
    for name in set(study.variables) - {"perturbation"}:
        study[name].load()
    labels = {name: np.array(study[name].values.tolist()) for name in ("source", "target", "image", "class")}
    study = study.assign_coords(labels)
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
    change = torch.from_numpy(study.perturbation.sel(source=source).values).to(torch.int16)
    return (_to_8_bit(images.images) + change).float() / 255
