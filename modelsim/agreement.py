"""How far two similarity matrices of the same models agree, and what else could explain it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import rankdata

from modelsim.zoo import architecture, split_model_name

Pairs = NDArray[np.floating]


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
        Of the test and of the interval.
    level : float
        Coverage of the interval, 0 … 1.
    seed : int
        Of both.

    Raises
    ------
    ValueError
        If fewer than four models are in all matrices, or a value off the diagonal is NaN.

    References
    ----------
    Mantel, *The detection of disease clustering and a generalized regression approach*, Cancer
    Research, 1967; with controls, Smouse, Long and Sokal, *Multiple regression and correlation
    extensions of the Mantel test*, Systematic Zoology, 1986.
    """
    matrices = _aligned([first, second, *given])
    n = len(matrices[0])
    random = np.random.default_rng(seed)
    one, other = (_square(residual, n) for residual in _residual_ranks(matrices, np.arange(n)))
    observed = cosine(one, other)
    orders = (random.permutation(n) for _ in range(permutations))
    at_least = sum(cosine(one[np.ix_(order, order)], other) >= observed - 1e-12 for order in orders)
    draws = (random.integers(n, size=n) for _ in range(resamples))
    drawn = [cosine(*_residual_ranks(matrices, models)) for models in draws]
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    p_value = (1 + at_least) / (permutations + 1)
    return Agreement(observed, float(low), float(high), float(p_value), n, n * (n - 1) // 2)


def _aligned(matrices: Sequence[xr.DataArray]) -> list[Pairs]:
    """Return the values of the models that all matrices name, in one order."""
    names = [[str(name) for name in matrix[matrix.dims[0]].values] for matrix in matrices]
    common = [name for name in names[0] if all(name in others for others in names[1:])]
    if len(common) < 4:
        raise ValueError(f"four models or more must be in all matrices, got {len(common)}: {common}")
    aligned = [
        matrix.sel({matrix.dims[0]: common, matrix.dims[1]: common}).values.astype(float)
        for matrix in matrices
    ]
    for values in aligned:
        for i, j in np.argwhere(np.isnan(values)):
            if i != j:
                raise ValueError(f"a value of {common[i]} and {common[j]} is NaN: leave one of them out")
    return aligned


def _residual_ranks(matrices: Sequence[Pairs], models: NDArray[np.integer]) -> list[Pairs]:
    """Ranks of the first two matrices' pairs, centred, after a fit on the ranks of the others."""
    upper = np.triu_indices(len(models), k=1)
    rows, columns = models[upper[0]], models[upper[1]]
    apart = rows != columns
    return residual_ranks([values[rows[apart], columns[apart]] for values in matrices])


def residual_ranks(samples: Sequence[Pairs]) -> list[Pairs]:
    """Ranks of the first two samples, centred, after a fit on the ranks of the others."""
    first, second, *controls = (rankdata(values) for values in samples)
    design = np.column_stack([np.ones(len(first)), *controls])
    return [ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0] for ranks in (first, second)]


def _square(pairs: Pairs, n: int) -> Pairs:
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n, k=1)] = pairs
    return matrix + matrix.T


def cosine(one: Pairs, other: Pairs) -> float:
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


def mean_by_relation(
    score: xr.DataArray, *, resamples: int = 2_000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Average a similarity over two seeds of one architecture, two architectures of one base, two bases.

    The interval draws architectures with replacement, each with all its seeds: pairs that share a model
    are not independent. A pair counts as often as the draw holds both its architectures; pairs of an
    architecture with its own copy are left out.

    Examples
    --------
    >>> mean_by_relation(sat(study))

    Parameters
    ----------
    score : DataArray
        Symmetric, models of the catalogue in rows and columns. The diagonal doesn't count.
    resamples : int
        Draws of architectures.
    level : float
        Coverage of the intervals, 0 … 1.
    seed : int
        Of the draws.

    Returns
    -------
    DataFrame
        One row a relation that occurs, nearest first: `mean`, `low`, `high`, `pairs`; `step`,
        `step_low`, `step_high`: the mean minus that of the next relation, NaN in the last row.

    Raises
    ------
    ValueError
        If a name is not a model of the catalogue, or a value off the diagonal is NaN.
    """
    names = [str(name) for name in score[score.dims[0]].values]
    related = relations(names)
    _aligned([score])
    built, index = np.unique([split_model_name(name)[0] for name in names], return_inverse=True)
    upper = np.triu_indices(len(names), k=1)
    rows, columns, values = index[upper[0]], index[upper[1]], score.values[upper]
    drawn = np.random.default_rng(seed).multinomial(
        len(built), np.full(len(built), 1 / len(built)), resamples
    )
    counts = np.vstack([np.ones_like(built, dtype=int), drawn])
    weights = np.where(rows == columns, counts[:, rows], counts[:, rows] * counts[:, columns])
    chosen = {r: related.values[upper] == r for r in RELATIONS}
    chosen = {relation: of for relation, of in chosen.items() if of.any()}
    means = pd.DataFrame({r: _weighted_means(values[of], weights[:, of]) for r, of in chosen.items()})
    steps = means - means.shift(-1, axis="columns")
    low, high = (1 - level) / 2, (1 + level) / 2
    columns_of = {
        "mean": means.iloc[0],
        "low": means[1:].quantile(low),
        "high": means[1:].quantile(high),
        "pairs": pd.Series({relation: int(of.sum()) for relation, of in chosen.items()}),
        "step": steps.iloc[0],
        "step_low": steps[1:].quantile(low),
        "step_high": steps[1:].quantile(high),
    }
    return pd.concat(columns_of, axis="columns")


def _weighted_means(values: Pairs, weights: NDArray[np.integer]) -> Pairs:
    """Mean of `values` under every row of `weights`; NaN where all weights are 0."""
    total = weights.sum(axis=1)
    return np.divide(weights @ values, total, out=np.full(len(total), np.nan), where=total > 0)
