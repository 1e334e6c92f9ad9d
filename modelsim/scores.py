"""Scores: from a study to labelled matrices, with intervals."""

import warnings
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from modelsim.zoo import split_model_name

FLOOR = 0.01
"""Per cent, in place of 0 under SAT's logarithm: one hit in 10,000 trials, less than a study can see."""

Measure = Literal["sat", "transferability"]


def first_seeds(study: xr.Dataset) -> xr.Dataset:
    """Keep one model an architecture: the study without `name-seed1`, `name-seed2` and so on.

    Examples
    --------
    >>> study = first_seeds(open_study("data/fashion69"))
    """
    names = [name for name in study.source.values.tolist() if split_model_name(name)[1] == 0]
    return study.sel(source=names, target=names)


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


def main_effects(score: xr.DataArray) -> xr.Dataset:
    """Split a score into effects of single models and what is left for the pair.

    A strong source and a fragile target raise every score that they take part in. Of a directed
    transferability, the log-odds are fitted by `mean + strength(source) + fragility(target)`; of a
    symmetric SAT, the score itself by `mean + effect(model) + effect(other)`. The diagonal is left out.

    The log-odds are fitted by weighted least squares, not by a binomial likelihood: pairs differ by
    far more than counting noise, so that a likelihood that knows only that noise would leave the fit to
    the few pairs of middling rate. A pair weighs 1 / (variance between pairs + its counting variance).

    Examples
    --------
    >>> effects = main_effects(transferability(study))
    >>> effects.strength.to_series().sort_values()
    >>> effects.attrs["explained"]

    Parameters
    ----------
    score : DataArray
        From `transferability`, with its counts, or from `sat` or `published_sat`.

    Returns
    -------
    Dataset
        `residual`, like `score`, NaN on the diagonal; `strength (source)` and `fragility (target)`, or
        `effect (model)`: around 0, in log-odds or in log of per cent. Attributes `mean` and `explained`,
        the effects' share of the variance between pairs, 0 … 1.

    Raises
    ------
    ValueError
        If there are fewer than four models, rows and columns name different ones, or a score off the
        diagonal is NaN.
    """
    _check_complete(score)
    return _directed_effects(score) if "hits" in score.coords else _symmetric_effects(score)


def _directed_effects(rate: xr.DataArray) -> xr.Dataset:
    rows, columns = rate.dims
    source, target = np.nonzero(~np.eye(len(rate), dtype=bool))
    one_hot = np.eye(len(rate))
    design = np.hstack([one_hot[source], one_hot[target]])
    observed, noise = (values[source, target] for values in _log_odds(rate))
    rest = observed - design @ _weighted_fit(design, observed, np.ones_like(observed))
    between = max(0.0, float(rest.var() - noise.mean()))
    effects = _weighted_fit(design, observed, 1 / (between + noise))
    strength, fragility = np.split(effects, 2)
    residual = np.full(rate.shape, np.nan)
    residual[source, target] = rest = observed - design @ effects
    return xr.Dataset(
        {
            "residual": (rate.dims, residual),
            "strength": ((rows,), strength - strength.mean()),
            "fragility": ((columns,), fragility - fragility.mean()),
        },
        {rows: rate[rows].values, columns: rate[columns].values},
        attrs={"mean": float(observed.mean()), "explained": 1 - float(rest.var() / observed.var())},
    )


def _symmetric_effects(score: xr.DataArray) -> xr.Dataset:
    rows, columns = score.dims
    n, observed = len(score), score.values
    # Least squares in closed form, since every pair counts once: (n - 2) effect + all effects = row's sum.
    sums = np.where(np.eye(n, dtype=bool), 0, observed).sum(axis=1)
    effects = (sums - sums.sum() / (2 * (n - 1))) / (n - 2)
    first, second = np.triu_indices(n, k=1)
    observed = observed[first, second]
    residual = np.full(score.shape, np.nan)
    residual[first, second] = residual[second, first] = rest = observed - effects[first] - effects[second]
    return xr.Dataset(
        {"residual": (score.dims, residual), "effect": ((rows,), effects - effects.mean())},
        {rows: score[rows].values, columns: score[columns].values},
        attrs={"mean": float(observed.mean()), "explained": 1 - float(rest.var() / observed.var())},
    )


def _check_complete(score: xr.DataArray) -> None:
    names, others = (list(score[dim].values) for dim in score.dims)
    if names != others or len(names) < 4:
        raise ValueError(
            "effects of single models need four models or more, the same in rows and columns; "
            f"got {len(names)} rows and {len(others)} columns"
        )
    for i, j in np.argwhere(np.isnan(score.values)):
        if i != j:
            raise ValueError(f"the score of {names[i]} and {names[j]} is NaN: leave one of them out")


def _log_odds(rate: xr.DataArray) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Log-odds of hits, and their counting variance (half a count added to each, after Haldane)."""
    hits = rate.hits.values + 0.5
    misses = rate.trials.values - rate.hits.values + 0.5
    return np.log(hits / misses), 1 / hits + 1 / misses


def _weighted_fit(
    design: NDArray[np.floating], observed: NDArray[np.floating], weights: NDArray[np.floating]
) -> NDArray[np.floating]:
    root = np.sqrt(weights)
    return np.linalg.lstsq(design * root[:, None], observed * root, rcond=None)[0]


def relative_sat(score: xr.DataArray) -> xr.DataArray:
    """Similarity of a pair beyond what its two models have in common with everyone.

    Examples
    --------
    >>> relative_sat(transferability(study)).sel(model="resnet50", other="seresnet50")
    >>> relative_sat(published_sat())

    Parameters
    ----------
    score : DataArray
        As for `main_effects`: a directed transferability, or a symmetric SAT.

    Returns
    -------
    DataArray
        (model, other), symmetric, around 0, NaN on the diagonal: the residuals of `main_effects`, the
        mean of both directions where there are two. Log of the odds ratio from a transferability, log
        of the ratio of per cents from a SAT.

    Raises
    ------
    ValueError
        As `main_effects`.
    """
    effects = main_effects(score)
    values = (effects.residual.values + effects.residual.values.T) / 2
    names = score[score.dims[0]].values
    units = "log of the odds ratio" if "strength" in effects else "log of the ratio of per cents"
    attributes = {"units": units, "explained": effects.attrs["explained"]}
    return xr.DataArray(
        values, {"model": names, "other": names}, ("model", "other"), name="relative SAT", attrs=attributes
    )
