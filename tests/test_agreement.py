from functools import partial
from itertools import permutations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import spearmanr

import modelsim as ms
from modelsim.agreement import rank_correlation

agreement = partial(ms.agreement, permutations=9)


def matrix(values, names=None):
    names = names or [f"m{i}" for i in range(len(values))]
    return xr.DataArray(np.asarray(values, float), {"model": names, "other": names}, ("model", "other"))


def random_matrix(n, seed, names=None):
    values = np.random.default_rng(seed).normal(size=(n, n))
    return matrix(values + values.T, names)


def spearman(one, other):
    return spearmanr(ms.pairs(one), ms.pairs(other)).statistic


def test_correlation_is_spearmans_over_pairs_of_common_models_whatever_their_order():
    first, second = random_matrix(8, 0, list("abcdefgh")), random_matrix(9, 1, list("zhgfedcba"))
    common = second.sel(model=first.model, other=first.other)
    found = agreement(first, second)
    assert found.correlation == pytest.approx(spearman(first, common))
    assert found.models == 8
    assert found == agreement(first, second.where(second.model != second.other))  # the diagonal doesn't count


@pytest.mark.parametrize("seed", range(3))
def test_p_value_of_five_models_is_that_of_all_their_orders(seed):
    first, second = random_matrix(5, seed), random_matrix(5, 10 + seed).round()  # rounded: ties
    orders = [np.ix_(order, order) for order in permutations(range(5))]
    by_order = np.array([spearman(matrix(first.values[order]), second) for order in orders])
    at_least = (by_order >= by_order[0] - 1e-9).mean()
    assert ms.agreement(first, second)[::3] == pytest.approx((by_order[0], at_least))
    # Orders drawn at random, the observed one added: three standard errors.
    drawn = agreement(first, second, permutations=119).p_value
    assert drawn == pytest.approx(at_least, abs=3 * np.sqrt(0.25 / 119) + 1 / 120)


def test_equal_matrices_have_the_least_possible_p_value_and_the_seed_decides():
    first, second = random_matrix(10, 0), random_matrix(10, 1)
    assert ms.agreement(first, first, permutations=99)[2:4] == (pytest.approx(1), 0.01)
    one, same, other = (agreement(first, second, permutations=99, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one.p_value != other.p_value


def test_p_values_of_unrelated_matrices_are_spread_evenly():
    both = [(random_matrix(8, seed), random_matrix(8, 100 + seed)) for seed in range(60)]
    p_values = np.array([agreement(*matrices, permutations=99).p_value for matrices in both])
    assert 0.35 < p_values.mean() < 0.65
    assert (p_values < 0.1).mean() < 0.25


def test_interval_holds_the_truth_as_often_as_it_says():
    # Of two noisy copies of independent normal pairs, Pearson's correlation is 1 / 2, and Spearman's this:
    truth = 6 / np.pi * np.arcsin(0.25)
    rest = [random_matrix(10, seed).values for seed in range(120)]
    found = [agreement(*(matrix(a + b) for b in (c, d))) for a, c, d in zip(*[iter(rest)] * 3, strict=True)]
    assert np.mean([one.low < truth < one.high for one in found]) >= 0.875


def test_pairs_that_share_a_model_are_not_taken_for_independent():
    # A hub raises its whole row in both: seven of 28 pairs agree, but it is one model that does, and
    # one shuffle in eight puts it back.
    hub = np.zeros((8, 8))
    hub[0] = hub[:, 0] = 9
    first, second = (matrix(random_matrix(8, seed).values + hub) for seed in (0, 1))
    assert spearmanr(ms.pairs(first), ms.pairs(second), alternative="greater").pvalue < 0.05
    assert ms.agreement(first, second).p_value > 0.05


def test_transform_is_done_to_all_and_again_without_each_architecture():
    matrices = [random_matrix(9, seed) for seed in range(3)]
    found = agreement(*matrices[:2], given=matrices[2:], transform=ms.relative_sat)

    def by_hand(kept):
        x, y, z = (ms.pairs(ms.relative_sat(one.sel(model=kept, other=kept))) for one in matrices)
        return np.arctanh(rank_correlation(x, y, [z]))

    estimate, _, low, high = np.tanh(ms.jackknife(by_hand, matrices[0].model.values.tolist()))
    assert found[:3] == pytest.approx((estimate, low, high))


def test_ties_of_an_indicator_stay_ties_under_a_transform():
    first, second = (random_matrix(12, seed) for seed in (0, 1))
    same = matrix(np.equal.outer(np.arange(12) % 3, np.arange(12) % 3))
    jittered = same + 1e-13 * random_matrix(12, 2)
    for transform in (xr.DataArray.copy, ms.relative_sat):
        found = [agreement(first, second, given=[one], transform=transform) for one in (same, jittered)]
        assert found[0] == found[1]


def test_a_control_that_makes_the_agreement_leaves_none():
    common = random_matrix(20, 0)
    first, second = (matrix(common.values + 0.5 * random_matrix(20, seed).values) for seed in (1, 2))
    assert agreement(first, second).low > 0.6
    controlled = agreement(first, second, given=[common])
    assert -0.3 < controlled.low < 0 < controlled.high < 0.3


def test_partial_correlation_agrees_with_the_textbook_formula():
    x, y, z = np.random.default_rng(0).normal(size=(3, 50))
    xy, xz, yz = (spearmanr(*both).statistic for both in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert rank_correlation(x, y) == pytest.approx(xy)
    assert rank_correlation(x, y, [z]) == pytest.approx(expected)
    # Controls that repeat each other, or say nothing, take nothing more away.
    assert rank_correlation(x, y, [z, z, np.ones(50)]) == pytest.approx(expected)
    # Only what the controls determine wholly leaves nothing.
    ranks, swapped = np.arange(5000), [1, 0, *range(2, 5000)]
    assert np.isnan(rank_correlation(swapped, ranks, [ranks]))
    assert rank_correlation(swapped, swapped, [ranks]) == pytest.approx(1)


ONE, OTHER = random_matrix(12, 0), random_matrix(12, 1)
HOLED = OTHER.where((OTHER.model != "m1") | (OTHER.other != "m3"))
REFUSED = {
    "too few common models": (ONE, random_matrix(5, 0, list("vwxyz")), [], r"four models .* got 0"),
    "a NaN": (ONE, HOLED, [], "value of m1 and m3 is NaN"),
    "a directed control": (ONE, OTHER, [HOLED.fillna(7)], "m1 and m3 differs with their order"),
    "a matrix of one value": (ONE * 0, OTHER, [], "nothing to correlate"),
    "a control that is the first": (ONE, OTHER, [ONE], "nothing to correlate"),
    "a control that is the second": (ONE, OTHER, [OTHER], "nothing to correlate"),
}


@pytest.mark.parametrize(("first", "second", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compared_is_refused(first, second, given, message):
    with pytest.raises(ValueError, match=message):
        agreement(first, second, given=given)


def test_jackknife_of_a_mean_is_the_textbooks_standard_error():
    value = dict(zip("abcdefgh", np.random.default_rng(0).normal(size=8), strict=True))
    found = ms.jackknife(lambda kept: [np.mean([value[name] for name in kept]), 1], list(value), level=0.8)
    sample = list(value.values())
    assert found.estimate == pytest.approx([np.mean(sample), 1])
    assert found.error == pytest.approx([np.std(sample, ddof=1) / np.sqrt(8), 0])
    assert found.high - found.low == pytest.approx(2 * 1.414924 * found.error)  # Student's t of 7, 80 %


def test_jackknife_leaves_out_seeds_of_an_architecture_together():
    names, left = ["a", "b", "c", "d", "a-seed1", "b-seed2"], []
    ms.jackknife(lambda kept: left.append(sorted(set(names) - set(kept))) or 0, names)
    assert left == [[], ["a", "a-seed1"], ["b", "b-seed2"], ["c"], ["d"]]
    with pytest.raises(ValueError, match=r"four architectures .* got 3: \['a', 'b', 'c'\]"):
        ms.jackknife(len, ["a", "b", "b-seed1", "c"])
