from itertools import permutations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import spearmanr

import modelsim as ms
from modelsim.agreement import rank_correlation


def matrix(values, names=None):
    names = names or [f"m{i}" for i in range(len(values))]
    return xr.DataArray(np.asarray(values, float), {"model": names, "other": names}, ("model", "other"))


def random_matrix(n, seed, names=None):
    values = np.random.default_rng(seed).normal(size=(n, n))
    return matrix(values + values.T, names)


def test_correlation_is_spearmans_over_pairs():
    first, second = random_matrix(8, 0), random_matrix(8, 1)
    found = ms.agreement(first, second, permutations=9, resamples=9)
    assert found.correlation == pytest.approx(spearmanr(ms.pairs(first), ms.pairs(second)).statistic)
    assert (found.models, found.pairs) == (8, 28)


def test_matrices_are_matched_by_name_not_by_position():
    names = list("abcdefgh")
    first = random_matrix(8, 0, names)
    shuffled = first.sel(model=names[::-1], other=names[::-1])
    extra = random_matrix(9, 3, [*names, "z"])
    extra.loc[dict(model=names, other=names)] = first.values
    assert ms.agreement(first, shuffled, permutations=9, resamples=9).correlation == pytest.approx(1)
    assert ms.agreement(first, extra, permutations=9, resamples=9).models == 8


def test_the_diagonal_does_not_count():
    first, second = random_matrix(8, 0), random_matrix(8, 1)
    other = second.copy(data=np.where(np.eye(8, dtype=bool), np.nan, second))
    options = dict(permutations=19, resamples=19)
    assert ms.agreement(first, second, **options) == ms.agreement(first, other, **options)


@pytest.mark.parametrize("seed", range(3))
def test_p_value_of_five_models_is_that_of_all_their_orders(seed):
    first, second = random_matrix(5, seed), random_matrix(5, 10 + seed).round()  # rounded: ties
    observed, by_order = ms.agreement(first, second, resamples=1), []
    for order in permutations(range(5)):
        moved = first.values[np.ix_(order, order)]
        by_order.append(spearmanr(ms.pairs(matrix(moved)), ms.pairs(second)).statistic)
    at_least = np.array(by_order) >= by_order[0] - 1e-9
    assert observed.correlation == pytest.approx(by_order[0])
    assert observed.p_value == pytest.approx(at_least.mean())
    drawn = ms.agreement(first, second, permutations=119, resamples=1).p_value
    # Orders drawn at random, the observed one added: three standard errors.
    assert drawn == pytest.approx(at_least.mean(), abs=3 * np.sqrt(0.25 / 119) + 1 / 120)


def test_equal_matrices_have_the_least_possible_p_value():
    first = random_matrix(10, 0)
    found = ms.agreement(first, first, permutations=99, resamples=99)
    assert found.p_value == 0.01
    assert found.low == pytest.approx(1)


def test_p_values_of_unrelated_matrices_are_spread_evenly():
    found = [
        ms.agreement(random_matrix(8, seed), random_matrix(8, 100 + seed), permutations=99, resamples=1)
        for seed in range(60)
    ]
    p_values = np.array([one.p_value for one in found])
    assert 0.35 < p_values.mean() < 0.65
    assert (p_values < 0.1).mean() < 0.25


def test_pairs_that_share_a_model_are_not_taken_for_independent():
    # A hub raises its whole row in both: seven of 28 pairs agree, but it is one model that does, and
    # one shuffle in eight puts it back.
    hub = np.zeros((8, 8))
    hub[0] = hub[:, 0] = 9
    first, second = (matrix(random_matrix(8, seed).values + hub) for seed in (0, 1))
    assert spearmanr(ms.pairs(first), ms.pairs(second), alternative="greater").pvalue < 0.05
    assert ms.agreement(first, second, permutations=999, resamples=1).p_value > 0.05


def test_a_control_that_makes_the_agreement_leaves_none():
    common = random_matrix(20, 0)
    first, second = (matrix(common.values + 0.5 * random_matrix(20, seed).values) for seed in (1, 2))
    options = dict(permutations=199, resamples=199)
    assert ms.agreement(first, second, **options).correlation > 0.6
    controlled = ms.agreement(first, second, given=[common], **options)
    assert abs(controlled.correlation) < 0.2
    assert controlled.low < 0 < controlled.high


def test_partial_correlation_agrees_with_the_textbook_formula():
    first, second, control = (random_matrix(12, seed) for seed in range(3))
    ab, ac, bc = (
        spearmanr(ms.pairs(x), ms.pairs(y)).statistic
        for x, y in ((first, second), (first, control), (second, control))
    )
    expected = (ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2))
    found = ms.agreement(first, second, given=[control], permutations=1, resamples=1)
    assert found.correlation == pytest.approx(expected)


def test_rank_correlation_of_samples_is_spearmans_partial_where_given():
    one, other, control = np.random.default_rng(0).normal(size=(3, 50))
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert rank_correlation(one + 9 * control, other + 9 * control) > 0.9
    assert abs(rank_correlation(one + 9 * control, other + 9 * control, [control])) < 0.3
    assert np.isnan(rank_correlation(one, np.ones(50)))
    assert np.isnan(rank_correlation(one, other, [other]))


def test_matrix_that_does_not_vary_or_is_wholly_given_leaves_nothing_to_correlate():
    first, second = random_matrix(40, 0), random_matrix(40, 1)
    for one, given in ((matrix(np.ones((40, 40))), []), (first, [first]), (first, [second])):
        with pytest.raises(ValueError, match="nothing to correlate"):
            ms.agreement(one, second, given=given, permutations=9, resamples=9)


def test_interval_widens_with_its_level():
    first, second = random_matrix(12, 0), random_matrix(12, 1)
    wide, narrow = (ms.agreement(first, second, permutations=1, level=level) for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_seed_decides():
    first, second = random_matrix(8, 0), random_matrix(8, 1)
    one, same, other = (
        ms.agreement(first, second, permutations=99, resamples=99, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same
    assert one.low != other.low


def test_too_few_common_models_are_an_error():
    with pytest.raises(ValueError, match=r"four models or more .* got 0"):
        ms.agreement(random_matrix(5, 0, list("abcde")), random_matrix(5, 0, list("vwxyz")))


def test_a_missing_value_is_named():
    broken = random_matrix(5, 0, list("abcde"))
    broken.loc["b", "d"] = np.nan
    with pytest.raises(ValueError, match="value of b and d is NaN"):
        ms.agreement(random_matrix(5, 1, list("abcde")), broken)


def test_a_control_that_differs_with_the_order_of_two_models_is_refused():
    first, second, third = (random_matrix(5, seed, list("abcde")) for seed in range(3))
    third.loc["b", "d"] += 1
    with pytest.raises(ValueError, match="value of b and d differs with their order"):
        ms.agreement(first, second, given=[third])


def test_draws_in_which_a_matrix_does_not_vary_are_left_out():
    # Two of five models are of one kind: a third of the draws miss one of the two.
    kind = matrix(np.equal.outer([0, 0, 1, 2, 3], [0, 0, 1, 2, 3]))
    found = ms.agreement(kind, random_matrix(5, 0), permutations=9, resamples=99)
    assert -1 <= found.low <= found.high <= 1


RELATED = ["resnet50", "resnet50-seed1", "seresnet50", "convnext_tiny", "mixnet_xl", "gmlp_s16_224"]


def test_relations_follow_from_names():
    found = ms.relations(RELATED)
    assert found.sel(model="resnet50").values.tolist() == [
        "same architecture",
        "same architecture",
        "same base",
        "same base",
        "two bases",
        "two bases",
    ]
    assert (found.values == found.values.T).all()


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
    groups = dict(zip(names, [1, 2, 3, 4, 5, 5], strict=True))
    left.clear()
    ms.jackknife(lambda kept: left.append(len(kept)) or 0, names, groups=groups)
    assert left == [6, 5, 5, 5, 5, 4]
    with pytest.raises(ValueError, match=r"four groups .* got 3: \['a', 'b', 'c'\]"):
        ms.jackknife(len, ["a", "b", "b-seed1", "c"])
