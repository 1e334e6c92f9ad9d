import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config
from pages import page
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from xgboost import XGBRegressor

import modelsim as ms

with warnings.catch_warnings():
    # shap gives its colour maps their bad, over and under colours in a way that matplotlib will drop.
    warnings.filterwarnings("ignore", "The set_(bad|over|under) function", PendingDeprecationWarning)
    importance = page("importance")

TREES = (XGBRegressor(n_estimators=40, colsample_bytree=0.5, n_jobs=1, random_state=0), {"max_depth": [3]})
LINEAR = (Ridge(), {"alpha": [1.0, 100.0]})


@pytest.fixture(autouse=True)
def in_this_process():
    with parallel_config(backend="sequential"):
        yield


def zoo(n=30, *, seed=0, values=3, columns=5):
    drawn = np.random.default_rng(seed).integers(values, size=(n, columns)).astype(str)
    return pd.DataFrame(drawn, [f"m{i}" for i in range(n)], [f"component {i}" for i in range(columns)])


def ends_of(n):
    return np.column_stack(np.triu_indices(n, 1))


def noise(n, *, seed=0, scale=0.1):
    return np.random.default_rng(seed).normal(scale=scale, size=n * (n - 1) // 2)


def judged(model, components, y):
    x, ends = ms.pair_features(components).to_numpy(), ends_of(len(components))
    for units, new in ((np.arange(len(y))[:, None], 1), (ends, 2)):
        errors = importance.squared_errors(importance.fitted(model, x, y, units), x, y, new)
        yield importance.r2(y, errors, np.ones((1, len(y)))).item()


@cache
def planted():
    """Similarity by agreement in components 1 and 3; component 4 is a copy of 3."""
    components, ends = zoo().assign(**{"component 4": lambda table: table["component 3"]}), ends_of(30)
    one, other = components.to_numpy()[ends.T]
    y = (one == other) @ [0, 1, 0, 0.6, 0] + noise(30)
    features = ms.pair_features(components)
    return components, features, y, ends, importance.fitted(TREES, features.to_numpy(), y, ends, repeats=1)


def test_no_held_out_network_is_in_training():
    ends = ends_of(14)
    for new in importance.held_out(ends, folds=3, repeats=2, seed=1):
        trained = set(ends[new == 0].ravel())
        assert not trained & set(ends[new == 2].ravel())
        assert all((a in trained) != (b in trained) for a, b in ends[new == 1])
    by_pair = list(importance.held_out(np.arange(len(ends))[:, None], folds=3))
    assert (np.sum(by_pair, axis=0) == 1).all()  # every pair once, and in training where it is 0


class Witness(RegressorMixin, BaseEstimator):
    """Takes the two networks of a pair for its features; every pair it is asked of must have a new one."""

    def fit(self, x, y):
        self.known_ = set(x.ravel())
        return self

    def predict(self, x):
        assert not any(set(pair) <= self.known_ for pair in x)
        return np.zeros(len(x))


def test_settings_are_chosen_on_networks_that_the_inner_fold_has_not_seen():
    for new in importance.held_out(ends_of(12), folds=3):
        pairs = ends_of(12)[new == 0]
        chosen = importance.tuned((Witness(), {}), pairs, np.zeros(len(pairs)), pairs)
        assert chosen.known_ == set(pairs.ravel())


def test_weights_are_how_often_a_draw_holds_both_networks():
    drawn = importance.times_drawn(ends_of(3), draws=200)
    assert (drawn[0] == 1).all()
    assert {tuple(sorted(row)) for row in drawn[1:]} == {(0, 0, 0), (0, 0, 2), (1, 1, 1)}


def test_r2_is_scikit_learns_also_when_pairs_are_tested_twice_and_drawn_often():
    ends, y, drawn = ends_of(12), noise(12), importance.times_drawn(ends_of(12), draws=3)
    x = ms.pair_features(zoo(12)).to_numpy()
    fits = importance.fitted(LINEAR, x, y, ends, repeats=2)
    for new in (1, 2):
        tests = [np.flatnonzero(count == new) for _, count in fits]
        predicted = np.concatenate([fit.predict(x[t]) for (fit, _), t in zip(fits, tests, strict=True)])
        t = np.concatenate(tests)
        theirs = [r2_score(y[t], predicted, sample_weight=weight[t]) for weight in drawn]
        np.testing.assert_allclose(
            importance.r2(y, importance.squared_errors(fits, x, y, new), drawn), theirs
        )


def test_planted_components_come_first_in_all_measures_and_copies_only_as_a_group():
    components, features, y, ends, fits = planted()
    x, owner, once = features.to_numpy(), features.columns.get_level_values(0), np.ones((1, len(y)))
    sets = [[name] for name in components] + [["component 3", "component 4"]]
    shuffled = pd.concat(importance.shuffled_errors(*f, 1, x, y, ends, owner, sets) for f in fits)
    weighed = zip(*(importance.weigh(*f, x, y, owner) for f in fits), strict=True)
    without, alone, moved = map(pd.concat, weighed)
    permutation, dropped = (importance.lost(errors, y, once).loc[0] for errors in (shuffled, without))
    copies, rest = ["component 3", "component 4"], ["component 0", "component 2"]
    for measure in permutation, moved.mean(), pd.Series(importance.r2(y, alone, once)[:, 0], alone.columns):
        assert measure[copies].max() < measure["component 1"]
        assert measure[rest].max() < 0.25 * measure[copies].min()
    assert abs(dropped[copies + rest]).max() < 0.03 < dropped["component 1"]
    assert permutation[", ".join(copies)] > 1.3 * permutation[copies].max()


def test_contributions_of_held_out_pairs_add_up_to_the_prediction():
    _, features, _, _, fits = planted()
    x, owner = features.to_numpy(), features.columns.get_level_values(0)
    same = features.xs("same", axis=1, level=1)
    for fit, new in fits:
        tested, explained = importance.explain(fit, new, x, owner, same)
        assert set(tested) == set(np.flatnonzero(new))
        total = explained.values.sum(axis=1) + explained.base_values
        np.testing.assert_allclose(total, fit.predict(x[tested]), atol=1e-5)
        np.testing.assert_array_equal(explained.data, same.to_numpy()[tested])


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_foretold_of_two_new_networks_from_noise(seed):
    _, two_new = judged(LINEAR, zoo(seed=seed), noise(30, seed=seed))
    assert -0.15 < two_new < 0.05


def test_random_pairs_flatter_what_is_only_known_of_each_network():
    trait = np.random.default_rng(1).normal(size=30)[ends_of(30)].sum(axis=1)
    random_pairs, two_new = judged(TREES, zoo(values=6), trait + noise(30))
    assert random_pairs > 0.5 > 0.1 > two_new


def test_association_is_one_of_copies_and_nothing_of_unrelated_components():
    one, other, *_ = (column for _, column in zoo(300, values=20).items())
    assert importance.cramers_v(one, one) == pytest.approx(1)
    assert importance.cramers_v(one, other) < 0.15
    assert importance.association(pd.crosstab(one, other)) > 0.2  # what the correction takes away
