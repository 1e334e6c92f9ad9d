"""Other similarities of the same networks: from predictions, probabilities, features and gradients.

Each returns a symmetric matrix (model, other) that is larger the more similar two networks are.
"""

import copy
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import entr
from torch import nn
from tqdm import tqdm

from modelsim.attacks import frozen, input_gradients, logits
from modelsim.images import ImageSet, check_strings
from modelsim.scores import Floats, labelled
from modelsim.study import check_folder, setting_differences, versions
from modelsim.workers import sole_writer
from modelsim.zoo import fingerprint, naming


def prediction_agreement(study: xr.Dataset) -> xr.DataArray:
    """Share of the clean images of which two networks say the same, right or wrong: 0 … 1.

    Examples
    --------
    >>> prediction_agreement(open_study("data/fashion69")).sel(model="resnet50", other="resnet101")

    Parameters
    ----------
    study : Dataset
        From `transfer` or `open_study`; or any with `clean_prediction (target, image)`.
    """
    said = study.clean_prediction.transpose("target", "image").values
    return labelled((said[:, None] == said).mean(-1), study.target.values, "agreement")


def error_consistency(study: xr.Dataset) -> xr.DataArray:
    """Cohen's κ of being right: how much more than by chance two networks are right, or wrong, together.

    1 where always, 0 where as often as two independent networks of their accuracies; NaN where both are
    always right, or both always wrong. Parameters are those of `prediction_agreement`, and `label (image)`.

    References
    ----------
    Geirhos, Meding and Wichmann, *Beyond accuracy: quantifying trial-by-trial behaviour of CNNs and humans by
    measuring error consistency*, NeurIPS 2020, eq. (1) to (3).
    """
    right = (study.clean_prediction == study.label).transpose("target", "image").values.astype(float)
    accuracy, wrong = right.mean(1), 1 - right
    together = (right @ right.T + wrong @ wrong.T) / right.shape[1]
    chance = np.outer(accuracy, accuracy) + np.outer(1 - accuracy, 1 - accuracy)
    return labelled(_beyond_chance(together, chance), study.target.values, "error consistency")


def capa(study: xr.Dataset) -> xr.DataArray:
    """Chance-adjusted probabilistic agreement κₚ: how much more than by chance two networks say the same.

    Each draws its class from its probabilities; chance is two independent networks that give the true class
    the same mean probabilities and share the rest evenly. At most 1. The diagonal is a network against
    another draw of its own, so it is below 1 where it isn't sure.

    Parameters
    ----------
    study : Dataset
        With `clean_probability (target, test_image, class)`, of the images in `image` at least, and `label`.

    References
    ----------
    Goel et al., *Great Models Think Alike and this Undermines AI Oversight*, arXiv 2502.04313, sec. 2.
    """
    p, label = _probabilities(study), study.label.values
    same = np.einsum("aic,bic->ab", p, p, optimize=True) / p.shape[1]
    true = p[:, np.arange(len(label)), label].mean(1)
    chance = np.outer(true, true) + np.outer(1 - true, 1 - true) / (p.shape[2] - 1)
    return labelled(_beyond_chance(same, chance), study.target.values, "CAPA")


def jensen_shannon(study: xr.Dataset) -> xr.DataArray:
    """One minus the mean Jensen-Shannon divergence of two networks' probabilities, in bits: 0 … 1.

    Parameters are those of `capa`.

    References
    ----------
    Lin, *Divergence measures based on the Shannon entropy*, IEEE Transactions on Information Theory, 1991.
    """
    p = _probabilities(study)
    own = entr(p).sum(-1)
    mixed = np.stack([entr((p + one) / 2).sum(-1) for one in p])
    divergence = (mixed - (own[:, None] + own) / 2).mean(-1) / np.log(2)
    return labelled(1 - divergence, study.target.values, "Jensen-Shannon")


def linear_cka(features: Mapping[str, Floats]) -> xr.DataArray:
    """Linear centred kernel alignment of features (image, feature) of the same images: 0 … 1.

    Turning or scaling all features of a network doesn't count.

    Examples
    --------
    >>> linear_cka({"one": features, "turned": features @ rotation})

    References
    ----------
    Kornblith et al., *Similarity of Neural Network Representations Revisited*, ICML 2019, eq. (3) and (4).
    """
    centred = (np.asarray(x, np.float32) - np.mean(x, 0, dtype=np.float32) for x in features.values())
    grams = _unit(np.stack([(x @ x.T).ravel() for x in centred]))
    return labelled(grams @ grams.T, [*features], "linear CKA")


def gradient_cosine(gradients: Mapping[str, Floats]) -> xr.DataArray:
    """Mean over images of the cosine of two networks' input gradients (image, channel, y, x): -1 … 1.

    An image that leaves a network no gradient counts as 0.
    """
    flat = np.stack([_unit(gradient.reshape(len(gradient), -1)) for gradient in gradients.values()])
    cosines = np.einsum("aip,bip->ab", flat, flat, optimize=True) / flat.shape[1]
    return labelled(cosines, [*gradients], "cosine of gradients")


def _unit(rows: Floats) -> Floats:
    """Scale each row to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths, lengths, 1)


def _probabilities(study: xr.Dataset) -> Floats:
    of_images = study.clean_probability.sel(test_image=study.image.values)
    p = of_images.transpose("target", "test_image", "class").values.astype(float)
    return p / p.sum(-1, keepdims=True)  # stored probabilities are rounded


def _beyond_chance(observed: Floats, chance: Floats) -> Floats:
    return np.divide(observed - chance, 1 - chance, out=np.full_like(chance, np.nan), where=chance < 1)


def penultimate_features(classifier: nn.Module, images: ImageSet) -> Floats:
    """Return what a network of timm hands to its last layer: (image, feature).

    Raises
    ------
    ValueError
        If it isn't timm's, alone or in a `Classifier`: it has no `reset_classifier`.
    """
    classifier = copy.deepcopy(classifier)
    network: Any = getattr(classifier, "network", classifier)
    if not hasattr(network, "reset_classifier"):
        raise ValueError("features are read from timm's networks only, which have a reset_classifier")
    network.reset_classifier(0)
    return logits(classifier, images.pixels).numpy()


def measure(
    zoo: Mapping[str, nn.Module], images: ImageSet, *, out: str | Path, progress: bool = True
) -> xr.Dataset:
    """Compare networks by their penultimate features and by their input gradients.

    Goes through the networks once, forward and back; a run that is stopped goes on with the next network.
    Of features and gradients, which take some megabytes a network, nothing is left at the end.

    Examples
    --------
    >>> found = measure(load_zoo(names=["resnet50", "convnext_tiny"]), images, out="runs/measures")
    >>> found.linear_cka, found.gradient_cosine

    Parameters
    ----------
    zoo : mapping
        Networks of timm, alone or in a `Classifier`, by name, on the CPU.
    images : ImageSet
        Clean images; gradients are those of the cross-entropy with the label.
    out : path
        Folder of the result, `measures.nc`.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Dataset
        `linear_cka`, `gradient_cosine` (model, other); `seconds (model, kind)` that a network took.

    Raises
    ------
    ValueError
        If `out` holds the result of other networks, images or versions, or a network misbehaves.
    BlockingIOError
        If another run writes to `out`.
    """
    check_strings("names of models", zoo)
    path = check_folder(out) / "measures.nc"
    shared = {f"version of {name}": number for name, number in versions().items()}
    shared |= {"images": images.fingerprint()}
    settings, kept = dict(shared), {}
    with sole_writer(path.parent):
        for name in tqdm(zoo, "features and gradients", disable=not progress):
            classifier = zoo[name]
            settings[f"models.{name}"] = sha256 = fingerprint(classifier)
            if not path.exists():
                part = path.parent / "parts" / f"{sha256}.npz"
                with naming(name):
                    kept[name] = _kept(classifier, images, part, made=json.dumps(shared))
        if not path.exists():
            found = _compared(kept).assign_attrs(settings=json.dumps(settings))
            found.to_netcdf(unfinished := path.with_suffix(".partial"), engine="scipy")
            unfinished.replace(path)
        shutil.rmtree(path.parent / "parts", ignore_errors=True)
        found = xr.load_dataset(path, engine="scipy")
    if differences := setting_differences(json.loads(found.attrs["settings"]), settings):
        raise ValueError(f"{path} is of other settings ({'; '.join(differences)}): give another folder")
    return found


def _kept(classifier: nn.Module, images: ImageSet, part: Path, *, made: str) -> Mapping[str, Floats]:
    """Read a network's features, gradients and the seconds that they took; write them first if need be."""
    if not part.exists() or np.load(part)["made"] != made:
        times = [time.perf_counter()]
        features = penultimate_features(classifier, images)
        times.append(time.perf_counter())
        with frozen(classifier) as still:
            gradients = input_gradients(still, images.images, images.labels).numpy()
        times.append(time.perf_counter())
        part.parent.mkdir(exist_ok=True)
        unfinished = part.with_suffix(".partial.npz")
        np.savez(unfinished, features=features, gradients=gradients, seconds=np.diff(times), made=made)
        unfinished.replace(part)
    return np.load(part)


def _compared(kept: Mapping[str, Mapping[str, Floats]]) -> xr.Dataset:
    features, gradients, seconds = (
        {name: one[what] for name, one in kept.items()} for what in ("features", "gradients", "seconds")
    )
    matrices = {"linear_cka": linear_cka(features), "gradient_cosine": gradient_cosine(gradients)}
    took = {"seconds": (("model", "kind"), np.array([*seconds.values()]))}
    return xr.Dataset(matrices | took, {"kind": ["features", "gradients"]}).astype(np.float32)
