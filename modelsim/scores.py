"""Scores: from a study to labelled matrices, with intervals."""

import warnings
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from modelsim.zoo import split_model_name, unknown_name_message

FLOOR = 0.01
"""Per cent, in place of 0 under SAT's logarithm: one hit in 10,000 trials, less than a study can see."""

Measure = Literal["sat", "transferability"]

Floats = NDArray[np.floating]

_BOTH = ("model", "other")


def first_seeds(study: xr.Dataset) -> xr.Dataset:
    """Keep one model an architecture: the study without `name-seed1`, `name-seed2` and so on.

    Examples
    --------
    >>> study = first_seeds(open_study("data/fashion69"))
    """
    names = [name for name in study.source.values.tolist() if split_model_name(name)[1] == 0]
    return study.sel(source=names, target=names)


def pairs(matrix: xr.DataArray) -> pd.Series:
    """Read every pair of models out of a symmetric matrix, once.

    Examples
    --------
    >>> pairs(sat(study)).sort_values().tail()
    >>> pd.DataFrame({"here": pairs(sat(study)), "on ImageNet": pairs(published_sat())})

    Parameters
    ----------
    matrix : DataArray
        Symmetric, of numbers or of words, models in rows and columns. The diagonal doesn't count.

    Returns
    -------
    Series
        By (model, other), in the order of the rows above the diagonal, named as the matrix is.

    Raises
    ------
    ValueError
        If the matrix is not square, rows and columns don't name the same models, a model stands in it
        twice, or a value off the diagonal is NaN, infinite, or another one the other way round.
    """
    names = check_matrix(matrix)
    ends = np.triu_indices(len(names), k=1)
    index = pd.MultiIndex.from_arrays([names[end] for end in ends], names=_BOTH)
    return pd.Series(matrix.values[ends], index, name=matrix.name)


def check_matrix(matrix: xr.DataArray, *, symmetric: bool = True) -> pd.Index:
    """Return the names of the models, or raise as `pairs` does."""
    names, values = _check_names(matrix), matrix.values
    number = np.issubdtype(values.dtype, np.number)
    if number:
        _refuse(~np.isfinite(values), names, "is NaN or infinite: leave one of them out")
    if symmetric:
        same = np.isclose(values, values.T) if number else values == values.T
        _refuse(~same, names, "differs with their order")
    return names


def _check_names(matrix: xr.DataArray) -> pd.Index:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"expected a square matrix, models in rows and columns, got shape {matrix.shape}")
    rows, columns = (matrix[dim].to_index() for dim in matrix.dims)
    for row, column in zip(rows[rows != columns], columns[rows != columns], strict=True):
        raise ValueError(f"rows and columns must name the same models in one order: {row} against {column}")
    for name in rows[rows.duplicated()]:
        raise ValueError(f"{name} stands more than once in the matrix")
    return rows


def _refuse(wrong: NDArray[np.bool_], names: pd.Index, what: str) -> None:
    for i, j in np.argwhere(np.triu(wrong | wrong.T, k=1)):
        raise ValueError(f"the value of {names[i]} and {names[j]} {what}")


def _trials_and_hits(study: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """Tell, by (source, target, image), what both classify correctly when clean, and what then fools."""
    study = study.reset_coords(drop=True)
    correct = study.clean_prediction == study.label
    both = correct.rename(target="source").sel(source=study.source) & correct
    trials = both.transpose("source", "target", "image")
    return trials, trials & (study.adversarial_prediction != study.label)


def _rate(hits: NDArray[Any], trials: NDArray[Any]) -> Floats:
    """Divide, with NaN where there is no trial."""
    return np.divide(hits, trials, out=np.full(np.shape(hits), np.nan), where=trials > 0)


def _symmetric_log(rate: Floats) -> Floats:
    """SAT of a directed transferability; the last two axes are source and target."""
    return _log_per_cent((rate + np.swapaxes(rate, -1, -2)) / 2)


def _log_per_cent(rate: Floats) -> Floats:
    return np.log(np.maximum(FLOOR, 100 * rate))


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
        that both classify correctly. Coordinates `hits` and `trials` (source, target) hold the counts,
        `accuracy` (target) the share of the clean images that is classified correctly.

    References
    ----------
    Hwang et al., arXiv 2210.11407, eq. (1), before averaging both directions.
    """
    trials, hits = (which.sum("image") for which in _trials_and_hits(study))
    if not trials.all():
        warnings.warn(_no_trials_message(trials), stacklevel=2)
    rate = hits.copy(data=_rate(hits.values, trials.values)).rename("transferability")
    accuracy = (study.clean_prediction == study.label).mean("image").variable
    return rate.assign_coords(hits=hits.variable, trials=trials.variable, accuracy=accuracy)


def _no_trials_message(trials: xr.DataArray) -> str:
    counts = trials.to_series()
    found = sorted({" and ".join(sorted(pair)) for pair in counts.index[counts == 0]})
    shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    return f"no image is classified correctly by both of {shown}: their scores are NaN"


def labelled(values: NDArray[Any], names: ArrayLike, name: str, **attributes: object) -> xr.DataArray:
    """Return a matrix (model, other)."""
    return xr.DataArray(values, dict.fromkeys(_BOTH, names), _BOTH, name, attributes)


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
        the other model, log 0.01 ≈ -4.605 when none does. NaN as in `transferability`. Coordinates
        `trials` (model, other): images that both classify correctly; `accuracy` (model), 0 … 1, on the
        clean images.

    Raises
    ------
    ValueError
        If the study's sources and targets are not the same models in one order.

    References
    ----------
    Hwang et al., *Similarity of Neural Architectures Based on Input Gradient Transferability*,
    arXiv 2210.11407, eq. (1).
    """
    rate = transferability(study)
    _check_names(rate)
    score = labelled(_symmetric_log(rate.values), rate.source.values, "SAT", units="log of per cent")
    return score.assign_coords(trials=(_BOTH, rate.trials.values), accuracy=("model", rate.accuracy.values))


def interval(
    study: xr.Dataset, measure: Measure = "sat", *, level: float = 0.95, resamples: int = 1000, seed: int = 0
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
    if measure not in get_args(Measure):
        raise ValueError(f"measure must be 'sat' or 'transferability', got {measure!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    point = sat(study) if measure == "sat" else transferability(study)
    outcomes = [which.values for which in _trials_and_hits(study)]
    rates = _resampled_rates(outcomes, resamples, np.random.default_rng(seed))
    bounds = _bounds(_symmetric_log(rates) if measure == "sat" else rates, level)
    both = point.reset_coords(drop=True).expand_dims(bound=["low", "high"])
    return both.copy(data=bounds).assign_attrs(level=level, resamples=resamples, seed=seed)


def _resampled_rates(
    outcomes: list[NDArray[np.bool_]], resamples: int, random: np.random.Generator
) -> Floats:
    """Divide hits by trials (…, image) on images drawn with replacement: (resample, …)."""
    n = outcomes[0].shape[-1]
    weights = random.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float32)
    trials, hits = (np.tensordot(weights, each.astype(np.float32), axes=(1, -1)) for each in outcomes)
    return _rate(hits, trials)


def _bounds(samples: Floats, level: float) -> Floats:
    with warnings.catch_warnings():
        # A pair without trials is warned about by its score; its bounds are NaN too.
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        return np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)


def white_box_success(study: xr.Dataset) -> xr.DataArray:
    """Share of its own images on which each model is fooled by the attack on itself: (model,), 0 … 1.

    Coordinates: `hits`, `trials` and `accuracy`, as in `transferability`; `images_without_gradient`
    counts the clean images on which the attack had no gradient to follow.
    """
    rate = transferability(study)
    names = xr.DataArray(rate.source.values, {"model": rate.source.values}, ("model",))
    own = rate.sel(source=names, target=names).drop_vars(["source", "target"]).rename("white-box success")
    return own.assign_coords(images_without_gradient=("model", study.images_without_gradient.values))


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
        If there are fewer than four models, rows and columns don't name the same, a score off the
        diagonal is NaN, or one that has no counts is not symmetric.
    """
    directed = "hits" in score.coords
    names = check_matrix(score, symmetric=not directed).to_numpy()
    if (n := len(names)) < 4:
        raise ValueError(f"effects of single models need four models or more, got {n}: {list(names)}")
    observed, noise = _log_odds(score) if directed else (score.values, np.ones((n, n)))
    source, target = _fit(observed, noise, directed=directed)
    pair = ~np.eye(n, dtype=bool)
    residual = np.where(pair, observed - source[:, None] - target, np.nan)
    kinds = ("strength", "fragility") if directed else ("effect",)
    parts = zip(kinds, score.dims, (source, target), strict=False)
    centred = {kind: ((dim,), part - part.mean()) for kind, dim, part in parts}
    explained = 1 - float(residual[pair].var() / observed[pair].var())
    return xr.Dataset(
        {"residual": (score.dims, residual)} | centred,
        dict.fromkeys(score.dims, names),
        {"mean": float(observed[pair].mean()), "explained": explained},
    )


def _fit(observed: Floats, noise: Floats, *, directed: bool) -> tuple[Floats, Floats]:
    """Fit by least squares, then again with each pair's weight from the variance that is left.

    Return effects of rows and of columns: two, or one and the same.
    """
    pair = ~np.eye(len(observed), dtype=bool)
    weights, given = pair.astype(float), np.where(pair, observed, 0)
    for _ in range(2):
        rows, columns = _solved(weights, given, directed=directed)
        left = (given - rows[:, None] - columns)[pair]
        between = max(0.0, left.var() - noise[pair].mean())
        weights = pair / (between + noise)
    return rows, columns


def _solved(weights: Floats, values: Floats, *, directed: bool) -> Floats:
    """Solve the normal equations of `values = row + column` (end, model); the design need not be laid out."""
    n, ends = len(values), (1, 0)
    rows, columns = (np.diag(weights.sum(end)) for end in ends)
    normal = np.block([[rows, weights], [weights.T, columns]])
    sums = np.stack([(weights * values).sum(end) for end in ends])
    if directed:  # what moves from all rows to all columns changes no sum: let none move
        free = np.repeat([1.0, -1.0], n)
        return np.linalg.solve(normal + np.outer(free, free), sums.ravel()).reshape(2, n)
    effect = np.linalg.solve(normal.reshape(2, n, 2, n).sum((0, 2)), sums.sum(0))
    return np.stack([effect, effect])


def _log_odds(rate: xr.DataArray) -> tuple[Floats, Floats]:
    """Log-odds of hits, and their counting variance (half a count added to each, after Haldane)."""
    hits, misses = rate.hits.values + 0.5, rate.trials.values - rate.hits.values + 0.5
    return np.log(hits / misses), 1 / hits + 1 / misses


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
    units = "log of the odds ratio" if "strength" in effects else "log of the ratio of per cents"
    names, explained = score[score.dims[0]].values, effects.attrs["explained"]
    return labelled(values, names, "relative SAT", units=units, explained=explained)


def neighbours(study: xr.Dataset, name: str, *, level: float = 0.95) -> pd.DataFrame:
    """Rank the models of a study by their similarity to one of them.

    Examples
    --------
    >>> neighbours(compare(classifier, study, name="mine"), "mine").head()

    Parameters
    ----------
    study : Dataset
        From `compare` or `open_study`.
    name : str
        A model of it.
    level : float
        Coverage of the interval, 0 … 1, by bootstrap over the images.

    Returns
    -------
    DataFrame
        One row a model, the most similar first. Columns SAT, low and high, log of per cent; from four
        models on relative SAT, of log-odds: how much more similar the two are than each is to all; accuracy,
        0 … 1, on the clean images.

    Raises
    ------
    ValueError
        If `name` is not a model of the study.
    """
    if name not in study.source.values:
        raise ValueError(unknown_name_message("model", name, study.source.values.tolist()))
    rate = transferability(study)
    names = _check_names(rate)
    at = names.get_loc(name)
    row = _log_per_cent((rate.values[at] + rate.values[:, at]) / 2)
    # Of this model only, which is quicker than `interval`, and the same.
    outcomes = [np.stack([each.values[at], each.values[:, at]]) for each in _trials_and_hits(study)]
    samples = _resampled_rates(outcomes, 1000, np.random.default_rng(0)).mean(axis=1)
    low, high = _bounds(_log_per_cent(samples), level)
    table = pd.DataFrame({"SAT": row, "low": low, "high": high}, names.rename("model"))
    if len(names) >= 4:
        table["relative SAT"] = relative_sat(rate).values[at]
    table["accuracy"] = rate.accuracy.values
    return table.drop(name).sort_values("SAT", ascending=False)
