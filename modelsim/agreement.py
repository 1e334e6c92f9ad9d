"""How far two similarity matrices of the same models agree, and what else could explain it."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import squareform
from scipy.stats import permutation_test, rankdata
from scipy.stats import t as student

from modelsim.scores import check_matrix
from modelsim.zoo import architecture, split_model_name

Floats = NDArray[np.floating]


class Agreement(NamedTuple):
    """Outcome of `agreement`.

    Attributes
    ----------
    correlation : float
        Spearman's, over pairs of models, -1 … 1; partial where controls were given.
    low, high : float
        Percentile interval, by bootstrap over models.
    p_value : float
        Of a correlation at least as great if the names of one matrix were shuffled (Mantel's test).
    models, pairs : int
        How many were compared.
    """

    correlation: float
    low: float
    high: float
    p_value: float
    models: int
    pairs: int


def agreement(
    first: xr.DataArray,
    second: xr.DataArray,
    *,
    given: Sequence[xr.DataArray] = (),
    permutations: int = 9_999,
    resamples: int = 1_000,
    level: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Compare two similarity matrices of the same models, pair by pair.

    Pairs that share a model are not independent. So the test shuffles models, not pairs, and the
    interval draws models with replacement (pairs of a model with its own copy are left out, and so are
    draws in which one matrix has a single value).

    Examples
    --------
    >>> agreement(sat(study), published_sat())
    >>> agreement(sat(study), published_sat(), given=[same_base])

    Parameters
    ----------
    first, second : DataArray
        Symmetric, models in rows and columns; those named in both are compared. The diagonal doesn't
        count and may be NaN.
    given : sequence of DataArray
        Controls, symmetric: ranks of pairs are compared after a linear fit on the controls' ranks.
    permutations, resamples : int
        Of the test and of the interval. A test of so few models that they have no more orders than
        `permutations` takes every order once.
    level : float
        Coverage of the interval, 0 … 1.
    seed : int
        Of both.

    Raises
    ------
    ValueError
        If a matrix is none that `pairs` takes, fewer than four models are in all, or the first or the
        second has a single value, or none that the controls leave.

    References
    ----------
    Mantel, *The detection of disease clustering and a generalized regression approach*, Cancer
    Research, 1967; with controls, Smouse, Long and Sokal, *Multiple regression and correlation
    extensions of the Mantel test*, Systematic Zoology, 1986.
    """
    matrices = _aligned([first, second, *given])
    n, random = len(matrices[0]), np.random.default_rng(seed)
    ranks = residual_ranks([squareform(values, checks=False) for values in matrices])
    observed = cosine(*ranks)
    if math.isnan(observed):
        raise ValueError("nothing to correlate: of one matrix all pairs are alike, alone or beside `given`")
    one, other = (squareform(values) for values in ranks)
    test = permutation_test(
        (np.arange(n),),
        # Rounded, so that orders that give the same value count as equal.
        lambda order: round(cosine(one[np.ix_(order, order)], other), 12),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=permutations,
        rng=random,
    )
    drawn = [_drawn(matrices, random.integers(n, size=n)) for _ in range(resamples)]
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Agreement(observed, float(low), float(high), float(test.pvalue), n, n * (n - 1) // 2)


def _aligned(matrices: Sequence[xr.DataArray]) -> list[Floats]:
    """Return the values of the models that all matrices name, in one order."""
    first, *others = (check_matrix(matrix) for matrix in matrices)
    common = [name for name in first if all(name in names for names in others)]
    if len(common) < 4:
        raise ValueError(f"four models or more must be in all matrices, got {len(common)}: {common}")
    return [m.sel(dict.fromkeys(m.dims, common)).values.astype(float) for m in matrices]


def _drawn(matrices: Sequence[Floats], models: NDArray[np.integer]) -> float:
    """Correlate the pairs of models drawn with replacement, but for those of a model with its own copy."""
    apart = squareform(models[:, None] != models, checks=False)
    square = np.ix_(models, models)
    first, second, *given = (squareform(values[square], checks=False)[apart] for values in matrices)
    return rank_correlation(first, second, given)


def rank_correlation(first: Floats, second: Floats, given: Sequence[Floats] = ()) -> float:
    """Spearman's correlation, partial where controls are given: of ranks, after a fit on the controls' ranks.

    -1 … 1; NaN where one of the two doesn't vary, or the controls leave nothing of it.
    """
    return cosine(*residual_ranks([first, second, *given]))


def residual_ranks(samples: Sequence[Floats]) -> list[Floats]:
    """Ranks of the first two samples, centred, after a fit on the ranks of the others."""
    first, second, *controls = (rankdata(values) for values in samples)
    design = np.column_stack([np.ones(len(first)), *controls])
    rests = (ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0] for ranks in (first, second))
    return [rest.round(6) for rest in rests]  # so that a perfect fit leaves nothing, not its rounding errors


def cosine(one: Floats, other: Floats) -> float:
    """Correlation of centred values; NaN where one of them doesn't vary."""
    size = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / size) if size > 1e-9 else math.nan


RELATIONS = ("same architecture", "same base", "two bases")
"""How two models can be related: two seeds of one architecture, two architectures of one base, or neither."""


def relations(names: Sequence[str]) -> xr.DataArray:
    """Tell how every two models are related, from their names.

    Examples
    --------
    >>> relations(["resnet50", "resnet50-seed1", "mixnet_xl"]).sel(model="resnet50")

    Returns
    -------
    DataArray
        (model, other), values of `RELATIONS`, the first on the diagonal too.

    Raises
    ------
    ValueError
        If a name is not a model of the catalogue.
    """
    built = [split_model_name(name)[0] for name in names]
    bases = np.array([architecture(name).base for name in built])
    same = np.array(built)[:, None] == np.array(built), bases[:, None] == bases
    values = np.select(same, RELATIONS[:2], RELATIONS[2])
    return xr.DataArray(values, {"model": list(names), "other": list(names)}, ("model", "other"))


class Jackknife(NamedTuple):
    """Outcome of `jackknife`: arrays of the statistic's shape."""

    estimate: Floats
    error: Floats
    low: Floats
    high: Floats


def jackknife(
    statistic: Callable[[list[str]], ArrayLike],
    names: Sequence[str],
    *,
    groups: Mapping[str, Hashable] | None = None,
    level: float = 0.95,
) -> Jackknife:
    """Bound what is computed from models, by leaving out one architecture after the other.

    For means and correlations over pairs or sets of models, which share their members. (A bootstrap would
    draw models twice, and few sets have no member twice then.)

    Examples
    --------
    >>> score = sat(study)
    >>> jackknife(lambda kept: pairs(score.sel(model=kept, other=kept)).mean(), score.model.values)

    Parameters
    ----------
    statistic : callable
        Takes names of the models kept, in the order of `names`; returns a number or an array.
    names : sequence of str
        All models.
    groups : mapping, optional
        What is left out together, by name; by default the seeds of an architecture.
    level : float
        Coverage of the interval, 0 … 1; by Student's t.

    Raises
    ------
    ValueError
        If there are fewer than four groups.

    References
    ----------
    Arvesen, *Jackknifing U-statistics*, Annals of Mathematical Statistics, 1969.
    """
    owners = {name: split_model_name(name)[0] if groups is None else groups[name] for name in names}
    units = list(dict.fromkeys(owners.values()))
    if (n := len(units)) < 4:
        raise ValueError(f"a jackknife needs four groups of models or more, got {n}: {units}")
    whole = np.asarray(statistic(list(names)), dtype=float)
    each = np.array([statistic([name for name in names if owners[name] != unit]) for unit in units])
    error = np.sqrt((n - 1) / n * ((each - each.mean(axis=0)) ** 2).sum(axis=0))
    half = student.ppf((1 + level) / 2, n - 1) * error
    return Jackknife(whole, error, whole - half, whole + half)
