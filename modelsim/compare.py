"""Where does a classifier of one's own stand? One more row and column of a study."""

import json
import warnings
from collections import ChainMap
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from modelsim import attacks
from modelsim.images import ImageSet, fashion_mnist
from modelsim.study import (
    check_same_predictions,
    images_of,
    perturbed,
    plain_attributes,
    setting_differences,
    stored_change,
)
from modelsim.transfer import Attack, Engine, concerns, default_device, describe_attack
from modelsim.zoo import check_names, load_zoo, unknown_name_message


def compare(
    classifier: nn.Module,
    study: xr.Dataset,
    *,
    name: str = "mine",
    images: ImageSet | None = None,
    zoo: Mapping[str, nn.Module] | None = None,
    attack: Attack | None = None,
    device: str | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Measure one classifier against all models of a study; one attack, two evaluations a model.

    The classifier is attacked as the study's sources were and shown to its models; the study's stored
    adversarial images are shown to the classifier. Nothing is written.

    Examples
    --------
    >>> study = open_study("data/fashion69")
    >>> extended = compare(classifier, study, name="mine")
    >>> sat(extended).sel(model="mine").to_series().sort_values()

    Against a few models only:

    >>> few = ["resnet50", "convnext_tiny"]
    >>> compare(classifier, study.sel(source=few, target=few))

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
    zoo : mapping, optional
        The models of the study; by default those that ship with the book.
    attack : callable
        The attack of the study, with the same settings; may be left out if it is one of modelsim's.
    device : str, optional
        By default `"cuda"` where there is one, else `"cpu"`.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Dataset
        The predictions of the study with `name` as one more source and target, for all scores and
        analyses; without perturbations and clean probabilities.

    Warns
    -----
    UserWarning
        If the scores of the classifier are doubtful; see `transfer`.

    Raises
    ------
    TypeError, ValueError
        If `name` is taken, images, attack or a model of the zoo are not those of the study, the study
        keeps no perturbations, or the classifier misbehaves; see `transfer`.
    """
    names = _names(study, name)
    images = images_of(study, images or fashion_mnist("test"))
    networks = ChainMap({name: classifier}, cast("Any", zoo or load_zoo(names=names)))
    batch_size, fold = study.attrs["batch_size"], json.loads(study.attrs["fold"])
    engine = Engine(networks, images, _attack(study, attack), batch_size, device or default_device(), fold)
    clean = engine.first_predictions(name)
    for peer in tqdm(names, desc=f"{name}: the others", disable=not progress, leave=False):
        _check_peer(peer, engine, study)
    row, column = _measured(name, names, engine, study, progress=progress)
    extended = _extended(study, name, row, column, clean)
    if "images_without_gradient" in study:
        extended.images_without_gradient.loc[{"source": name}] = engine.images_without_gradient(name)
    hashes = np.array([*study.model_sha256.values, engine.fingerprints[name]])
    extended = extended.assign_coords(model_sha256=("target", hashes))
    for concern in concerns(extended, [name]):
        warnings.warn(concern, stacklevel=2)
    return extended


def _measured(
    name: str, others: list[str], engine: Engine, study: xr.Dataset, *, progress: bool
) -> tuple[list[NDArray[np.int16]], list[NDArray[np.int16]]]:
    """Return what all see in the images made on one model, itself last, and what it sees in all others'."""
    batches = -(-len(engine.images) // engine.batch_size)
    with tqdm(total=batches + 2 * len(others) + 1, desc=name, disable=not progress) as bar:

        def shown(target: str, canvas: Tensor) -> NDArray[np.int16]:
            bar.update()
            return engine.predictions(target, canvas)

        column = [shown(name, perturbed(engine.images, stored_change(study, other))) for other in others]
        mine = perturbed(engine.images, engine.perturbation(name, bar.update))
        return [shown(target, mine) for target in (*others, name)], column


def _extended(
    study: xr.Dataset,
    name: str,
    row: list[NDArray[np.int16]],
    column: list[NDArray[np.int16]],
    clean: NDArray[np.int16],
) -> xr.Dataset:
    names = [*study.source.values.tolist(), name]
    kept = study.drop_dims(["test_image", "channel"], errors="ignore").drop_vars("model_sha256")
    extended = kept.reindex(source=names, target=names, fill_value=-1)
    extended.clean_prediction.loc[{"target": name}] = clean
    extended.adversarial_prediction.loc[{"source": names[:-1], "target": name}] = np.stack(column)
    extended.adversarial_prediction.loc[{"source": name}] = np.stack(row)
    return extended


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
