"""Which component makes two architectures differ: their similarity, predicted from their components.

A pair is described by what its two members have in common. A regression predicts its similarity from that,
is judged on pairs and on architectures it hasn't seen, and is asked which component it leans on.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
import xgboost
from numpy.typing import NDArray
from scipy.spatial.distance import squareform
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score, root_mean_squared_error
from sklearn.model_selection import GridSearchCV, RepeatedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modelsim import scores

if TYPE_CHECKING:
    import shap

Encoding = Literal["same", "values", "both"]
Split = Literal["random pairs", "one new", "both new"]
Floats = NDArray[np.floating]
Positions = NDArray[np.intp]
Inner = list[tuple[Positions, Positions]]
Grid = dict[str, list[Any]]

TREES = {"n_estimators": 150, "subsample": 0.8, "colsample_bytree": 0.5, "n_jobs": 1}
"""Settings of xgboost that are not searched. One thread: some thousand pairs are too few to share out."""
TREE_GRID: Grid = {"max_depth": [2, 3, 5], "learning_rate": [0.05, 0.2]}
"""Settings of xgboost among which the inner folds choose."""
RIDGE_GRID: Grid = {"ridge__alpha": [0.1, 1, 10, 100, 1000]}
"""Penalties of the ridge regression, on standardised features, among which the inner folds choose."""
INNER_FOLDS = 3


def pair_features(components: pd.DataFrame, *, kind: Encoding = "both") -> pd.DataFrame:
    """Describe every unordered pair of models by what its two members have.

    Examples
    --------
    >>> pair_features(published_components()).loc[("resnet50", "convnext_tiny"), "Activation"]

    Parameters
    ----------
    components : DataFrame
        One row a model. A column of numbers, such as accuracy or the log of the parameters, is a control;
        any other is a component, whose values are categories.
    kind : {"same", "values", "both"}
        What is told of a component. `"same"`: 1 if the two models agree, else 0. `"values"`: of each
        value, how many of the two have it, 0 … 2. Of a control, always its absolute difference and mean.

    Returns
    -------
    DataFrame
        Rows (model, other), each pair once, in the order of `components`; columns (component, feature).
        Nothing but the name of the row depends on which model comes first.

    Raises
    ------
    ValueError
        If `kind` is unknown.
    """
    _check_choice("kind", kind, get_args(Encoding))
    ends = _ends(len(components))
    pairs = pd.MultiIndex.from_arrays(components.index.to_numpy()[ends.T], names=["model", "other"])
    blocks = {name: _encode(components[name], ends, kind) for name in components}
    return pd.concat(blocks, axis=1, names=["component", "feature"]).set_axis(pairs)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _ends(n_models: int) -> Positions:
    """Return the two models (pair, 2) of every pair, in scipy's condensed order."""
    return np.column_stack(np.triu_indices(n_models, 1))


def _encode(values: pd.Series, ends: Positions, kind: Encoding) -> pd.DataFrame:
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        two = values.to_numpy(np.float32)[ends]
        return pd.DataFrame({"difference": np.ptp(two, axis=1), "mean": two.mean(axis=1)})
    table = pd.get_dummies(values, dtype=np.float32)
    has = table.to_numpy()[ends]
    same = pd.DataFrame({"same": has.prod(axis=1).sum(axis=1)})
    counts = pd.DataFrame(has.sum(axis=1), columns=table.columns)
    return {"same": same, "values": counts, "both": pd.concat([same, counts], axis=1)}[kind]


class Fold(NamedTuple):
    """Positions of pairs to train on and, by split, to test on; `inner` counts within `train`."""

    repeat: int
    fold: int
    train: Positions
    tests: dict[Split, Positions]
    inner: Inner


def pair_folds(
    n_models: int, splits: tuple[Split, ...], *, folds: int = 5, repeats: int = 2, seed: int = 0
) -> Iterator[Fold]:
    """Split the pairs of `n_models` models, ordered as by `pair_features`, for nested validation.

    `splits` are `("random pairs",)` or, of folds of architectures, `("one new", "both new")`: neither
    model of a training pair is in the fold, one or both of a tested pair are.

    Raises
    ------
    ValueError
        If there are fewer than 2 folds, or fewer than 3 models a fold.
    """
    _check_count(n_models, folds)
    ends = _ends(n_models)
    units = np.arange(len(ends))[:, None] if splits == ("random pairs",) else ends
    for number, new in enumerate(_held_out(units, folds, repeats, seed)):
        train = np.flatnonzero(new == 0)
        tests = {split: np.flatnonzero(new == count) for count, split in enumerate(splits, 1)}
        yield Fold(*divmod(number, folds), train, tests, _inner_folds(units[train], seed))


def _check_count(n_models: int, folds: int) -> None:
    if folds < 2:
        raise ValueError(f"at least 2 folds are needed, got {folds}")
    if n_models < 3 * folds:
        raise ValueError(f"{folds} folds need {3 * folds} models, 3 in each; got {n_models}")


def _held_out(units: Positions, folds: int, repeats: int, seed: int) -> Iterator[Positions]:
    """Yield for every fold how many of a pair's units, its two models or itself, are held out."""
    choices = np.unique(units)
    splitter = RepeatedKFold(n_splits=folds, n_repeats=repeats, random_state=seed)
    for _, chosen in splitter.split(choices):
        yield np.isin(units, choices[chosen]).sum(axis=1)


def _inner_folds(units: Positions, seed: int) -> Inner:
    counts = _held_out(units, INNER_FOLDS, 1, seed)
    return [(np.flatnonzero(new == 0), np.flatnonzero(new > 0)) for new in counts]


@dataclass(frozen=True)
class PairModel:
    """All pairs, in the order of `pair_features`, and trees to predict their similarity from them.

    `trees.get_params()` tells the settings found.
    """

    components: pd.DataFrame
    features: pd.DataFrame
    similarity: Floats
    trees: xgboost.XGBRegressor

    @property
    def x(self) -> NDArray[np.float32]:
        """The features as (pair, feature)."""
        return self.features.to_numpy(np.float32)

    @property
    def ends(self) -> Positions:
        """Rows of `components` of the two models of every pair: (pair, 2)."""
        return _ends(len(self.components))


def _untrained(
    similarity: xr.DataArray, components: pd.DataFrame, kind: Encoding, seed: int, device: str | None
) -> PairModel:
    alike = scores.pairs(similarity).to_numpy()
    table = _matched(components, similarity[similarity.dims[0]].to_index())
    cuda = torch.cuda.is_available() and xgboost.build_info()["USE_CUDA"]
    trees = xgboost.XGBRegressor(**TREES, random_state=seed, device=device or ("cuda" if cuda else "cpu"))
    return PairModel(table, pair_features(table, kind=kind), alike, trees)


def _matched(components: pd.DataFrame, names: pd.Index) -> pd.DataFrame:
    """Return the rows of the scored models, once each is known to be there, single and whole."""
    for name in components.index[components.index.duplicated()]:
        raise ValueError(f"{name} stands more than once in the components")
    if len(missing := names.difference(components.index, sort=False)):
        raise ValueError(f"{missing[0]} has scores but no components ({len(missing)} such models)")
    table = components.loc[names]
    for column, values in table.items():
        if values.isna().any():
            raise ValueError(f"{column!r} of {values.index[values.isna()][0]} is missing")
        if values.nunique() == 1:
            raise ValueError(f"{column!r} is {values.iloc[0]!r} in all {len(table)} models: leave it out")
    return table


def _tuned(estimator: BaseEstimator, grid: Grid, pairs: PairModel, train: Positions, inner: Inner) -> Any:
    """Fit `estimator` with the settings of the grid that have the least squared error on the inner folds."""
    search = GridSearchCV(estimator, grid, cv=inner, scoring="neg_mean_squared_error", error_score="raise")
    return search.fit(pairs.x[train], pairs.similarity[train]).best_estimator_


def _tuned_trees(pairs: PairModel, train: Positions, inner: Inner) -> Any:
    with warnings.catch_warnings():
        # On a GPU xgboost tells, once, that it copies the features there to predict.
        warnings.filterwarnings("ignore", "(?s).*due to mismatched devices", UserWarning)
        return _tuned(pairs.trees, TREE_GRID, pairs, train, inner)


def validate_similarity(
    similarity: xr.DataArray,
    components: pd.DataFrame,
    *,
    kind: Encoding = "both",
    base: str = "Base architecture",
    folds: int = 5,
    repeats: int = 2,
    seed: int = 0,
    device: str | None = None,
) -> pd.DataFrame:
    """Judge how well similarity can be predicted, by three splits and beside four simpler predictions.

    An architecture stands in as many pairs as there are others, so of a pair held out at random both
    members are known from other pairs. Leaving architectures out tells how well a new one is predicted.

    - `mean`: of the training pairs.
    - `base`: their mean by pair of base architectures; of a pair of bases not seen, the overall mean.
    - `additive`: mean of one model + mean of the other - overall mean, each over training pairs; a new
      model has the overall mean.
    - `ridge`: linear in `pair_features`, the penalty (`RIDGE_GRID`) chosen by inner folds.
    - `xgboost`: boosted trees on the same features, settings (`TREE_GRID`) chosen by inner folds.

    Inner folds hold out what the outer folds do, pairs or architectures, within the training pairs.

    Examples
    --------
    >>> judged = validate_similarity(published_sat(), published_components())
    >>> judged.pivot_table("r2", "model", "split")

    Parameters
    ----------
    similarity : DataArray
        Symmetric (model, other), such as SAT or relative SAT. The diagonal doesn't count and may be NaN.
    components : DataFrame
        As in `pair_features`; rows of models without scores are not used.
    kind : {"same", "values", "both"}
        Encoding, as in `pair_features`.
    base : str
        The component that holds the base architecture.
    folds, repeats : int
        Outer folds, and how often they are drawn anew.
    seed : int
        Of folds and trees.
    device : str, optional
        Where xgboost trains; by default `"cuda"` if there is one, else `"cpu"`.

    Returns
    -------
    DataFrame
        Columns split, model, repeat, fold, pairs (how many are tested), r2 (at most 1, below 0 if worse
        than the mean of the tested pairs), rmse (unit of `similarity`).

    Raises
    ------
    ValueError
        If the matrix is not square and symmetric or holds NaN off its diagonal; if a scored model has no
        components or two rows; if a component is missing or the same in all models; if there are too few
        models for the folds; if `base` is no component. The message names the first at fault.
    """
    pairs = _untrained(similarity, components, kind, seed, device)
    _check_choice("base", base, tuple(map(str, components)))
    rows = []
    families: list[tuple[Split, ...]] = [("random pairs",), ("one new", "both new")]
    for splits in families:
        for fold in pair_folds(len(pairs.components), splits, folds=folds, repeats=repeats, seed=seed):
            for model, predicted in _predictions(pairs, fold, base).items():
                where = {"model": model, "repeat": fold.repeat, "fold": fold.fold}
                for split, test in fold.tests.items():
                    rows.append({"split": split} | where | _errors(pairs.similarity[test], predicted[test]))
    return pd.DataFrame(rows)


def _errors(true: Floats, predicted: Floats) -> dict[str, float]:
    rmse = root_mean_squared_error(true, predicted)
    return {"pairs": len(true), "r2": r2_score(true, predicted), "rmse": rmse}


def _predictions(pairs: PairModel, fold: Fold, base: str) -> dict[str, Floats]:
    """Predict all pairs, by every model, from the training pairs of one fold."""
    y = pairs.similarity[fold.train]
    bases = np.sort(pairs.components[base].to_numpy(str)[pairs.ends], axis=1)
    ridge = make_pipeline(StandardScaler(), Ridge())
    tuned = {
        "ridge": _tuned(ridge, RIDGE_GRID, pairs, fold.train, fold.inner),
        "xgboost": _tuned_trees(pairs, fold.train, fold.inner),
    }
    return {
        "mean": np.full(len(pairs.similarity), y.mean()),
        "base": _mean_by(pd.MultiIndex.from_arrays(bases.T), fold.train, y),
        "additive": _additive(pairs.ends, fold.train, y),
    } | {name: model.predict(pairs.x) for name, model in tuned.items()}


def _mean_by(key: pd.Index, train: Positions, y: Floats) -> Floats:
    means = pd.Series(y).groupby(key[train]).mean()
    return np.asarray(means.reindex(key).fillna(y.mean()))


def _additive(ends: Positions, train: Positions, y: Floats) -> Floats:
    means = pd.Series(np.tile(y, 2)).groupby(ends[train].T.ravel()).mean()
    effect = means.reindex(range(ends.max() + 1)).fillna(y.mean()).to_numpy()
    return np.asarray(effect[ends].sum(axis=1) - y.mean())


def component_importance(
    similarity: xr.DataArray,
    components: pd.DataFrame,
    *,
    kind: Encoding = "both",
    split: Split = "one new",
    folds: int = 5,
    repeats: int = 2,
    permutations: int = 10,
    seed: int = 0,
    device: str | None = None,
) -> pd.DataFrame:
    """Measure, on held-out pairs and in three ways, how much xgboost's prediction owes to each component.

    - `permutation`: loss of R² when the component's values are shuffled among all architectures and the
      features of the tested pairs built anew, mean over `permutations`. (Shuffled among pairs, one
      architecture would have several values at once.)
    - `SHAP`: mean over the tested pairs of the absolute SHAP value, summed over the component's features.
    - `drop-one`: loss of R² when trained without the component, with the settings found with it.

    Components that tell the same share what they are worth: each can be dropped at little loss.

    Examples
    --------
    >>> table = component_importance(published_sat(), published_components())
    >>> seaborn.catplot(table, x="importance", y="component", col="measure", kind="bar", sharex=False)

    Parameters
    ----------
    similarity, components, kind, folds, repeats, seed, device
        As in `validate_similarity`.
    split : {"random pairs", "one new", "both new"}
        Which pairs are held out.
    permutations : int
        Shuffles a component and fold.

    Returns
    -------
    DataFrame
        Columns measure, component, repeat, fold, importance: R² lost, which may be below 0, or for SHAP a
        similarity, in its unit.

    Raises
    ------
    ValueError
        As in `validate_similarity`; if `split` is unknown, or there is a single component.
    """
    _check_choice("split", split, get_args(Split))
    pairs = _untrained(similarity, components, kind, seed, device)
    names = pairs.components.columns.rename("component")
    if len(names) < 2:
        raise ValueError(f"nothing is left to predict from without {names[0]!r}")
    splits: tuple[Split, ...] = (split,) if split == "random pairs" else ("one new", "both new")
    random, tables = np.random.default_rng(seed), []
    for fold in pair_folds(len(pairs.components), splits, folds=folds, repeats=repeats, seed=seed):
        trees, test = _tuned_trees(pairs, fold.train, fold.inner), fold.tests[split]
        measures = {
            "permutation": _permutation(pairs, trees, test, permutations, random),
            "SHAP": abs(_shap_values(replace(pairs, trees=trees), test)[0]).mean(axis=0),
            "drop-one": _drop_one(pairs, trees, fold.train, test),
        }
        tables.append(pd.DataFrame(measures, names).assign(repeat=fold.repeat, fold=fold.fold).reset_index())
    keys = ["component", "repeat", "fold"]
    return pd.concat(tables).melt(keys, var_name="measure", value_name="importance")


def _columns(features: pd.DataFrame) -> NDArray[np.bool_]:
    """Tell by (component, feature) which features are of the component."""
    owner = features.columns.get_level_values("component")
    return np.array([owner == component for component in owner.unique()])


def _permutation(
    pairs: PairModel, trees: Any, test: Positions, permutations: int, random: np.random.Generator
) -> Floats:
    x, y = pairs.x, pairs.similarity[test]
    row = squareform(np.arange(len(x)))
    # After a shuffle the pair (a, b) has what the pair (order[a], order[b]) had before it.
    orders = [random.permutation(len(row)) for _ in range(permutations)]
    sources = [row[tuple(order[pairs.ends[test]].T)] for order in orders]
    scores = [
        [trees.score(np.where(columns, x[source], x[test]), y) for source in sources]
        for columns in _columns(pairs.features)
    ]
    return np.asarray(trees.score(x[test], y) - np.mean(scores, axis=1))


def _drop_one(pairs: PairModel, trees: Any, train: Positions, test: Positions) -> Floats:
    y, scores = pairs.similarity, []
    for columns in _columns(pairs.features):
        x = pairs.x[:, ~columns]
        scores.append(clone(trees).fit(x[train], y[train]).score(x[test], y[test]))
    return trees.score(pairs.x[test], y[test]) - np.array(scores)


def _explainer(trees: Any) -> Any:
    import shap  # takes seconds, which all who import the package would wait for

    return shap.TreeExplainer(trees)


def _shap_values(model: PairModel, rows: Positions) -> tuple[Floats, Floats]:
    """Return SHAP values (pair, component), each the sum over the component's features, and base values."""
    explanation = _explainer(model.trees)(model.x[rows])
    return explanation.values @ _columns(model.features).T, explanation.base_values


def fit_similarity(
    similarity: xr.DataArray,
    components: pd.DataFrame,
    *,
    kind: Encoding = "both",
    seed: int = 0,
    device: str | None = None,
) -> PairModel:
    """Fit xgboost to all pairs, for `explain_pairs` and `component_interactions`.

    Folds that leave architectures out choose its settings from `TREE_GRID`. How good it is on what it
    hasn't seen, `validate_similarity` tells.

    Parameters
    ----------
    similarity, components, kind, seed, device
        As in `validate_similarity`, as are the errors raised.
    """
    pairs = _untrained(similarity, components, kind, seed, device)
    _check_count(len(pairs.components), INNER_FOLDS)
    everything = np.arange(len(pairs.similarity))
    return replace(pairs, trees=_tuned_trees(pairs, everything, _inner_folds(pairs.ends, seed)))


def explain_pairs(model: PairModel) -> "shap.Explanation":
    """Split every pair's predicted similarity into a base value and a contribution of each component.

    Examples
    --------
    >>> model = fit_similarity(published_sat(), published_components())
    >>> shap.plots.beeswarm(explain_pairs(model))

    Returns
    -------
    Explanation
        Pairs in the order of `model.features`. values (pair, component), in the unit of the similarity, and
        base_values (pair,) add up to the prediction; data (pair, component): 1 if the two models agree,
        else 0, or the difference of a control; display_data: what they have.

    References
    ----------
    Lundberg et al., *From local explanations to global understanding with explainable AI for trees*,
    Nature Machine Intelligence 2020. A component's value here is the sum over its features.
    """
    import shap

    same = pair_features(model.components, kind="same").T.groupby(level="component", sort=False).first().T
    values, base = _shap_values(model, np.arange(len(same)))
    return shap.Explanation(
        values,
        base_values=base,
        data=same.to_numpy(),
        display_data=_labels(model.components),
        feature_names=[str(name) for name in model.components],
    )


def _labels(components: pd.DataFrame) -> NDArray[Any]:
    """Write what both models of a pair have, or what either has."""
    texts = components.map(lambda value: f"{value:.4g}" if isinstance(value, float) else str(value))
    one, two = (texts.to_numpy(object)[end] for end in _ends(len(components)).T)
    return np.where(one == two, one, one + " / " + two)


def explain_pair(model: PairModel, first: str, second: str) -> "shap.Explanation":
    """Explain one pair, as `explain_pairs` does all: values (component,), base_values a number.

    Examples
    --------
    >>> shap.plots.waterfall(explain_pair(model, "resnet50", "convnext_tiny"))

    Raises
    ------
    ValueError
        If the two are the same, or one of them was not among the models fitted to.
    """
    for name in (first, second):
        if name not in model.components.index:
            raise ValueError(f"{name} is not among the models fitted to")
    if first == second:
        raise ValueError(f"a pair takes two models, got {first} twice")
    pair = sorted((first, second), key=model.components.index.get_loc)
    return explain_pairs(model)[model.features.index.get_loc(tuple(pair))]


def component_interactions(model: PairModel, *, pairs: int = 50, seed: int = 0) -> xr.DataArray:
    """Measure how much two components matter only together: mean absolute SHAP interaction value.

    Parameters
    ----------
    model : PairModel
        From `fit_similarity`; with encoding `"same"` it takes the least time, by far.
    pairs : int
        How many to average over, drawn at random.
    seed : int
        Of the draw.

    Returns
    -------
    DataArray
        Symmetric (component, other), unit of the similarity. Off the diagonal is half of what two
        components add together (the other half is across the diagonal), on it what one adds alone.
    """
    drawn = np.random.default_rng(seed).permutation(len(model.features))[:pairs]
    values = _explainer(model.trees).shap_interaction_values(model.x[drawn])
    columns, names = _columns(model.features), [str(name) for name in model.components]
    mean = abs(columns @ values @ columns.T).mean(axis=0)
    return xr.DataArray(
        mean, {"component": names, "other": names}, ("component", "other"), name="interaction"
    )
