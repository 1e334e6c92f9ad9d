"""How far two similarity matrices of the same models agree, and what else could explain it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import squareform
from scipy.stats import permutation_test, rankdata
from scipy.stats import t as student

from modelsim.scores import Floats, check_matrix
from modelsim.zoo import split_model_name


class Agreement(NamedTuple):
    """Outcome of `agreement`.

    Attributes
    ----------
    correlation : float
        Spearman's, over pairs of models, -1 … 1; partial where controls were given.
    low, high : float
        95 % interval, by `jackknife` of Fisher's transform; NaN if nothing is left to correlate without
        one of the architectures.
    p_value : float
        Of a correlation at least as great if the names of one matrix were shuffled (Mantel's test).
    models : int
        How many were compared.
    """

    correlation: float
    low: float
    high: float
    p_value: float
    models: int


def agreement(
    first: xr.DataArray,
    second: xr.DataArray,
    *,
    given: Sequence[xr.DataArray] = (),
    transform: Callable[[xr.DataArray], xr.DataArray] | None = None,
    permutations: int = 999,
    seed: int = 0,
) -> Agreement:
    """Compare two similarity matrices of the same models, pair by pair.

    Pairs that share a model are not independent. So the test shuffles models, not pairs, and the
    interval comes from leaving out one architecture after the other.

    Examples
    --------
    >>> agreement(sat(study), published_sat())
    >>> agreement(sat(study), published_sat(), transform=relative_sat, given=[same_base])

    Parameters
    ----------
    first, second : DataArray
        Symmetric, models in rows and columns; those named in both are compared. The diagonal doesn't
        count and may be NaN.
    given : sequence of DataArray
        Controls, symmetric: ranks of pairs are compared after a linear fit on the controls' ranks.
    transform : callable, optional
        Done to every matrix before its pairs are ranked, and again whenever an architecture is left
        out, such as `relative_sat`: takes and returns a symmetric matrix. What it returns is rounded to
        nine decimals, so that ties stay ties.
    permutations : int
        Of the test. One of so few models that they have no more orders takes every order once.
    seed : int
        Of the test.

    Raises
    ------
    ValueError
        If a matrix is none that `pairs` takes, fewer than four architectures are in all, or the first
        or the second has a single value, or none that the controls leave.

    References
    ----------
    Mantel, *The detection of disease clustering and a generalized regression approach*, Cancer
    Research, 1967; with controls, Smouse, Long and Sokal, *Multiple regression and correlation
    extensions of the Mantel test*, Systematic Zoology, 1986.
    """
    matrices = [first, second, *given]
    indexes = [check_matrix(matrix) for matrix in matrices]
    names = [name for name in indexes[0] if all(name in index for index in indexes)]
    if len(names) < 4:
        raise ValueError(f"four models or more must be in all matrices, got {len(names)}: {names}")

    def ranks(kept: list[str]) -> list[Floats]:
        some = (matrix.sel(dict.fromkeys(matrix.dims, kept)) for matrix in matrices)
        done = (transform(matrix).round(9) if transform else matrix for matrix in some)  # equal stays equal
        return residual_ranks([squareform(matrix.values, checks=False) for matrix in done])

    # By Fisher's transform the interval stays within -1 … 1; of 1 itself it would be infinite.
    found = jackknife(lambda kept: np.arctanh((1 - 1e-9) * cosine(*ranks(kept))), names)
    correlation, _, low, high = np.tanh(found).tolist()
    if math.isnan(correlation):
        raise ValueError("nothing to correlate: of one matrix all pairs are alike, alone or beside `given`")
    p_value = _mantel(*map(squareform, ranks(names)), permutations=permutations, seed=seed)
    return Agreement(correlation, low, high, p_value, len(names))


def _mantel(one: Floats, other: Floats, *, permutations: int, seed: int) -> float:
    """Share of the orders of one's models, all or drawn, in which it is at least as much like the other."""
    size = math.sqrt((one**2).sum() * (other**2).sum())

    def alike(orders: NDArray[np.integer], axis: int) -> Floats:
        moved = one[orders[..., :, None], orders[..., None, :]]
        # Rounded, so that orders that give the same value count as equal.
        return (np.tensordot(moved, other, 2) / size).round(12)

    options = {"permutation_type": "pairings", "alternative": "greater", "vectorized": True, "batch": 1000}
    test = permutation_test((np.arange(len(one)),), alike, **options, n_resamples=permutations, rng=seed)
    return float(test.pvalue)


def rank_correlation(first: ArrayLike, second: ArrayLike, given: Sequence[ArrayLike] = ()) -> float:
    """Spearman's correlation, partial where controls are given: of ranks, after a fit on the controls' ranks.

    -1 … 1; NaN where one of the two doesn't vary, or the controls leave nothing of it.

    Examples
    --------
    >>> rank_correlation(gain, similarity, given=[accuracy])
    """
    return cosine(*residual_ranks([first, second, *given]))


def residual_ranks(samples: Sequence[ArrayLike]) -> list[Floats]:
    """Ranks of the first two samples, centred, after a fit on the ranks of the others."""
    first, second, *controls = (rankdata(values) for values in samples)
    design = np.column_stack([np.ones(len(first)), *controls])
    return [_rest(design, ranks) for ranks in (first, second)]


def _rest(design: Floats, ranks: Floats) -> Floats:
    """Subtract a fit by least squares: nothing is left of ranks that the design determines."""
    fit, _, rank, _ = np.linalg.lstsq(design, ranks)
    determined = np.linalg.matrix_rank(np.column_stack([design, ranks])) == rank
    return np.zeros(len(ranks)) if determined else ranks - design @ fit


def cosine(one: Floats, other: Floats) -> float:
    """Correlation of centred values; NaN where one of them doesn't vary."""
    size = math.sqrt((one @ one) * (other @ other))
    return float(one @ other / size) if size else math.nan


class Jackknife(NamedTuple):
    """Outcome of `jackknife`: arrays of the statistic's shape."""

    estimate: Floats
    error: Floats
    low: Floats
    high: Floats


def jackknife(
    statistic: Callable[[list[str]], ArrayLike], names: Sequence[str], *, level: float = 0.95
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
        All models. The seeds of an architecture are left out together.
    level : float
        Coverage of the interval, 0 … 1; by Student's t.

    Raises
    ------
    ValueError
        If there are fewer than four architectures.

    References
    ----------
    Arvesen, *Jackknifing U-statistics*, Annals of Mathematical Statistics, 1969.
    """
    built = {name: split_model_name(name)[0] for name in names}
    units = list(dict.fromkeys(built.values()))
    if (n := len(units)) < 4:
        raise ValueError(f"a jackknife needs four architectures or more, got {n}: {units}")
    whole = np.asarray(statistic(list(names)), dtype=float)
    each = np.array([statistic([name for name in names if built[name] != unit]) for unit in units])
    error = np.sqrt((n - 1) / n * ((each - each.mean(axis=0)) ** 2).sum(axis=0))
    half = student.ppf((1 + level) / 2, n - 1) * error
    return Jackknife(whole, error, whole - half, whole + half)
