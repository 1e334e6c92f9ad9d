"""Scores: from a study to labelled matrices, with intervals."""

import warnings
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

FLOOR = 0.01
"""Per cent, in place of 0 under SAT's logarithm: one hit in 10,000 trials, less than a study can see."""

Measure = Literal["sat", "transferability"]


def _trials(study: xr.Dataset) -> xr.DataArray:
    """Tell, by (source, target, image), whether both classify the clean image correctly."""
    correct = study.clean_prediction == study.label
    both = correct.rename(target="source").sel(source=study.source) & correct
    return both.transpose("source", "target", "image")


def _hits(study: xr.Dataset) -> xr.DataArray:
    """Tell, by (source, target, image), whether a trial ended with the target fooled."""
    return _trials(study) & (study.adversarial_prediction != study.label)


def _rate(hits: NDArray[np.floating], trials: NDArray[np.floating]) -> NDArray[np.floating]:
    """Divide, with NaN where there is no trial."""
    return np.divide(hits, trials, out=np.full(np.shape(hits), np.nan), where=trials > 0)


def _symmetric_log(rate: NDArray[np.floating]) -> NDArray[np.floating]:
    """SAT of a directed transferability; the last two axes are source and target."""
    per_cent = 100 * (rate + np.swapaxes(rate, -1, -2)) / 2
    return np.log(np.maximum(FLOOR, per_cent))


def transferability(study: xr.Dataset) -> xr.DataArray:
    """Share of images on which the target is fooled by what was made on the source.

    Only images that both classify correctly when clean count.

    Examples
    --------
    >>> rate = transferability(study)
    >>> rate.sel(source="resnet50", target="convnext_tiny")
    >>> rate.hits, rate.trials

    Parameters
    ----------
    study : Dataset
        From `transfer` or `open_study`.

    Returns
    -------
    DataArray
        (source, target), 0 … 1, not symmetric; NaN, with one warning, for a pair without any image
        that both classify correctly. Coordinates `hits` and `trials` hold the counts.

    References
    ----------
    Hwang et al., arXiv 2210.11407, eq. (1), before averaging both directions.
    """
    trials, hits = _trials(study).sum("image"), _hits(study).sum("image")
    if not (trials > 0).all():
        warnings.warn(_no_trials_message(study, trials), stacklevel=2)
    rate = hits.astype(float).copy(data=_rate(hits.values.astype(float), trials.values.astype(float)))
    counts = {"hits": hits.variable, "trials": trials.variable}
    return rate.assign_coords(counts).rename("transferability")


def _no_trials_message(study: xr.Dataset, trials: xr.DataArray) -> str:
    names = study.target.values
    pairs = [f"{names[i]} and {names[j]}" for i, j in np.argwhere(trials.values == 0) if i <= j]
    shown = "; ".join(pairs[:3]) + (f"; and {len(pairs) - 3} more" if len(pairs) > 3 else "")
    return f"no image is classified correctly by both of {shown}: their scores are NaN"


def sat(study: xr.Dataset) -> xr.DataArray:
    """Similarity by attack transferability: log of the mean of both directions in per cent.

    Examples
    --------
    >>> sat(study).sel(model="resnet50", other="convnext_tiny")

    Parameters
    ----------
    study : Dataset
        From `transfer` or `open_study`.

    Returns
    -------
    DataArray
        (model, other), symmetric, log of per cent: log 100 ≈ 4.605 when every adversarial image fools
        the other model, log 0.01 ≈ -4.605 when none does. NaN as in `transferability`.

    References
    ----------
    Hwang et al., *Similarity of Neural Architectures Based on Input Gradient Transferability*,
    arXiv 2210.11407, eq. (1).
    """
    rate = transferability(study)
    coordinates = {"model": rate.source.values, "other": rate.target.values}
    score = _symmetric_log(rate.values)
    return xr.DataArray(
        score, coordinates, ("model", "other"), name="SAT", attrs={"units": "log of per cent"}
    )


def interval(
    study: xr.Dataset,
    measure: Measure = "sat",
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.DataArray:
    """Percentile interval of every cell, by bootstrap over the images.

    The same resampled images serve all cells. The interval speaks of other images of the same kind,
    not of other training runs.

    Examples
    --------
    >>> low, high = interval(study).sel(model="resnet50", other="convnext_tiny")

    Parameters
    ----------
    study : Dataset
        From `transfer` or `open_study`.
    measure : {"sat", "transferability"}
        The score to bound.
    level : float
        Coverage, 0 … 1.
    resamples : int
        Bootstrap samples.
    seed : int
        Of the resampling.

    Returns
    -------
    DataArray
        The matrix of the measure with one dimension more, `bound`: `"low"`, `"high"`.

    Raises
    ------
    ValueError
        If the measure is unknown, or the level is not between 0 and 1.
    """
    if measure not in ("sat", "transferability"):
        raise ValueError(f"measure must be 'sat' or 'transferability', got {measure!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    point = sat(study) if measure == "sat" else transferability(study)
    n, random = study.sizes["image"], np.random.default_rng(seed)
    weights = random.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float32)
    hits, trials = (
        np.tensordot(weights, which.values.astype(np.float32), axes=(1, 2))
        for which in (_hits(study), _trials(study))
    )
    rates = _rate(hits, trials)
    samples = _symmetric_log(rates) if measure == "sat" else rates
    tail = (1 - level) / 2
    with warnings.catch_warnings():
        # A pair without trials has been warned about above; its bounds are NaN too.
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        bounds = np.nanquantile(samples, [tail, 1 - tail], axis=0)
    return xr.DataArray(
        bounds,
        {"bound": ["low", "high"], **{d: point[d].values for d in point.dims}},
        ("bound", *point.dims),
        name=point.name,
        attrs={"level": level, "resamples": resamples, "seed": seed},
    )


def white_box_success(study: xr.Dataset) -> xr.DataArray:
    """Share of its own images on which each model is fooled by the attack on itself: (model,), 0 … 1."""
    rate = transferability(study)
    names = [name for name in rate.source.values if name in rate.target.values]
    own = [float(rate.sel(source=name, target=name)) for name in names]
    return xr.DataArray(own, {"model": names}, ("model",), name="white-box success")
