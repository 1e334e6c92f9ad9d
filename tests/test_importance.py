import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from modelsim import importance
from modelsim.importance import (
    component_importance,
    component_interactions,
    explain_pair,
    explain_pairs,
    fit_similarity,
    pair_features,
    pair_folds,
    validate_similarity,
)

# shap gives its colour maps their bad, over and under colours in a way that matplotlib will drop.
pytestmark = pytest.mark.filterwarnings("ignore:The set_(bad|over|under) function:PendingDeprecationWarning")

ARCHITECTURES = ("one new", "both new")
QUICK = {"folds": 3, "repeats": 1, "device": "cpu"}
TINY = pd.DataFrame(
    {"activation": ["ReLU", "GeLU", "ReLU"], "norm": ["BN", "LN", "LN"], "accuracy": [70.0, 80.0, 75.0]},
    index=["a", "b", "c"],
)


def zoo(n=45, *, seed=0, values=3, columns=6):
    """Architectures with components drawn at random, of which the last is called the base."""
    drawn = np.random.default_rng(seed).integers(values, size=(n, columns)).astype(str)
    names = [f"component {i}" for i in range(columns - 1)] + ["Base architecture"]
    return pd.DataFrame(drawn, [f"m{i}" for i in range(n)], names)


def matrix(values, models):
    return xr.DataArray(
        np.asarray(values, float), {"model": models, "other": models}, ("model", "other"), name="SAT"
    )


def noise(models, *, seed=0, scale=0.1):
    drawn = np.random.default_rng(seed).normal(scale=scale, size=(len(models), len(models)))
    return matrix(2 + np.triu(drawn, 1) + np.triu(drawn, 1).T, models)


def agree(components, column):
    values = components[column].to_numpy()
    return (values[:, None] == values).astype(float)


def planted(components, *, seed=0):
    """Similarity by agreement in components 1 and 3, and noise."""
    signal = agree(components, "component 1") + 0.6 * agree(components, "component 3")
    return noise(components.index, seed=seed) + signal


@pytest.fixture
def untuned(monkeypatch):
    """One setting to choose from, for tests in which the choice doesn't matter."""
    monkeypatch.setattr(importance, "TREE_GRID", {"max_depth": [3]})
    monkeypatch.setitem(importance.TREES, "n_estimators", 40)


@pytest.fixture(scope="module")
def judged():
    return validate_similarity(planted(zoo()), zoo(), **QUICK)


@pytest.fixture(scope="module")
def weighed():
    return component_importance(planted(zoo()), zoo(), permutations=3, **QUICK)


@pytest.fixture(scope="module")
def fitted():
    """Trees fitted to what depends on the two components only together."""
    components = zoo().assign(accuracy=np.linspace(70, 80, 45))
    together = agree(components, "component 1") * agree(components, "component 3")
    return fit_similarity(noise(components.index) + together, components, kind="same", device="cpu")


def mean_r2(table):
    return table.pivot_table("r2", "model", "split")


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ("same", {"same": [0, 1, 0]}),
        ("values", {"GeLU": [1, 0, 1], "ReLU": [1, 2, 1]}),
        ("both", {"same": [0, 1, 0], "GeLU": [1, 0, 1], "ReLU": [1, 2, 1]}),
    ],
)
def test_features_of_a_tiny_zoo(kind, activation):
    features = pair_features(TINY, kind=kind)
    assert features.index.to_list() == [("a", "b"), ("a", "c"), ("b", "c")]
    assert features.columns.names == ["component", "feature"]
    assert features["activation"].to_dict("list") == activation
    assert features["accuracy"].to_dict("list") == {"difference": [10, 5, 5], "mean": [75, 72.5, 77.5]}


@given(st.permutations(range(8)), st.integers(0, 100), st.sampled_from(["same", "values", "both"]))
def test_features_do_not_depend_on_which_model_comes_first(order, seed, kind):
    components = zoo(8, seed=seed).assign(accuracy=np.arange(8) ** 2)
    straight, permuted = (pair_features(table, kind=kind) for table in (components, components.iloc[order]))
    permuted.index = pd.MultiIndex.from_tuples([sorted(pair) for pair in permuted.index])
    pd.testing.assert_frame_equal(permuted.loc[straight.index], straight, check_names=False)


@pytest.mark.parametrize("n_models", [9, 14])
def test_no_architecture_of_a_pair_of_new_ones_is_trained_on(n_models):
    ends = np.column_stack(np.triu_indices(n_models, 1))
    for fold in pair_folds(n_models, ARCHITECTURES, folds=3, seed=1):
        trained = set(ends[fold.train].ravel())
        assert not trained & set(ends[fold.tests["both new"]].ravel())
        assert all((a in trained) != (b in trained) for a, b in ends[fold.tests["one new"]])
        parts = [fold.train, *fold.tests.values()]
        assert sorted(np.concatenate(parts)) == list(range(len(ends)))


def test_inner_folds_hold_out_architectures_within_the_training_pairs():
    ends = np.column_stack(np.triu_indices(12, 1))
    for fold in pair_folds(12, ARCHITECTURES, folds=3):
        for train, test in fold.inner:
            known = set(ends[fold.train][train].ravel())
            assert not any(set(pair) <= known for pair in ends[fold.train][test])
            assert sorted(np.concatenate([train, test])) == list(range(len(fold.train)))


def test_random_folds_test_every_pair_once_a_repeat():
    folds = list(pair_folds(9, ("random pairs",), folds=3, repeats=2))
    assert [(fold.repeat, fold.fold) for fold in folds] == [(r, f) for r in (0, 1) for f in (0, 1, 2)]
    for repeat in (folds[:3], folds[3:]):
        tested = np.concatenate([fold.tests["random pairs"] for fold in repeat])
        assert sorted(tested) == list(range(36))
    assert not any(set(fold.train) & set(fold.tests["random pairs"]) for fold in folds)


def test_validation_is_tidy(judged):
    assert judged.columns.to_list() == ["split", "model", "repeat", "fold", "pairs", "r2", "rmse"]
    assert len(judged) == 3 * 5 * 3
    assert judged[judged.split == "both new"].pairs.unique().tolist() == [15 * 14 / 2]
    assert judged[judged.split == "one new"].pairs.unique().tolist() == [15 * 30]
    assert judged[judged.split == "random pairs"].pairs.unique().tolist() == [45 * 44 / 2 / 3]


def test_planted_components_are_learnt_and_beat_the_baselines_on_new_architectures(judged):
    r2 = mean_r2(judged)
    assert (r2.loc["xgboost"] > 0.85).all()
    assert (r2.loc["ridge"] > 0.85).all()
    assert (r2.loc[["mean", "base", "additive"], list(ARCHITECTURES)] < 0.1).all(axis=None)


def test_planted_components_come_first_by_every_importance(weighed):
    assert weighed.columns.to_list() == ["component", "repeat", "fold", "measure", "importance"]
    assert weighed.measure.unique().tolist() == ["permutation", "SHAP", "drop-one"]
    mean = weighed.pivot_table("importance", "component", "measure")
    for measure in mean:
        assert mean[measure].nlargest(2).index.to_list() == ["component 1", "component 3"]
    others = mean.drop(["component 1", "component 3"])
    assert (abs(others) < 0.1 * mean.loc["component 3"]).all(axis=None)


@pytest.mark.usefixtures("untuned")
def test_a_control_that_decides_comes_first():
    components = zoo(30).assign(accuracy=np.random.default_rng(3).normal(size=30))
    apart = abs(components.accuracy.to_numpy()[:, None] - components.accuracy.to_numpy())
    table = component_importance(
        noise(components.index) - apart, components, split="random pairs", permutations=2, **QUICK
    )
    mean = table.pivot_table("importance", "component", "measure")
    assert mean.idxmax().unique().tolist() == ["accuracy"]


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_predicted_from_noise(seed):
    components = zoo(30, seed=seed)
    r2 = mean_r2(validate_similarity(noise(components.index, seed=seed), components, **QUICK))
    assert (r2.loc[["ridge", "xgboost"], list(ARCHITECTURES)] <= 0.05).all(axis=None)


@pytest.mark.usefixtures("untuned")
def test_random_pairs_flatter_what_is_only_known_of_each_architecture():
    """An architecture's own trait, that no component explains, is learnt from its other pairs."""
    components = zoo(30, values=6)
    trait = np.random.default_rng(1).normal(size=30)
    r2 = mean_r2(validate_similarity(noise(components.index) + trait[:, None] + trait, components, **QUICK))
    assert r2.loc["xgboost", "random pairs"] > 0.5
    assert r2.loc["additive", "random pairs"] > 0.9
    assert r2.loc["xgboost", "both new"] < 0.1


@pytest.mark.usefixtures("untuned")
def test_additive_and_base_predictions_are_those_computed_by_hand():
    components, similarity = zoo(9, seed=5), noise(zoo(9).index, seed=5, scale=1)
    table = validate_similarity(similarity, components, **QUICK).set_index(["split", "model", "fold"])
    ends, base = np.column_stack(np.triu_indices(9, 1)), components["Base architecture"].to_numpy()
    y = np.array([similarity.values[a, b] for a, b in ends])
    for fold in pair_folds(9, ARCHITECTURES, folds=3, repeats=1):
        train, overall = ends[fold.train], y[fold.train].mean()
        known = {
            m: np.mean([similarity.values[a, b] for a, b in train if m in (a, b)]) for m in train.ravel()
        }
        for split, test in fold.tests.items():
            additive = [known.get(a, overall) + known.get(b, overall) - overall for a, b in ends[test]]
            alike = [
                [y[k] for k in fold.train if sorted(base[ends[k]]) == sorted(base[pair])] or [overall]
                for pair in ends[test]
            ]
            for model, predicted in (("additive", additive), ("base", [np.mean(a) for a in alike])):
                error = np.sqrt(np.mean((y[test] - predicted) ** 2))
                assert table.rmse[split, model, fold.fold] == pytest.approx(error)


@pytest.mark.usefixtures("untuned")
def test_same_seed_same_numbers_and_another_seed_others():
    components = zoo(15)
    similarity = planted(components)
    for analysis in (validate_similarity, component_importance):
        one, same, other = (analysis(similarity, components, seed=seed, **QUICK) for seed in (0, 0, 1))
        pd.testing.assert_frame_equal(one, same)
        assert not one.equals(other)


@pytest.mark.usefixtures("untuned")
def test_diagonal_and_models_without_scores_do_not_count():
    components = zoo(15)
    similarity = planted(components.iloc[:12])
    expected = validate_similarity(similarity, components.iloc[:12], **QUICK)
    before = components.copy()
    np.fill_diagonal(similarity.values, np.nan)
    pd.testing.assert_frame_equal(validate_similarity(similarity, components, **QUICK), expected)
    assert np.isnan(np.diag(similarity)).all()
    assert components.equals(before)


def test_contributions_add_up_to_the_prediction(fitted):
    explanation = explain_pairs(fitted)
    assert explanation.values.shape == (45 * 44 / 2, 7)
    total = explanation.values.sum(axis=1) + explanation.base_values
    np.testing.assert_allclose(total, fitted.trees.predict(fitted.x), rtol=1e-4)
    np.testing.assert_array_equal(explanation.data[:, 1], fitted.features["component 1", "same"])


def test_one_pair_is_explained_in_either_order(fitted):
    import shap

    one, other = explain_pair(fitted, "m7", "m3"), explain_pair(fitted, "m3", "m7")
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.display_data, other.display_data)
    three, seven = fitted.components.loc["m3"], fitted.components.loc["m7"]
    for label, a, b in zip(one.display_data[:6], three[:6], seven[:6], strict=True):
        assert label == (a if a == b else f"{a} / {b}")
    assert one.display_data[6] == "70.68 / 71.59"
    shap.plots.waterfall(one, show=False)
    assert any("component 1" in text.get_text() for text in plt.gca().get_yticklabels())
    plt.close("all")


def test_components_that_matter_only_together_have_the_largest_interaction(fitted):
    table = component_interactions(fitted, pairs=20)
    np.testing.assert_allclose(table, table.T, atol=1e-6)
    apart = table.where(~np.eye(7, dtype=bool), 0.0)
    assert apart.stack(pair=apart.dims).idxmax().item() in [
        ("component 1", "component 3"),
        ("component 3", "component 1"),
    ]
    assert float(table.loc["component 1", "component 3"]) > 5 * float(table.loc["component 0", "component 2"])


@pytest.mark.parametrize("name", ["m3", "stranger"])
def test_pair_that_is_none_is_refused(fitted, name):
    with pytest.raises(ValueError, match=name):
        explain_pair(fitted, "m3", name)


def with_entry(value):
    similarity = planted(zoo(12))
    similarity.values[2, 5] = value
    return similarity


@pytest.mark.parametrize("analysis", [validate_similarity, component_importance, fit_similarity])
@pytest.mark.parametrize(
    ("similarity", "components", "culprit"),
    [
        (planted(zoo(12))[:5], zoo(12), "got shape (5, 12)"),
        (planted(zoo(12))[0], zoo(12), "got shape (12,)"),
        (with_entry(9.0), zoo(12), "m2 and m5 differs"),
        (with_entry(np.nan), zoo(12), "m2 and m5 is NaN"),
        (planted(zoo(12)), zoo(12).drop("m4"), "m4 has scores but no components"),
        (planted(zoo(12)), pd.concat([zoo(12), zoo(3)]), "m0 stands more than once in the components"),
        (
            planted(zoo(12)).isel(model=[0, *range(12)], other=[0, *range(12)]),
            zoo(12),
            "m0 stands more than once",
        ),
        (planted(zoo(12)), zoo(12).assign(norm="BN"), "'norm' is 'BN' in all 12 models"),
        (planted(zoo(12)), zoo(12).assign(norm=["BN", None] * 6), "'norm' of m1 is missing"),
        (planted(zoo(12)), zoo(12).assign(accuracy=[1.0, 2, np.nan] * 4), "'accuracy' of m2 is missing"),
        (planted(zoo(8)), zoo(8), "models, 3 in each; got 8"),
    ],
)
def test_bad_input_is_refused_naming_the_culprit(analysis, similarity, components, culprit):
    with pytest.raises(ValueError, match=re.escape(culprit)):
        analysis(similarity, components)


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda s, c: validate_similarity(s, c, base="stem"), "base must be one of component 0"),
        (lambda s, c: validate_similarity(s, c, folds=1), "at least 2 folds are needed, got 1"),
        (lambda s, c: validate_similarity(s, c, folds=5), "5 folds need 15 models"),
        (lambda s, c: component_importance(s, c, split="none new"), "got 'none new'"),
        (lambda s, c: component_importance(s, c[["component 1"]]), "without 'component 1'"),
        (lambda s, c: fit_similarity(s, c, kind="one-hot"), "kind must be one of same, values, both"),
    ],
)
def test_bad_option_is_refused_naming_it(call, culprit):
    with pytest.raises(ValueError, match=re.escape(culprit)):
        call(planted(zoo(12)), zoo(12))
