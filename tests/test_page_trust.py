import numpy as np
import pandas as pd
import pytest
import xarray as xr
from pages import page
from scipy.spatial.distance import squareform
from scipy.stats import spearmanr

trust = page("trust")
NAMES = tuple(f"m{i}" for i in range(8))
EIGHT = np.random.default_rng(0).normal(size=28)


def reading(values):
    matrix = xr.DataArray(
        squareform(values), {"model": list(NAMES), "other": list(NAMES)}, ("model", "other")
    )
    return trust.fixed(matrix)


def noisy(size, seed=1):
    return EIGHT + size * np.random.default_rng(seed).normal(size=28)


@pytest.mark.parametrize(("other", "expected"), [(EIGHT**3, 1), (-EIGHT, -1), (noisy(1), None)])
def test_likeness_is_spearman_of_all_pairs(other, expected):
    expected = spearmanr(EIGHT, other).statistic if expected is None else expected
    found = trust.likeness([(reading(EIGHT), reading(other))], NAMES)
    assert found.correlation == pytest.approx(expected, abs=1e-6)
    assert found.low <= found.correlation <= found.high


def test_likeness_averages_seeds_by_inverse_tanh_and_less_than_seeds_has_the_sign_of_the_gain():
    small, large = ([(reading(EIGHT), reading(noisy(size)))] for size in (0.1, 3))
    each = [trust.likeness(one, NAMES).correlation for one in (small, large)]
    both = trust.likeness(small + large, NAMES).correlation
    assert np.arctanh(both) == pytest.approx(np.arctanh(each).mean(), abs=1e-6)
    assert (
        trust.less_than_seeds(small, large, NAMES).low > 0 > trust.less_than_seeds(large, small, NAMES).high
    )


def test_twin_and_nearest_are_found():
    names = ["a", "a-seed1", "b", "b-seed1"]
    values = np.array([[np.nan, 3, 1, 2], [3, np.nan, 0, 1], [1, 0, np.nan, 0.5], [2, 1, 0.5, np.nan]])
    relative = xr.DataArray(values, {"model": names, "other": names}, ("model", "other"))
    assert (
        trust.twin_first(relative) == 2
    )  # a and its second seed; b's nearest is a, and so is its second seed's


def test_fragility_leaves_the_family_out_and_the_gap_of_versions_has_the_planted_sign():
    names = ["x", "y", "one", "one2", "other", "other2"]
    onto = np.array([0.5, 0.5, 0.8, 0.8, 0.3, 0.4])
    rate = np.tile(onto, (6, 1))
    rate[2:, 2:] = 1  # within the family all are fooled: must not count
    matrix = xr.DataArray(rate, {"source": names, "target": names}, ("source", "target"))
    trust.fragility.__globals__["names"] = ["x", "y", "one"]
    found = pd.Series(trust.compare_versions(matrix, names[2:4], names[4:]))
    assert found[["batch, %", "group or layer, %"]].to_list() == pytest.approx([80, 35])
    odds = np.log(onto / (1 - onto))
    assert found["log-odds"] == pytest.approx(odds[2] - odds[4:].mean())
    assert found["seeds"] == pytest.approx((odds[5] - odds[4]) / 2)
