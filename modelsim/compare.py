"""Where does a classifier of one's own stand? One more row and column of a study."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from modelsim import attacks
from modelsim.images import ImageSet, fashion_mnist
from modelsim.transfer import (
    Attack,
    adversarial_images,
    attack_settings,
    perturbation,
    perturbed,
    predictions,
)
from modelsim.zoo import fingerprint, load_zoo, unknown_name_message


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
        From `open_study`, or a part of one with the same models as sources and targets.
    name : str
        Of the classifier, in the result.
    images : ImageSet, optional
        The images of the study; by default Fashion-MNIST's test images that it names.
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

    Raises
    ------
    ValueError
        If `name` is taken, images, attack or a model of the zoo are not those of the study, or the
        classifier misbehaves (wrong shape, NaN, another number of classes).
    """
    names = _names(study, name)
    images = images or study_images(study)
    attack = attack or _attack(study)
    _check_attack(study, attack)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    zoo = zoo or load_zoo(names=names)
    batch_size = study.attrs["batch_size"]
    attacks_and_evaluations = -(-len(images) // batch_size) + 2 * len(names) + 2
    with tqdm(total=attacks_and_evaluations, desc=name, disable=not progress) as bar:

        def shown(of: str, model: nn.Module, canvas: torch.Tensor) -> NDArray[np.int16]:
            bar.update()
            return predictions(of, model, canvas, images, device=device)

        column = [shown(name, classifier, adversarial_images(study, s, images)) for s in names]
        clean = shown(name, classifier, images.images)
        change = perturbation(name, classifier, images, attack, batch_size=batch_size, device=device, bar=bar)
        mine = perturbed(images, change)
        row = [shown(target, _checked(zoo, target, study), mine) for target in names]
        row.append(shown(name, classifier, mine))
    return _extended(study, name, row, column, clean)


def _extended(
    study: xr.Dataset,
    name: str,
    row: list[NDArray[np.int16]],
    column: list[NDArray[np.int16]],
    clean: NDArray[np.int16],
) -> xr.Dataset:
    names = [*study.source.values.tolist(), name]
    kept = study[["label", "clean_prediction", "adversarial_prediction"]]
    extended = kept.reindex(source=names, target=names, fill_value=-1)
    extended.clean_prediction.loc[{"target": name}] = clean
    extended.adversarial_prediction.loc[{"source": names[:-1], "target": name}] = np.stack(column)
    extended.adversarial_prediction.loc[{"source": name}] = np.stack(row)
    return extended


def _names(study: xr.Dataset, name: str) -> list[str]:
    names: list[str] = study.source.values.tolist()
    if names != study.target.values.tolist():
        raise ValueError(
            f"the study's sources and targets must be the same models, got {len(names)} sources and "
            f"{study.sizes['target']} targets: select both, study.sel(source=names, target=names)"
        )
    if name in names:
        raise ValueError(f"{name!r} is a model of the study already: give the classifier another name")
    return names


def study_images(study: xr.Dataset) -> ImageSet:
    """Return the images of a study, or of a part of one, that are among the book's.

    Raises
    ------
    ValueError
        If one of them isn't.
    """
    test = fashion_mnist("test")
    places = {image: place for place, image in enumerate(test.ids)}
    wanted = study.image.values.tolist()
    if not set(wanted) <= places.keys():
        raise ValueError(
            f"the study's images ({study.attrs['images']}) don't ship with the book: give `images`"
        )
    return test[[places[image] for image in wanted]]


def _attack(study: xr.Dataset) -> Attack:
    module, _, function = study.attrs["attack"].rpartition(".")
    if module != attacks.__name__ or not hasattr(attacks, function):
        raise ValueError(f"the study's attack is {study.attrs['attack']}: give it as `attack`")
    return partial(getattr(attacks, function), **study.attrs["attack_settings"])


def _check_attack(study: xr.Dataset, attack: Attack) -> None:
    there, given = study.attrs["attack_settings"], attack_settings(attack)
    if there != given:
        raise ValueError(f"the study's attack has the settings {there}, the one given {given}")


def _checked(zoo: Mapping[str, nn.Module], name: str, study: xr.Dataset) -> nn.Module:
    if name not in zoo:
        raise ValueError(unknown_name_message("model", name, zoo))
    model: Any = zoo[name]
    if fingerprint(model) != study.attrs["models"][name]:
        raise ValueError(f"{name!r} of the zoo is not the one in the study: its weights differ")
    return model
