import os
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from pages import page
from scipy.spatial.distance import jensenshannon, squareform
from scipy.stats import rankdata, spearmanr

import modelsim as ms

book = page("laptop")
N = 24
NAMES = [f"m{i}" for i in range(N)]
BASES = pd.Series(["CNN"] * 14 + ["NAS"] * 10, NAMES)
SAME = np.array([a == b for a, b in combinations(BASES, 2)])


def matrix(vector):
    return xr.DataArray(squareform(vector), {"model": NAMES, "other": NAMES}, ("model", "other"))


def noise(seed):
    return np.random.default_rng(seed).normal(size=N * (N - 1) // 2)


def effects(seed):
    single = 3 * np.random.default_rng(seed).normal(size=N)
    return np.array([a + b for a, b in combinations(single, 2)])


def test_effects_are_those_of_least_squares():
    score = matrix(noise(0) + effects(1))
    design = np.array([[name in pair for name in NAMES] for pair in combinations(NAMES, 2)], float)
    values, relative = squareform(score.values), book.without_effects(score)
    rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    np.testing.assert_allclose(squareform(relative, checks=False), rest, atol=1e-9)
    np.testing.assert_allclose(ms.pairs(ms.relative_sat(score)), rest)
    np.testing.assert_array_equal(squareform(book.ranked(np.exp(score))), rankdata(values))
    clean = book.without_effects(
        matrix(SAME.astype(float))
    )  # as many values as kinds of pair: no noise in ranks
    assert len(np.unique(squareform(clean, checks=False))) == 3
    # Single models alone make no agreement once they are out.
    one, other = (matrix(noise(seed) + effects(2)) for seed in (0, 1))
    assert ms.agreement(one, other, permutations=9).low > 0.6
    relative = ms.agreement(one, other, permutations=9, transform=book.without_effects)
    assert relative.low < 0 < relative.high


def test_divergence_is_scipys():
    probability = np.random.default_rng(0).dirichlet(np.full(10, 0.1), size=(4, 50))
    expected = [(jensenshannon(*pair, axis=-1) ** 2).mean() for pair in combinations(probability, 2)]
    np.testing.assert_allclose(book.divergence(probability), squareform(expected), atol=1e-5)


def test_what_only_the_rival_knows_is_not_left_to_sat():
    rival, truth, sat = noise(0), noise(0) + 0.3 * noise(1), noise(0) + 0.5 * noise(2)
    matrices = [matrix(sat), matrix(rival), matrix(truth)]
    found = book.rivals(matrices, xr.DataArray.copy, NAMES)
    x, y, z = (spearmanr(*pair).statistic for pair in ((sat, truth), (rival, truth), (sat, rival)))
    assert found[:3] == pytest.approx([x, y, x - y])
    assert found[3] == pytest.approx((x - y * z) / np.sqrt((1 - y**2) * (1 - z**2)))
    assert abs(found[3]) < 0.15 < 0.6 < found[4]
    alone, kept, *_ = book.controlled([*matrices, matrices[1]], xr.DataArray.copy, NAMES)
    assert [alone, kept] == pytest.approx([y, found[3]])


def test_tenths_take_out_what_straight_lines_leave():
    fixed, bent = matrix(noise(0)), noise(0) ** 2
    matrices = [matrix(bent + 0.5 * noise(1)), fixed, matrix(bent + 0.5 * noise(2))]
    assert book.rivals(matrices, xr.DataArray.copy, NAMES)[3] > 0.5
    assert book.within_tenths(matrices, xr.DataArray.copy, NAMES)[0] < 0.3


def test_agreement_planted_within_bases_is_found_there_only():
    matrices = [matrix(np.where(SAME, 3 * noise(0), 0) + noise(seed)) for seed in (1, 2)]
    within, across, _ = book.within_and_across(BASES, matrices, book.without_effects, NAMES)
    assert within > 0.6 > 0.3 > abs(across)
    kinds = ["CNN and CNN", "CNN and NAS", "NAS and NAS"]
    x, y = (squareform(book.without_effects(one), checks=False) for one in matrices)
    groups = [book.kinds_of(BASES) == kind for kind in kinds]
    assert [group.sum() for group in groups] == [91, 140, 45]
    expected = [spearmanr(x[group], y[group]).statistic for group in groups]
    assert book.by_kind(kinds, BASES, matrices, NAMES) == pytest.approx(expected)


@pytest.mark.skipif(not os.environ.get("MODELSIM_CACHE"), reason="the released scores are not here")
def test_numbers_of_the_answer_by_another_way():
    study = ms.first_seeds(ms.open_study(ms.data_directory() / "fashion69"))
    here, there = ms.sat(study).reset_coords(drop=True), ms.published_sat()
    there = there.sel(model=here.model, other=here.other)
    for transform, expected in ((xr.DataArray.copy, 0.60), (ms.relative_sat, 0.42)):
        one, other = (ms.pairs(transform(score)) for score in (here, there))
        assert spearmanr(one, other).statistic == pytest.approx(expected, abs=0.005)
