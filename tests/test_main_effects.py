import numpy as np
import pytest
import tiny
import xarray as xr
from sklearn.linear_model import LogisticRegression

import modelsim as ms

NAMES = [f"m{i}" for i in range(6)]


def symmetric(values):
    names = [f"m{i}" for i in range(len(values))]
    return xr.DataArray(values, {"model": names, "other": names}, ("model", "other"), name="SAT")


def directed(log_odds, trials=1000):
    """Transferability with the counts that the log-odds make expected."""
    hits = np.round(trials / (1 + np.exp(-np.asarray(log_odds))))
    counts = {
        "hits": (("source", "target"), hits),
        "trials": (("source", "target"), np.full_like(hits, trials)),
    }
    names = [f"m{i}" for i in range(len(hits))]
    return xr.DataArray(hits / trials, {"source": names, "target": names, **counts}, ("source", "target"))


def planted(seed=0, n=6, spread=0.0):
    random = np.random.default_rng(seed)
    strength, fragility = random.normal(size=(2, n))
    strength, fragility = strength - strength.mean(), fragility - fragility.mean()
    pair = spread * random.normal(size=(n, n))
    return strength, fragility, strength[:, None] + fragility[None, :] + pair


def test_additive_effects_on_sat_are_found_exactly():
    effect = np.array([-0.5, -0.3, 0.0, 0.1, 0.3, 0.4])
    found = ms.main_effects(symmetric(2.5 + effect[:, None] + effect[None, :]))
    assert found.effect.values == pytest.approx(effect)
    assert found.attrs["mean"] == pytest.approx(2.5)
    assert found.attrs["explained"] == pytest.approx(1)
    off = ~np.eye(6, dtype=bool)
    assert np.abs(found.residual.values[off]).max() < 1e-12
    assert np.isnan(np.diag(found.residual.values)).all()


def test_strength_and_fragility_are_found_up_to_the_rounding_of_counts():
    strength, fragility, log_odds = planted()
    found = ms.main_effects(directed(log_odds, trials=1_000_000))
    assert found.strength.values == pytest.approx(strength, abs=1e-3)
    assert found.fragility.values == pytest.approx(fragility, abs=1e-3)
    assert found.attrs["explained"] > 0.999


def test_strength_belongs_to_the_source_and_fragility_to_the_target():
    log_odds = np.zeros((5, 5))
    log_odds[2, :] += 1.0
    log_odds[:, 4] += 2.0
    found = ms.main_effects(directed(log_odds, trials=100_000))
    assert found.strength.idxmax() == "m2"
    assert found.fragility.idxmax() == "m4"


def test_a_pair_that_stands_out_is_left_in_the_residual():
    *_, log_odds = planted(n=8)
    log_odds[1, 5] += 2
    log_odds[5, 1] += 2
    relative = ms.relative_sat(directed(log_odds, trials=100_000))
    ranked = ms.pairs(relative).sort_values()
    assert ranked.index[-1] == ("m1", "m5")
    assert ranked.iloc[-1] > 1 > ranked.iloc[-2]


def test_the_fit_is_near_that_of_an_independent_binomial_one():
    *_, log_odds = planted(seed=3, n=8, spread=0.05)
    rate = directed(log_odds, trials=500)
    source, target = np.nonzero(~np.eye(8, dtype=bool))
    design = np.hstack([np.eye(8)[source], np.eye(8)[target]])
    hits = rate.hits.values[source, target]
    binomial = LogisticRegression(C=1e6, fit_intercept=False, max_iter=10_000).fit(
        np.vstack([design, design]),
        np.repeat([1, 0], len(hits)),
        sample_weight=np.concatenate([hits, 500 - hits]),
    )
    expected = binomial.coef_[0, :8]
    found = ms.main_effects(rate)
    assert found.strength.values == pytest.approx(expected - expected.mean(), abs=0.02)


def test_a_pair_without_hits_stays_finite():
    *_, log_odds = planted()
    rate = directed(log_odds)
    rate.hits[0, 1] = 0
    assert np.isfinite(ms.main_effects(rate).strength).all()


def test_relative_sat_is_symmetric_and_adds_to_nothing():
    *_, log_odds = planted(spread=1)
    for score in (directed(log_odds), symmetric(log_odds + log_odds.T)):
        relative = ms.relative_sat(score)
        values = relative.fillna(0).values
        assert relative.dims == ("model", "other")
        assert np.allclose(values, values.T)
    assert np.abs(values.sum(0)).max() < 1e-9


def test_adding_effects_of_single_models_leaves_relative_sat_as_it_is():
    random = np.random.default_rng(1)
    values = random.normal(size=(7, 7))
    values, effect = values + values.T, random.normal(size=7)
    plain, shifted = (
        ms.relative_sat(symmetric(v)) for v in (values, values + effect[:, None] + effect[None, :])
    )
    assert np.allclose(plain, shifted, equal_nan=True)


def test_a_study_gives_it_by_way_of_its_transferability():
    random = np.random.default_rng(0)
    study = tiny.study(np.zeros(40), np.zeros((4, 40)), random.integers(0, 2, size=(4, 4, 40)))
    assert ms.relative_sat(ms.transferability(study)).attrs["units"] == "log of the odds ratio"
    assert ms.relative_sat(ms.sat(study)).attrs["units"] == "log of the ratio of per cents"


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_models_are_an_error(n):
    with pytest.raises(ValueError, match=f"four models or more, got {n}: "):
        ms.main_effects(symmetric(np.ones((n, n))))


def test_a_missing_score_is_named():
    values = np.ones((5, 5))
    values[3, 1] = np.nan
    with pytest.raises(ValueError, match="m1 and m3 is NaN"):
        ms.main_effects(symmetric(values))


def test_a_transferability_that_lost_its_counts_is_not_taken_for_a_sat():
    *_, log_odds = planted()
    rate = directed(log_odds).drop_vars(["hits", "trials"])
    with pytest.raises(ValueError, match="m0 and m1 differs with their order"):
        ms.relative_sat(rate)


def test_what_stands_beside_a_score_leaves_its_effects_as_they_are():
    random = np.random.default_rng(0)
    study = tiny.study(np.zeros(40), np.zeros((4, 40)), random.integers(0, 2, size=(4, 4, 40)))
    score = ms.sat(study)
    assert ms.main_effects(score).identical(ms.main_effects(score.reset_coords(drop=True)))
