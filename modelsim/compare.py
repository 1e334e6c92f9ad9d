"""Where does a classifier of one's own stand? One more row and column of a study."""

import json
import warnings
from collections import ChainMap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from modelsim import attacks
from modelsim.catalogue import CATALOGUE
from modelsim.images import ImageSet, fashion_mnist
from modelsim.study import (
    PROBABILITY_STEPS,
    STORE,
    Store,
    check_folder,
    check_same_predictions,
    images_of,
    open_study,
    perturbed,
    plain_attributes,
    setting_differences,
    settings_of,
    stored_change,
    stored_settings,
)
from modelsim.transfer import Attack, Engine, concerns, default_device, describe_attack
from modelsim.workers import sole_writer
from modelsim.zoo import check_names, load_zoo, split_model_name, unknown_name_message


def compare(
    classifier: nn.Module,
    study: xr.Dataset,
    *,
    name: str = "mine",
    images: ImageSet | None = None,
    test_images: ImageSet | None = None,
    zoo: Mapping[str, nn.Module] | None = None,
    attack: Attack | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Measure one classifier against all models of a study; one attack, two evaluations a model.

    The classifier is attacked as the study's sources were and shown to its models; the study's stored
    adversarial images are shown to the classifier.

    Examples
    --------
    >>> study = open_study("data/fashion69")
    >>> extended = compare(classifier, study, name="mine", out="runs/mine")
    >>> neighbours(extended, "mine").head()

    Against a few models and images only, for a first look:

    >>> few = ["resnet50", "convnext_tiny"]
    >>> compare(classifier, study.sel(source=few, target=few).isel(image=slice(200)))

    One more in the same folder:

    >>> compare(second, extended, name="second", zoo={"mine": classifier}, out="runs/mine")

    Parameters
    ----------
    classifier : nn.Module
        Canvas to logits.
    study : Dataset
        From `open_study`, or a part of one: of its images, or of its models, the same as sources and
        targets.
    name : str
        Of the classifier, in the result.
    images : ImageSet, optional
        A set that holds the images of the study; by default Fashion-MNIST's test images.
    test_images : ImageSet, optional
        Those whose probabilities the study keeps, if any; by default Fashion-MNIST's, unless `images` are
        given. Without them the result has no probabilities.
    zoo : mapping, optional
        Those models of the study that don't ship with the book.
    attack : callable
        The attack of the study, with the same settings; may be left out if it is one of modelsim's.
    out : path, optional
        Folder in which the study with the classifier is kept, whole, as by `transfer`; it may hold this
        study, or one of fewer of the models, which is replaced. Where it holds the result already, that is
        opened.
    device : str, optional
        By default `"cuda"` where there is one, else `"cpu"`.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Dataset
        The study with `name` as one more source and target, for all scores and analyses; with `out` as from
        `open_study`, else without perturbations.

    Warns
    -----
    UserWarning
        If the scores of the classifier are doubtful; see `transfer`.

    Raises
    ------
    TypeError, ValueError
        If `name` is taken, images, attack or a model of the zoo are not those of the study, the study
        keeps no perturbations, `out` holds another study, or the classifier misbehaves; see `transfer`.
    BlockingIOError, OSError
        If another run writes to `out`, or it can't be written.
    """
    names, others = _names(study, name), _others(study, zoo or {})
    test_images = _test_images(study, images, test_images)
    images = images_of(study, images or fashion_mnist("test"))
    networks = ChainMap({name: classifier}, cast("Any", others))
    batch_size, fold = study.attrs["batch_size"], json.loads(study.attrs["fold"])
    engine = Engine(networks, images, _attack(study, attack), batch_size, device or default_device(), fold)
    clean = engine.first_predictions(name)
    store = out and Store(check_folder(out).absolute() / STORE, _settings(study, name, engine, test_images))
    if store and stored_settings(store.path) == store.settings:
        extended = open_study(store.path.parent)
    else:
        if store:
            store.check_settings()
        for peer in tqdm(names, desc=f"{name}: the others", disable=not progress, leave=False):
            _check_peer(peer, engine, study)
        row, column, change = _measured(name, names, engine, study, progress=progress)
        extended = _extended(study, name, row, column, clean, engine, test_images)
        if store:
            extended = _kept(store, extended, lambda at: change if at == name else stored_change(study, at))
    for concern in concerns(extended, [name]):
        warnings.warn(concern, stacklevel=2)
    return extended


def _kept(store: Store, study: xr.Dataset, change: Callable[[str], NDArray[np.int8]]) -> xr.Dataset:
    """Write a study, and open it."""
    with sole_writer(store.path.parent):
        store.put(study, change)
    return open_study(store.path.parent)


def _measured(
    name: str, others: list[str], engine: Engine, study: xr.Dataset, *, progress: bool
) -> tuple[list[NDArray[np.int16]], list[NDArray[np.int16]], NDArray[np.int8]]:
    """Return what all see in one model's images, itself last; what it sees in all others'; their change."""
    batches = -(-len(engine.images) // engine.batch_size)
    with tqdm(total=batches + 2 * len(others) + 1, desc=name, disable=not progress) as bar:

        def shown(target: str, canvas: Tensor) -> NDArray[np.int16]:
            bar.update()
            return engine.predictions(target, canvas)

        column = [shown(name, perturbed(engine.images, stored_change(study, other))) for other in others]
        change = engine.perturbation(name, bar.update)
        mine = perturbed(engine.images, change)
        return [shown(target, mine) for target in (*others, name)], column, change


def _extended(
    study: xr.Dataset,
    name: str,
    row: list[NDArray[np.int16]],
    column: list[NDArray[np.int16]],
    clean: NDArray[np.int16],
    engine: Engine,
    test_images: ImageSet | None,
) -> xr.Dataset:
    names = [*study.source.values.tolist(), name]
    unasked = ["channel"] if test_images else ["channel", "test_image"]
    kept = study.drop_dims(unasked, errors="ignore").drop_vars("model_sha256")
    extended = kept.reindex(source=names, target=names, fill_value=-1)
    extended.clean_prediction.loc[{"target": name}] = clean
    extended.adversarial_prediction.loc[{"source": names[:-1], "target": name}] = np.stack(column)
    extended.adversarial_prediction.loc[{"source": name}] = np.stack(row)
    if "images_without_gradient" in study:
        extended.images_without_gradient.loc[{"source": name}] = engine.images_without_gradient(name)
    if test_images:
        told = engine.probabilities(name, test_images.images) / PROBABILITY_STEPS
        extended.clean_probability.loc[{"target": name}] = told
    hashes = np.array([*study.model_sha256.values, engine.fingerprints[name]])
    return extended.assign_coords(model_sha256=("target", hashes))


def _settings(study: xr.Dataset, name: str, engine: Engine, test_images: ImageSet | None) -> dict[str, Any]:
    """Return the settings of a study, or of a part of one, with one more model."""
    settings = settings_of(study)
    settings["images_sha256"] = engine.images.fingerprint()
    settings["models"][name] = engine.fingerprints[name]
    return settings if test_images else {k: settings[k] for k in settings if not k.startswith("test_images")}


def _test_images(study: xr.Dataset, images: ImageSet | None, given: ImageSet | None) -> ImageSet | None:
    """Return the images whose probabilities the study keeps, or None if they are not at hand."""
    if "clean_probability" not in study or (images and not given):
        return None
    given = given or fashion_mnist("test")
    if given.fingerprint() != study.attrs["test_images_sha256"]:
        raise ValueError(f"these are not the test images of the study ({study.attrs['test_images']})")
    return given[pd.Index(given.ids).get_indexer(study.test_image.values)]


def _others(study: xr.Dataset, given: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """Return the models of a study: those given, and those that ship with the book."""
    missing = [name for name in study.target.values.tolist() if name not in given]
    ours = [name for name in missing if split_model_name(name)[0] in CATALOGUE]
    return ChainMap(cast("Any", given), cast("Any", load_zoo(names=ours) if ours else {}))


def _names(study: xr.Dataset, name: str) -> list[str]:
    check_names([name])
    names: list[str] = study.source.values.tolist()
    if names != study.target.values.tolist():
        raise ValueError(
            f"sources and targets must be the same models, got {len(names)} sources and "
            f"{study.sizes['target']} targets: select both, study.sel(source=names, target=names)"
        )
    if name in names:
        raise ValueError(f"{name!r} is a model of the study already: give the classifier another name")
    return names


def _attack(study: xr.Dataset, given: Attack | None) -> Attack:
    """Return the attack of the study: the one given, if it is that, or one of modelsim's."""
    module, _, function = study.attrs["attack"].rpartition(".")
    if given is None and module == attacks.__name__:
        return partial(getattr(attacks, function), **json.loads(study.attrs["attack_settings"]))
    if given is None:
        raise ValueError(f"the study's attack is {study.attrs['attack']}: give it as `attack`")
    there = {key: study.attrs[key] for key in study.attrs if key.startswith("attack")}
    if differences := setting_differences(there, plain_attributes(describe_attack(given))):
        raise ValueError(f"the attack is not the one of the study ({'; '.join(differences)})")
    return given


def _check_peer(name: str, engine: Engine, study: xr.Dataset) -> None:
    """Raise unless the zoo's model of that name is the study's, by its weights and by what it tells."""
    if name not in [*engine.zoo]:
        raise ValueError(unknown_name_message("model", name, engine.zoo))
    told = engine.predictions(name, engine.images.images)
    if engine.fingerprints[name] != study.model_sha256.sel(target=name):
        raise ValueError(f"{name!r} of the zoo is not the one in the study: its weights differ")
    check_same_predictions(name, study.clean_prediction.sel(target=name).values, told)
