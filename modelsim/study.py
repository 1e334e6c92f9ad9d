"""What a run leaves on disk: one store a study, its format, its checks, and how it grows.

A store takes arrays and names, not models. While it is made, every read and write goes by the names of
models, in the store as it is then: a worker left over from a run that was killed can't write into
another store that has taken the place of its own.
"""

import json
import os
import platform
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import Crc32cCodec, ZstdCodec

from modelsim.images import ImageSet, to_canvas

STORE = "study.zarr"
"""Name of the store in the folder of a study."""

Classes = NDArray[np.int16]  # that are predicted
Change = NDArray[np.int8]  # of every pixel, in 1/255

_Group = Any  # a zarr group; by zarr's own types an item of it may be a group too

_FORMAT = "modelsim study 2"
# Dimensions and type of every array, and the value, never a real one, where a chunk is missing.
_ARRAYS: Mapping[str, tuple[str, Any, Any]] = {
    "source": ("source", str, ""),
    "target": ("target", str, ""),
    "image": ("image", str, ""),
    "class": ("class", str, ""),
    "image_sha256": ("image", str, ""),
    "label": ("image", "int16", -1),
    "clean_prediction": ("target image", "int16", -1),
    "adversarial_prediction": ("source target image", "int16", -1),
    "perturbation": ("source image channel y x", "int8", -128),
    "images_without_gradient": ("source", "int32", -1),
    "finished": ("source", "bool", False),
    "test_image": ("test_image", str, ""),
    "test_label": ("test_image", "int16", -1),
    "clean_probability": ("target test_image class", "uint16", 65_535),
}

_OF_ONE_MODEL = ("adversarial_prediction", "perturbation", "images_without_gradient", "clean_probability")
_OF_TEST_IMAGES = ("test_image", "test_label", "clean_probability")
_LEFT_ON_DISK = {"perturbation", "clean_probability"}
PROBABILITY_STEPS = 10_000
"""A probability is stored as a whole number of such parts."""

_ATTRIBUTES: Mapping[str, Any] = {
    "perturbation": {"units": "1/255"},
    # By this one xarray, and others that know the CF convention, read floats in 0 … 1.
    "clean_probability": {"scale_factor": 1 / PROBABILITY_STEPS},
}

# Share of the images on which one network may be told otherwise by another processor.
_SAME = 0.005


class Store:
    """A study that is being made.

    Parameters
    ----------
    path : Path
        Of the store; it needn't exist.
    settings : mapping
        All that its numbers depend on, as it goes into the attributes; `"models"` maps the name of each
        to its fingerprint.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, settings

    def check_settings(self) -> None:
        """Raise a ValueError that names the differences, unless this is the stored study or extends it."""
        before, now = dict(_flat(stored_settings(self.path))), dict(_flat(self.settings))
        added = {key for key in now.keys() - before.keys() if key.startswith(("models.", "test_images"))}
        differences = setting_differences(before, {key: now[key] for key in now if key not in added})
        if before and differences:
            absent = [key for key in before if key.startswith("models.") and key not in now]
            only = all(difference.startswith(("models.", "and ")) for difference in differences)
            advice = "give a zoo that holds all of its models, or " if absent and only else ""
            raise ValueError(
                f"{self.path} was made with other settings ({'; '.join(differences)}): {advice}choose "
                "another folder"
            )

    def prepare(
        self, clean: Mapping[str, Classes], images: ImageSet, test_images: ImageSet | None
    ) -> list[str]:
        """Create the store, or extend the one that is there by the models and test images that are new.

        Parameters
        ----------
        clean : mapping
            The predicted classes (image,) of every model.

        Returns
        -------
        list of str
            The sources that aren't finished.

        Raises
        ------
        ValueError
            If the store there has other settings or is damaged, or a model of it tells the images otherwise.
        """
        _finish_replacement(self.path)
        self.check_settings()
        known = _open_store(self.path, mode="r+") if self.path.exists() else None
        if known is not None:
            _finished(known, self.path)
            stored = dict(zip(_models(known), known["clean_prediction"][:], strict=True))
            for name in stored:
                check_same_predictions(name, stored[name], clean[name])
            clean = {name: stored.get(name, clean[name]) for name in clean}
        if known is None or not self._is(known):
            self._create(_first_values(clean, images, test_images), images.pixels.shape[1:], known)
        for leftover in self.path.rglob("*.partial"):
            leftover.unlink(missing_ok=True)
        finished = _finished(self._group(), self.path)
        return [name for name in self.settings["models"] if name not in finished]

    def known(self, array: str, source: str) -> NDArray[Any]:
        """Read what is known of a source that isn't finished; what is missing or damaged counts as absent."""
        return _known(self._group(), array, source)

    def fill(self, array: str, source: str, compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return all that an array holds of one source; compute and store it if that isn't known.

        In a study without perturbations, these are always computed and never stored.
        """
        if array not in _arrays(self._group()):
            return compute()
        known = self.known(array, source)
        if is_absent(array, known):
            known = compute()
            self.write(array, source, known)
        return known

    def write(self, array: str, source: str, values: Any) -> None:
        """Store all that an array holds of one source."""
        group = self._group()
        group[array][_models(group).index(source)] = values

    def _group(self) -> _Group:
        """Open the store as it is now, and refuse it if it is another study's by now."""
        group = zarr.open_group(self.path, mode="r+")
        if not self._is(group):
            raise ValueError(f"{self.path} has been replaced by another study since this one was begun")
        return group

    def _is(self, group: _Group) -> bool:
        there = group.attrs["settings"]
        return there == self.settings and list(there["models"]) == list(self.settings["models"])

    def put(self, study: xr.Dataset, change: Callable[[str], Change]) -> None:
        """Write a finished study that is at hand, in place of one of fewer models.

        Parameters
        ----------
        study : Dataset
            All but the perturbations.
        change : callable
            Returns the perturbations (image, channel, y, x) made on a source.
        """
        self.check_settings()
        names = study.source.values.tolist()
        lengths = {**study.sizes} | dict(zip(("channel", "y", "x"), change(names[0]).shape[1:], strict=True))
        with self._new(lengths) as group:
            for name in {*_arrays(group)} - {"perturbation", "finished"}:
                values = study[name].values
                steps = np.rint(values * PROBABILITY_STEPS) if name == "clean_probability" else values
                group[name][:] = steps
            for place, name in enumerate(names):
                group["perturbation"][place] = change(name)
            group["finished"][:] = True

    def _create(self, values: Mapping[str, NDArray[Any]], shape: Sequence[int], known: _Group | None) -> None:
        """Write a store with all but the attacks that aren't `known`."""
        lengths = {name: len(values[name]) for name in values}
        with self._new(lengths | dict(zip(("channel", "y", "x"), shape, strict=True))) as group:
            for name in values:
                group[name][:] = np.array(values[name])
            if known is not None:
                _inherit(group, known)

    @contextmanager
    def _new(self, lengths: Mapping[str, int]) -> Iterator[_Group]:
        """Hand out a new store of empty arrays, which appears whole or not at all."""
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        hardware = f"{os.cpu_count()} CPUs, {platform.machine()}"
        attributes = {"format": _FORMAT, "settings": dict(self.settings), "hardware": hardware}
        group: _Group = zarr.create_group(unfinished, attributes=attributes)
        for name in _arrays(group):
            _add(group, name, lengths)
        yield group
        if self.path.exists():
            self.path.rename(_replaced(self.path))
        unfinished.rename(self.path)
        _finish_replacement(self.path)


def _first_values(
    clean: Mapping[str, Classes], images: ImageSet, test_images: ImageSet | None
) -> dict[str, Any]:
    """Return all that is known before the first attack, by array."""
    models, predictions = list(clean), np.stack(list(clean.values()))
    values = {"source": models, "target": models, "clean_prediction": predictions}
    values |= {"image": images.ids, "image_sha256": images.hashes(), "label": images.labels.numpy()}
    values |= {"class": images.classes}
    if test_images is not None:
        values |= {"test_image": test_images.ids, "test_label": test_images.labels.numpy()}
    return values


def _add(group: _Group, name: str, lengths: Mapping[str, int]) -> None:
    """Add an empty array, a chunk a model where it has one, compressed and with checksums."""
    dimensions, dtype, absent = _ARRAYS[name]
    shape = tuple(lengths[dimension] for dimension in dimensions.split())
    group.create_array(
        name,
        shape=shape,
        chunks=(1, *shape[1:]) if name in (*_OF_ONE_MODEL, "finished") else shape,
        dtype=dtype,
        fill_value=absent,
        dimension_names=dimensions.split(),
        # Perturbations are nearly noise: 19 saves 6 % of what 1 leaves, and takes a hundred times as long.
        compressors=[ZstdCodec(level=1 if name == "perturbation" else 19), Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        attributes=_ATTRIBUTES.get(name),
    )


def _inherit(group: _Group, known: _Group) -> None:
    """Copy what a store of fewer models knows of each source."""
    before, now = _models(known), _models(group)
    places = [now.index(name) for name in before]
    for place, name in zip(places, before, strict=True):
        for array in {*_OF_ONE_MODEL} & {*_arrays(known)}:
            values = _known(group, array, name)
            values[places if array == "adversarial_prediction" else ...] = _known(known, array, name)
            group[array][place] = values


def _known(group: _Group, name: str, source: str) -> NDArray[Any]:
    array = group[name]
    try:
        return np.array(array[_models(group).index(source)])
    except (OSError, ValueError, KeyError, RuntimeError):
        # Damage in a finished source has been reported, with the advice to have it computed anew.
        return np.full(array.shape[1:], _ARRAYS[name][2], array.dtype)


def is_absent(array: str, values: NDArray[Any]) -> bool:
    """Tell whether a value of those that are known, of one source or pair, is yet to be computed."""
    return bool((values == _ARRAYS[array][2]).any())


def _models(group: _Group) -> list[str]:
    return list(group.attrs["settings"]["models"])


def _replaced(store: Path) -> Path:
    return store.with_name(f"{store.name}.replaced")


def _finish_replacement(store: Path) -> None:
    """Bring a store back if the run that replaced it was killed on the way, else remove it."""
    replaced = _replaced(store)
    if replaced.exists() and not store.exists():
        replaced.rename(store)
    elif replaced.exists():
        shutil.rmtree(replaced)


def stored_settings(store: Path) -> dict[str, Any]:
    """Return the settings of a store, none if there is no store.

    Raises
    ------
    FileExistsError
        If it is something else than a study.
    """
    # A run that was killed while it replaced a store may have left it under its other name.
    found = [path for path in (store, _replaced(store)) if path.exists()]
    return dict(_open_group(found[0], mode="r").attrs["settings"]) if found else {}


def versions() -> dict[str, str]:
    """Return the versions of the packages on which numbers depend."""
    return {package: version(package) for package in ("torch", "timm", "numpy")}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def setting_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say how the settings of what is stored differ from those asked for now; of many models, name three."""
    differences = [
        f"{key}: {_short(before.get(key, 'absent'))} there, {_short(now.get(key, 'absent'))} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    models = [difference for difference in differences if difference.startswith("models.")]
    others = [difference for difference in differences if difference not in models]
    more = [f"and {len(models) - 3} models more"] if models[3:] else []
    return others + models[:3] + more


def _short(setting: object) -> str:
    """Shorten the hash of a file, an image set or a network."""
    text = str(setting)
    return f"{text[:8]}…" if re.fullmatch("[0-9a-f]{64}", text) else text


def check_same_predictions(name: str, stored: Classes, now: Classes) -> None:
    """Raise a ValueError if a model tells more of the clean images otherwise than rounding can explain."""
    if (differing := float((stored != now).mean())) > _SAME:
        raise ValueError(
            f"model {name!r} is not the one in the study: its weights are the same, but it tells "
            f"{differing:.1%} of the clean images otherwise (another normalisation or resize?)"
        )


def _arrays(group: _Group) -> list[str]:
    """Names of the arrays that a store must have."""
    settings = group.attrs["settings"]
    without = {"perturbation"} if not settings["perturbations"] else set()
    without |= {*_OF_TEST_IMAGES} if "test_images" not in settings else set()
    return [name for name in _ARRAYS if name not in without]


def _open_group(store: Path, *, mode: Literal["r", "r+"]) -> _Group:
    try:
        group = zarr.open_group(store, mode=mode)
    except (OSError, ValueError, KeyError) as error:
        raise FileExistsError(f"{store} is not a study, or its zarr.json is damaged: {error}") from error
    if (found := group.attrs.get("format")) != _FORMAT:
        what = f"has the format {found!r}, not {_FORMAT!r}" if found else "is not a modelsim study"
        raise FileExistsError(f"{store} {what}: choose another folder")
    return group


def _open_store(store: Path, *, mode: Literal["r", "r+"]) -> _Group:
    """Open a store and read every array but the large ones once, so that damage is found at once.

    Raises
    ------
    FileExistsError
        If it is something else than a study.
    ValueError
        If an array can't be read back whole.
    """
    group = _open_group(store, mode=mode)
    for name in _arrays(group):
        if name not in _OF_ONE_MODEL:
            _read(group, store, name, ..., f"delete {store} and run the transfer again")
    return group


def _finished(group: _Group, store: Path) -> list[str]:
    """Return which sources are finished, after reading each of them back whole."""
    finished = np.flatnonzero(group["finished"][:]).tolist()
    for index in finished:
        marker = shlex.quote(str(store / "finished" / f"c.{index}"))
        advice = f"delete {marker} and run the transfer again: it recomputes this source only"
        for name in {*_arrays(group)} & {*_OF_ONE_MODEL}:
            _read(group, store, name, index, advice)
    return [_models(group)[index] for index in finished]


def _read(group: _Group, store: Path, name: str, index: Any, advice: str) -> None:
    """Raise, naming store, array and advice, unless an array (or one source of it) can be read whole."""
    try:
        values = np.asarray(group[name][index])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        why = str(error)
    else:
        if name == "finished" or not is_absent(name, values):
            return
        why = "missing"
    what = name if index is ... else f"{name} of source {index}"
    raise ValueError(
        f"study {store}: {what} is truncated or corrupted ({why}). "
        f"Restore the store from where it came, or {advice}"
    )


def check_folder(path: str | Path) -> Path:
    """Return the folder of a study, or raise a FileNotFoundError that names it if this is its store."""
    if (folder := Path(path)).name == STORE:
        raise FileNotFoundError(f"{folder} is a store: give the folder that it is in, {folder.parent}")
    return folder


def open_study(path: str | Path) -> xr.Dataset:
    """Open a study that `transfer` has written.

    Examples
    --------
    >>> study = open_study("data/fashion69")
    >>> study.adversarial_prediction.sel(source="resnet50", target="convnext_tiny")

    Parameters
    ----------
    path : path
        The folder that was given to `transfer` as `out`. Where it isn't, it is looked for from each folder
        above too, so that a path from the root of a clone does in all of the clone.

    Returns
    -------
    Dataset
        `adversarial_prediction` (source, target, image), `clean_prediction` (target, image), `label`
        (image): class indices; `images_without_gradient` (source): how many clean images leave an attack
        no gradient to follow. If they are kept: `perturbation` (source, image, channel, y, x): int8 in
        1/255, read from disk when it is used. If test images were given: `clean_probability` (target,
        test_image, class), float in steps of 0.0001, read from disk when it is used, and the coordinates
        `test_image` (ids) and `test_label` (class indices). Names of models, images and classes are
        coordinates, and so are the fingerprints `model_sha256` (target) and `image_sha256` (image);
        attack, settings (JSON where there are several), canvas rule and versions are attributes.

    Raises
    ------
    FileNotFoundError
        If there is no study.
    ValueError
        If the study isn't finished or is damaged.
    """
    stores = [above / check_folder(path) / STORE for above in (Path(), *Path.cwd().parents)]
    # As in `stored_settings`.
    if not (found := [path for store in stores for path in (store, _replaced(store)) if path.is_dir()]):
        where = f"no study at {stores[0]}, neither from {Path.cwd()} nor from a folder above it"
        below = sorted({str(one.parent) for store in stores for one in store.parent.glob(f"*/{STORE}")})
        folder = f"its folder, such as {' or '.join(below[:3])}" if below else "its folder"
        command = f"python -m modelsim transfer --out {shlex.quote(str(path))}"
        raise FileNotFoundError(f"{where}: give the path of {folder}, or make one with `{command}`")
    store = found[0]
    group = _open_store(store, mode="r")
    finished, models = _finished(group, store), _models(group)
    if len(finished) < len(models):
        raise ValueError(
            f"study {store} has {len(finished)} of {len(models)} sources: "
            "run the same `transfer` again to finish it"
        )
    study = xr.open_zarr(store, consolidated=False, chunks=None).drop_vars("finished").drop_encoding()
    for name in set(study.variables) - _LEFT_ON_DISK:
        study[name].load()
    names = {"source", "target", "image", "class", "image_sha256", "test_image"} & {*study.variables}
    study = study.assign_coords({n: (study[n].dims, np.array(study[n].values.tolist())) for n in names})
    if "test_label" in study:
        study = study.set_coords("test_label")
    return _with_plain_attributes(study)


def _with_plain_attributes(study: xr.Dataset) -> xr.Dataset:
    """Lay out the settings as every format can keep them, and the models' fingerprints by model."""
    settings = study.attrs.pop("settings")
    models = settings.pop("models")
    hashes = np.array([models[name] for name in study.target.values])
    return study.assign_attrs(plain_attributes(settings)).assign_coords(model_sha256=("target", hashes))


def plain_attributes(settings: Mapping[str, Any]) -> dict[str, str | int]:
    """Turn all that isn't a string or a whole number into JSON."""
    plain = (str, int)  # and not bool
    return {k: v if type(v) in plain else json.dumps(v, sort_keys=True) for k, v in settings.items()}


def settings_of(study: xr.Dataset) -> dict[str, Any]:
    """Return the settings that a study was made with, as they are stored."""
    kept = {key: study.attrs[key] for key in study.attrs if key not in ("format", "hardware")}
    written = {"attack_settings", "fold", "perturbations", "versions"} & {*kept}
    models = dict(zip(study.target.values.tolist(), study.model_sha256.values.tolist(), strict=True))
    return kept | {key: json.loads(kept[key]) for key in written} | {"models": models}


def images_of(study: xr.Dataset, images: ImageSet) -> ImageSet:
    """Return the images of a study, or of a part of one, from a set that holds them.

    Raises
    ------
    ValueError
        If one of them isn't in the set, or has other pixels or another label there.
    """
    hashes = pd.Series(images.hashes(), images.ids)
    expected = study.image_sha256.to_series()
    if len(other := expected[hashes.reindex(expected.index) != expected]):
        raise ValueError(
            f"these are not the images of the study ({study.attrs['images']}): {len(other)} of "
            f"{len(expected)} aren't among them or differ, such as {other.index[0]}; give `images`"
        )
    return images[hashes.index.get_indexer(expected.index)]


def adversarial_images(study: xr.Dataset, source: str, images: ImageSet) -> Tensor:
    """Rebuild the adversarial images of one source exactly as the targets saw them.

    Parameters
    ----------
    study : Dataset
        From `open_study`, or a part of it.
    source : str
        A source of the study.
    images : ImageSet
        The image set of the study; of a part, that part or the whole set.

    Returns
    -------
    Tensor
        float32 (n, channel, height, width) in [0, 1].

    Raises
    ------
    ValueError
        If `images` is another set than the study's, `source` is not in it, or it keeps no perturbations.
    """
    return to_canvas(perturbed(images_of(study, images), stored_change(study, source)))


def stored_change(study: xr.Dataset, source: str) -> Change:
    """Return the perturbations made on one source (image, channel, y, x), or say why there are none."""
    if source not in study.source:
        raise ValueError(f"{source!r} is not a source of the study: it has {', '.join(study.source.values)}")
    if "perturbation" not in study:
        raise ValueError(
            "the study was made without perturbations, so its adversarial images can't be rebuilt: attack "
            f"{source} anew, or give `transfer` a zoo with one more model, which attacks all sources anew"
        )
    change: Change = study.perturbation.sel(source=source).values
    if is_absent("perturbation", change):  # as zarr reads what is no longer there
        raise ValueError(f"the perturbations of {source} are gone since the study was opened: open it again")
    return change


def to_8_bit(pixels: Tensor) -> Tensor:
    """Round (not truncate) a canvas to whole 255ths, as uint8."""
    return pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().to(torch.uint8)


def perturbed(images: ImageSet, change: Change) -> Tensor:
    """Return the pixels of `images` after a change in whole 255ths, as uint8."""
    # In 8 bit a sum goes round at 256, so that a negative change may be read as one of 256 more.
    return to_8_bit(images.pixels) + torch.from_numpy(np.ascontiguousarray(change)).view(torch.uint8)
