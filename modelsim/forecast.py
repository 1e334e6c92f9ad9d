"""The ImageNet row of a network of timm that nobody has attacked, from its components alone."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from sklearn.model_selection import KFold
from xgboost import XGBRegressor

from modelsim.components import components_table, read_components
from modelsim.published import TODAYS_NAMES, published_sat
from modelsim.scores import pairs

_TREES: dict[str, float] = dict(max_depth=5, learning_rate=0.1, subsample=0.8, colsample_bytree=0.5, n_jobs=1)


def pair_features(components: pd.DataFrame) -> pd.DataFrame:
    """Describe every pair of networks by what the two have in common.

    Words give *same*, whether both have one value, and for each value how many of the two have it;
    numbers give their *difference*, without sign, and their *mean*. Which network comes first doesn't
    matter.

    Examples
    --------
    >>> pair_features(components_table())["Stem layer"]

    Parameters
    ----------
    components : DataFrame
        One row a network; columns of words, as from `read_components`, or of numbers.

    Returns
    -------
    DataFrame
        One row a pair, in the order of `pairs`; columns (component, what), float32.
    """
    i, j = np.triu_indices(len(components), 1)
    blocks = {}
    for name, values in components.items():
        if pd.api.types.is_numeric_dtype(values):
            one, other = values.to_numpy(float)[i], values.to_numpy(float)[j]
            block = {"difference": abs(one - other), "mean": (one + other) / 2}
        else:
            has = pd.get_dummies(values).astype(int)
            counts = pd.DataFrame(has.values[i] + has.values[j], columns=has.columns)
            block = {"same": (counts == 2).any(axis=1), **counts}
        blocks[name] = pd.DataFrame(block).astype(np.float32)
    return pd.concat(blocks, axis=1).set_axis([components.index[i], components.index[j]])


def forecast(
    models: str | Sequence[str] | pd.DataFrame,
    *,
    level: float = 0.9,
    components: pd.DataFrame | None = None,
    similarity: xr.DataArray | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Foretell how similar networks are to those of a matrix, from components alone.

    Trees are grown on the pairs of the known networks, described by `pair_features`. The interval is as
    wide as `level` of the errors on pairs with one network held out, in ten folds of the known ones.

    One newcomer's errors go together: `level` holds for the pairs of many newcomers; of a single one's
    pairs nearly all may lie inside, or few. Of a value that no known network has, the trees know nothing:
    see `new.apply(lambda column: ~column.isin(known[column.name]))` for two tables of components.

    Examples
    --------
    >>> forecast("resnet18").loc["resnet18", "SAT"].nlargest(5)
    >>> forecast(read_components(["resnet18", "mobilenetv4_conv_small"]), level=0.8)

    Parameters
    ----------
    models : str, sequence of str or DataFrame
        Names of timm, read without weights, or a table with the columns of `components`. A known network
        is treated as a newcomer: its own row is left out of all that its forecast is made from.
    level : float
        Of the interval, 0 … 1.
    components : DataFrame, optional
        One row a known network; by default `components_table()`.
    similarity : DataArray, optional
        Symmetric, models in rows and columns; by default `published_sat()`. Known networks are those
        that both name.
    seed : int
        Of the trees and folds.

    Returns
    -------
    DataFrame
        One row for each of `models` and each known network, by (model, other) in the order given; columns
        SAT, low, high, in the unit of `similarity`. A network beside itself is not among them.

    Raises
    ------
    PublishedScoresUnavailable
        If no `similarity` is given and the released one can't be had.
    ValueError
        If timm doesn't know a name (the message suggests the nearest), a table names a network twice or
        lacks a component, or too few networks are known for ten folds or for `level`.

    References
    ----------
    Barber, Candès, Ramdas and Tibshirani, *Predictive inference with the jackknife+*, Annals of
    Statistics, 2021 (on held-out errors; what is done here is plainer and has no guarantee: its coverage
    is measured in the book); Lee, Barber and Willett, *Distribution-free inference with hierarchical
    data*, arXiv 2306.06342 (on counting networks, not their pairs, when the level is corrected).
    """
    similarity = published_sat() if similarity is None else similarity
    components = components_table() if components is None else components
    known = components[components.index.isin(similarity[similarity.dims[0]].values)]
    if not isinstance(models, pd.DataFrame):
        models = read_components([models] if isinstance(models, str) else models)
    if missing := [*known.columns.difference(models.columns)]:
        raise ValueError(f"new networks have no {', '.join(missing)}: expected all columns of the known ones")
    plain = models.index.to_series().str.split(".").str[0].replace(TODAYS_NAMES)  # weights follow a point
    own = plain.where(plain.isin(known.index), "")
    parts = models.groupby(own, sort=False)
    told = [_foretold(new, known.drop(name, errors="ignore"), similarity, level, seed) for name, new in parts]
    return pd.concat(told).reindex(models.index, level=0).rename_axis(["model", "other"])


def _foretold(
    new: pd.DataFrame, known: pd.DataFrame, similarity: xr.DataArray, level: float, seed: int
) -> pd.DataFrame:
    """Foretell new × known, none of them in both."""
    if not 0 < level <= (n := len(known)) / (n + 1):
        raise ValueError(f"with {n} networks known, level must be above 0, at most {n}/{n + 1}, got {level}")
    trees, features = XGBRegressor(**_TREES, random_state=seed), pair_features(known)
    y = pairs(similarity.sel(dict.fromkeys(similarity.dims, known.index))).to_numpy()
    x, ends, errors = features.to_numpy(), np.triu_indices(n, 1), []
    for _, out in KFold(10, shuffle=True, random_state=seed).split(known):
        held = np.isin(ends, out).sum(axis=0)  # how many networks of a pair are held out
        fit = trees.fit(x[held == 0], y[held == 0])
        errors.append(abs(fit.predict(x[held == 1]) - y[held == 1]))
    # Networks, not pairs, are counted: one more of them might be worse than all.
    error = np.quantile(np.concatenate(errors), level * (n + 1) / n, method="higher")
    index = pd.MultiIndex.from_product([known.index, new.index])
    mixed = pair_features(pd.concat([known, new[known.columns]], verify_integrity=True)).loc[index]
    sat = trees.fit(x, y).predict(mixed[features.columns].to_numpy()).astype(float)
    return pd.DataFrame({"SAT": sat, "low": sat - error, "high": sat + error}, index.swaplevel())
