import numpy as np
import pytest
import tiny
import xarray as xr
from sklearn.linear_model import LogisticRegression

import modelsim as ms


def symmetric(values):
    names = [f"m{i}" for i in range(len(values))]
    return xr.DataArray(values, {"model": names, "other": names}, ("model", "other"), name="SAT")


def directed(log_odds, trials=1_000_000):
    """Transferability with the counts that the log-odds make expected."""
    hits = np.round(trials / (1 + np.exp(-np.asarray(log_odds))))
    counts = {"hits": hits, "trials": np.full_like(hits, trials)}
    names, dims = [f"m{i}" for i in range(len(hits))], ("source", "target")
    coords = {"source": names, "target": names} | {key: (dims, value) for key, value in counts.items()}
    return xr.DataArray(hits / trials, coords, dims)


def planted(seed=0, n=6, spread=0.0):
    strength, fragility = np.random.default_rng(seed).normal(size=(2, n))
    strength, fragility = strength - strength.mean(), fragility - fragility.mean()
    pair = spread * np.random.default_rng(seed + 1).normal(size=(n, n))
    return strength, fragility, strength[:, None] + fragility + pair


def study():
    return tiny.study(
        np.zeros(40), np.zeros((4, 40)), np.random.default_rng(0).integers(0, 2, size=(4, 4, 40))
    )


def test_additive_effects_on_sat_are_found_exactly():
    effect = np.array([-0.5, -0.3, 0.0, 0.1, 0.3, 0.4])
    found = ms.main_effects(symmetric(2.5 + effect[:, None] + effect[None, :]))
    assert found.effect.values == pytest.approx(effect)
    assert [found.attrs["mean"], found.attrs["explained"]] == pytest.approx([2.5, 1])
    assert np.abs(found.residual.values[~np.eye(6, dtype=bool)]).max() < 1e-12
    assert np.isnan(np.diag(found.residual.values)).all()


def test_strength_of_sources_and_fragility_of_targets_are_found_up_to_the_rounding_of_counts():
    strength, fragility, log_odds = planted()
    found = ms.main_effects(directed(log_odds))
    assert found.strength.values == pytest.approx(strength, abs=1e-3)
    assert found.fragility.values == pytest.approx(fragility, abs=1e-3)
    assert found.attrs["explained"] > 0.999


def test_a_pair_that_stands_out_is_left_for_relative_sat():
    *_, log_odds = planted(n=8)
    log_odds[[1, 5], [5, 1]] += 2
    ranked = ms.pairs(ms.relative_sat(directed(log_odds))).sort_values()
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
    assert ms.main_effects(rate).strength.values == pytest.approx(expected - expected.mean(), abs=0.02)
    rate.hits[0, 1] = 0
    assert np.isfinite(ms.main_effects(rate).strength).all()


def test_relative_sat_is_symmetric_and_effects_of_single_models_leave_it_as_it_is():
    effect, (*_, log_odds) = np.arange(6.0), planted(spread=1)
    score = symmetric(log_odds + log_odds.T)
    plain, shifted, of_rate = map(
        ms.relative_sat, (score, score + effect[:, None] + effect, directed(log_odds))
    )
    np.testing.assert_allclose(plain, shifted)
    for relative in (plain, of_rate):
        np.testing.assert_allclose(relative, relative.T)
    assert np.abs(plain.fillna(0).sum("other")).max() < 1e-9


def test_a_study_gives_it_whatever_stands_beside_the_score():
    rate, score = ms.transferability(study()), ms.sat(study())
    units = [ms.relative_sat(one).attrs["units"] for one in (rate, score)]
    assert units == ["log of the odds ratio", "log of the ratio of per cents"]
    assert ms.main_effects(score).identical(ms.main_effects(score.reset_coords(drop=True)))


def test_too_few_models_a_missing_score_and_lost_counts_are_named():
    missing = np.ones((5, 5))
    missing[3, 1] = np.nan
    lost = directed(planted()[2]).drop_vars(["hits", "trials"])
    for score, message in [
        (symmetric(np.ones((3, 3))), "four models or more, got 3: "),
        (symmetric(missing), "m1 and m3 is NaN"),
        (lost, "m0 and m1 differs with their order"),
    ]:
        with pytest.raises(ValueError, match=message):
            ms.main_effects(score)
