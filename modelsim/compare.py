"""Where does a classifier of one's own stand? One more row and column of a study."""

import json
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import xarray as xr
from torch import Tensor, nn
from tqdm import tqdm

from modelsim import attacks
from modelsim import study as studies
from modelsim.catalogue import CATALOGUE
from modelsim.images import ImageSet, check_strings, fashion_mnist
from modelsim.transfer import Attack, Engine, default_device, describe_attack, warned
from modelsim.workers import sole_writer
from modelsim.zoo import load_zoo, split_model_name


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

    >>> few = ["resnet50", "convnext_tiny", "deit_small_patch16_224"]
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
        study, or one of fewer of the models, which is replaced. Where it holds the result already, also
        among other models, that is opened.
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
    _check_names(study, name)
    networks = ChainMap({name: classifier}, cast("Any", _others(study, zoo or {})))
    test_images = _test_images(study, images, test_images)
    images = studies.images_of(study, images or fashion_mnist("test"))
    batch_size, fold = study.attrs["batch_size"], json.loads(study.attrs["fold"])
    precision, device = study.attrs.get("precision", "fp32"), device or default_device()
    attack = _attack(study, attack)
    engine = Engine(networks, images, attack, batch_size, device, fold, precision=precision)
    newcomer = _Newcomer(name, study, engine, engine.first_predictions(name), test_images, progress)
    if out is None:
        newcomer.check_others()
        extended, _ = newcomer.measured()
    else:
        extended = newcomer.kept(studies.check_folder(out).absolute())
    return warned(extended, [name])


@dataclass(frozen=True)
class _Newcomer:
    """One more model of a study, and what it takes to measure it."""

    name: str
    study: xr.Dataset
    engine: Engine
    clean: studies.Classes  # what it sees in the clean images (image,)
    test_images: ImageSet | None
    progress: bool

    def kept(self, folder: Path) -> xr.Dataset:
        """Open the study with the newcomer where it is kept already, else measure it and write it."""
        store = studies.Store(folder / studies.STORE, self._settings())
        there = studies.stored_settings(store.path)
        models = {name: there.get("models", {}).get(name) for name in store.settings["models"]}
        if there | {"models": models} != store.settings:
            store.check_settings()
            self.check_others()
            with sole_writer(folder):
                extended, change = self.measured()
                store.put(
                    extended, lambda at: change if at == self.name else studies.stored_change(self.study, at)
                )
        return studies.open_study(folder).sel(source=[*models], target=[*models])

    def check_others(self) -> None:
        """Raise unless the zoo's models are the study's, by their weights and by what they tell."""
        names = self.study.source.values.tolist()
        for other in tqdm(names, desc=f"{self.name}: the others", disable=not self.progress, leave=False):
            told = self.engine.predictions(other, self.engine.images.pixels)
            if self.engine.fingerprints[other] != self.study.model_sha256.sel(target=other):
                raise ValueError(f"{other!r} of the zoo is not the one in the study: its weights differ")
            studies.check_same_predictions(other, self.study.clean_prediction.sel(target=other).values, told)

    def measured(self) -> tuple[xr.Dataset, studies.Change]:
        """Return the study with the newcomer, but without perturbations, and the newcomer's perturbation."""
        names, engine = self.study.source.values.tolist(), self.engine
        batches = -(-len(engine.images) // engine.batch_size)
        with tqdm(total=batches + 2 * len(names) + 1, desc=self.name, disable=not self.progress) as bar:

            def shown(target: str, canvas: Tensor) -> studies.Classes:
                bar.update()
                return engine.predictions(target, canvas)

            others = (engine.adversarial(studies.stored_change(self.study, other)) for other in names)
            column = np.stack([shown(self.name, canvas) for canvas in others])
            change = engine.perturbation(self.name, bar.update)
            mine = engine.adversarial(change)
            row = np.stack([shown(target, mine) for target in (*names, self.name)])
        return self._extended(row, column), change

    def _extended(self, row: studies.Classes, column: studies.Classes) -> xr.Dataset:
        """Lay out what all see in the newcomer's images, itself last, and what it sees in all others'."""
        study, name, engine = self.study, self.name, self.engine
        names = [*study.source.values.tolist(), name]
        unasked = ["channel"] if self.test_images else ["channel", "test_image"]
        kept = study.drop_dims(unasked, errors="ignore").drop_vars("model_sha256")
        extended = kept.reindex(source=names, target=names, fill_value=-1)
        extended.clean_prediction.loc[{"target": name}] = self.clean
        extended.adversarial_prediction.loc[{"source": names[:-1], "target": name}] = column
        extended.adversarial_prediction.loc[{"source": name}] = row
        if "images_without_gradient" in study:
            extended.images_without_gradient.loc[{"source": name}] = engine.images_without_gradient(name)
        if self.test_images:
            told = engine.probabilities(name, self.test_images.pixels) * (1 / studies.PROBABILITY_STEPS)
            extended.clean_probability.loc[{"target": name}] = told
        hashes = np.array([*study.model_sha256.values, engine.fingerprints[name]])
        return extended.assign_coords(model_sha256=("target", hashes))

    def _settings(self) -> dict[str, Any]:
        """Return the settings of the study, or of a part of it, with the newcomer."""
        settings = studies.settings_of(self.study) | {"images_sha256": self.engine.images.fingerprint()}
        settings["models"][self.name] = self.engine.fingerprints[self.name]
        if self.test_images:
            return settings | {"test_images_sha256": self.test_images.fingerprint()}
        return {key: settings[key] for key in settings if not key.startswith("test_images")}


def _test_images(study: xr.Dataset, images: ImageSet | None, given: ImageSet | None) -> ImageSet | None:
    """Return the images whose probabilities the study keeps, or None if they are not at hand."""
    if "clean_probability" not in study or (images and not given):
        return None
    given = given or fashion_mnist("test")
    part = given[pd.Index(given.ids).get_indexer(study.test_image.values)]
    if study.attrs["test_images_sha256"] not in (given.fingerprint(), part.fingerprint()):
        raise ValueError(f"not the study's test images ({study.attrs['test_images']}): give `test_images`")
    return part


def _others(study: xr.Dataset, given: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """Return the models of a study: those given, and those that ship with the book."""
    ours = [name for name in study.target.values.tolist() if name not in [*given]]
    if strange := [name for name in ours if split_model_name(name)[0] not in CATALOGUE]:
        raise ValueError(f"the study's {strange[0]!r} isn't the book's: give it in `zoo`, or leave it out")
    return ChainMap(cast("Any", given), cast("Any", load_zoo(names=ours) if ours else {}))


def _check_names(study: xr.Dataset, name: str) -> None:
    check_strings("names of models", [name])
    if not isinstance(study, xr.Dataset):
        kind = type(study).__name__
        raise TypeError(
            f"the study must be a Dataset, as from open_study(path), after the classifier; got {kind}"
        )
    names: list[str] = study.source.values.tolist()
    if names != study.target.values.tolist():
        raise ValueError(
            f"sources and targets must be the same models, got {len(names)} sources and "
            f"{study.sizes['target']} targets: select both, study.sel(source=names, target=names)"
        )
    if name in names:
        raise ValueError(f"{name!r} is a model of the study already: give the classifier another name")


def _attack(study: xr.Dataset, given: Attack | None) -> Attack:
    """Return the attack of the study: the one given, if it is that, or one of modelsim's."""
    module, _, function = study.attrs["attack"].rpartition(".")
    if given is None and module == attacks.__name__:
        return partial(getattr(attacks, function), **json.loads(study.attrs["attack_settings"]))
    if given is None:
        raise ValueError(f"the study's attack is {study.attrs['attack']}: give it as `attack`")
    there = {key: study.attrs[key] for key in study.attrs if key.startswith("attack")}
    if differences := studies.setting_differences(there, studies.plain_attributes(describe_attack(given))):
        raise ValueError(f"the attack is not the one of the study ({'; '.join(differences)})")
    return given
