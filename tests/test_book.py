import numpy as np
import pytest
import xarray as xr
from pages import page

import modelsim as ms

matrix_page = page("matrix")
mean_by_relation = matrix_page.mean_by_relation

RELATED = ["resnet50", "resnet50-seed1", "seresnet50", "convnext_tiny", "mixnet_xl", "gmlp_s16_224"]


def matrix(values, names):
    return xr.DataArray(np.asarray(values, float), {"model": names, "other": names}, ("model", "other"))


def random_matrix(n, seed, names):
    values = np.random.default_rng(seed).normal(size=(n, n))
    return matrix(values + values.T, names)


def test_pairs_count_as_often_as_a_draw_holds_their_architectures():
    names = ["resnet50", "resnet50-seed1", "dla102x2", "dpn107"]
    count = matrix_page.times_drawn(ms.pairs(ms.relations(names)).index, 500)
    drawn = count["resnet50", "resnet50-seed1"]  # of the three architectures
    assert set(drawn) == {0, 1, 2, 3}
    for seed in names[:2]:
        assert (count[seed, "dla102x2"] + count[seed, "dpn107"] == drawn * (3 - drawn)).all()
    assert (count.loc[0] == 1).all()


def test_means_by_relation_of_a_hand_made_matrix():
    values = np.arange(36.0).reshape(6, 6)
    found = mean_by_relation(matrix(values + values.T, RELATED), resamples=50)
    # upper triangle: i < j holds 7 i + 7 j
    total = {(i, j): 7.0 * (i + j) for i in range(6) for j in range(i + 1, 6)}
    near = [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    far = [pair for pair in total if pair not in [(0, 1), *near]]
    expected = [np.mean([total[pair] for pair in pairs]) for pairs in ([(0, 1)], near, far)]
    assert found["mean"].tolist() == pytest.approx(expected)
    assert found.pairs.tolist() == [1, 5, 9]
    assert found.step.tolist()[:2] == pytest.approx([expected[0] - expected[1], expected[1] - expected[2]])
    assert np.isnan(found.step.iloc[-1])


def test_mean_of_one_value_has_no_width_and_relations_that_do_not_occur_no_row():
    found = mean_by_relation(matrix(np.full((4, 4), 2.5), ["resnet50", "resnet101", "dla102x2", "dpn107"]))
    assert found.index.tolist() == ["same base"]
    assert found.loc["same base", ["mean", "low", "high"]].tolist() == [2.5] * 3


def test_interval_of_means_widens_with_effects_of_single_architectures():
    names = list(ms.CATALOGUE)[:40]
    random = np.random.default_rng(0)
    effect = random.normal(size=40)
    noise = random.normal(size=(40, 40))
    pair_noise = matrix(noise + noise.T, names)
    of_models = matrix(effect[:, None] + effect, names)  # the same variance, shared by pairs of a model
    widths = [
        (lambda row: row.high - row.low)(mean_by_relation(m).loc["same base"])
        for m in (pair_noise, of_models)
    ]
    assert widths[1] > 2 * widths[0]


def test_planted_order_of_relations_is_found_and_its_absence_too():
    names = [*list(ms.CATALOGUE)[::3], "resnet50-seed1", "resnet101-seed1", "resnet101-seed2"]
    planted = (ms.relations(names) == "same architecture") * 2.0 + (ms.relations(names) == "same base") * 1.0
    noise = random_matrix(len(names), 1, names)
    found = mean_by_relation(planted + 0.1 * noise)
    assert (found.step_low.iloc[:2] > 0).all()


def test_step_between_bases_is_seldom_taken_for_real_in_noise():
    names = list(ms.CATALOGUE)[::2]
    steps = [
        mean_by_relation(random_matrix(len(names), seed, names), resamples=300).loc["same base"]
        for seed in range(40)
    ]
    wrong = sum(step.step_low > 0 or step.step_high < 0 for step in steps)
    assert wrong <= 6  # 2 expected; more than 6 with a chance of 1 %


def test_model_outside_the_catalogue_has_no_relation():
    with pytest.raises(ValueError, match="unknown architecture 'resnet5'"):
        mean_by_relation(matrix(np.ones((4, 4)), ["resnet5", "resnet50", "dla102x2", "dpn107"]))
