from functools import partial

import numpy as np
import pandas as pd
import pytest
from pages import page
from scipy.stats import kruskal
from test_main_effects import directed, symmetric

import modelsim as ms

matrix = page("matrix")
NAMES = [f"m{i}" for i in range(12)]
BASES = {name: "CNN" if i < 6 else "Transformer" for i, name in enumerate(NAMES)}


def noise(seed=0, n=12):
    values = np.random.default_rng(seed).normal(size=(n, n))
    return values + values.T


def both(values):
    return np.add.outer(*[np.asarray(values, float)] * 2)


def test_planted_shares_of_target_source_and_pair_are_found():
    random = np.random.default_rng(0)
    fragility, strength = 2 * random.normal(size=12), random.normal(size=(12, 1))
    found = matrix.shares(directed(fragility + strength), NAMES)
    assert found["target and source"] > 0.999
    assert found["target"] > found["source"] > 0.05
    assert found["target"] + found["source"] == pytest.approx(1, abs=0.02)
    assert matrix.shares(directed(random.normal(size=(12, 12))), NAMES)["left for the pair"] > 0.7


def test_shares_of_the_study_are_those_of_least_squares_and_their_interval_that_of_pseudovalues():
    study = ms.open_study(ms.data_directory() / "fashion69").isel(source=slice(20), target=slice(20))
    rate, names = ms.transferability(study), study.source.values.tolist()

    def by_regression(names):
        part, off = rate.sel(source=names, target=names), ~np.eye(len(names), dtype=bool)
        value = np.log((part.hits + 0.5) / (part.trials - part.hits + 0.5)).values[off]
        source, target = (np.eye(len(names))[end] for end in np.nonzero(off))
        designs = {"target": target, "source": source, "target and source": np.hstack([source, target])}
        rests = {key: value - x @ np.linalg.lstsq(x, value, rcond=None)[0] for key, x in designs.items()}
        return pd.Series({key: 1 - rest.var() / value.var() for key, rest in rests.items()})

    found, whole = matrix.jackknife(partial(matrix.shares, rate), names), by_regression(names)
    assert found.value[whole.index].to_list() == pytest.approx(whole.to_list(), abs=1e-3)
    pseudo = pd.DataFrame([20 * whole - 19 * by_regression(names[:i] + names[i + 1 :]) for i in range(20)])
    half = 2.093 * (pseudo.var() / 20) ** 0.5  # t with 19 degrees of freedom
    assert (found.high - found.value)[whole.index].to_list() == pytest.approx(half.to_list(), rel=0.03)


def test_interval_widens_with_effects_of_single_architectures_and_is_none_without_variance():
    names, effect = [f"m{i}" for i in range(30)], np.random.default_rng(0).normal(size=30)

    def width(score):
        def mean(some):
            return pd.Series({"mean": ms.pairs(score.sel(model=some, other=some)).mean()})

        found = matrix.jackknife(mean, names)
        return (found.high - found.low).item()

    assert width(symmetric(both(effect))) > 2 * width(symmetric(noise(1, 30))) > 0
    assert width(symmetric(np.full((30, 30), 2.5))) == pytest.approx(0)


def test_planted_similarity_within_bases_is_found_and_single_models_and_noise_are_not_taken_for_it():
    same, free = np.equal.outer(*[list(BASES.values())] * 2), pd.Series(5, ["CNN", "Transformer"])
    planted = symmetric(0.2 * noise() + same)
    assert (
        matrix.jackknife(partial(matrix.by_base, partial(matrix.chosen, planted), BASES), NAMES, free).low > 0
    ).all()
    fragile = symmetric(0.2 * noise() + both([1] * 6 + [-1] * 6))  # one base is fooled by all
    found = matrix.by_base(partial(matrix.chosen, fragile), BASES, NAMES)
    assert found["Transformer"] < -0.5 < 0.5 < found["CNN"]
    assert matrix.by_base(partial(matrix.relative_anew, fragile), BASES, NAMES).abs().max() < 0.3
    scores = (partial(matrix.chosen, symmetric(noise(seed))) for seed in range(60))
    tests = (partial(matrix.by_base, score, BASES) for score in scores)
    rows = [matrix.jackknife(test, NAMES, free).loc["CNN"] for test in tests]
    assert sum(row.low > 0 or row.high < 0 for row in rows) <= 8  # 3 expected; more with a chance of 0.4 %


def test_degrees_of_freedom_are_those_of_their_base_in_any_order_and_effects_are_fitted_anew():
    score, free = symmetric(noise()), pd.Series({"CNN": 5, "Transformer": 1})
    statistic = partial(matrix.by_base, partial(matrix.relative_anew, score), BASES)
    found = [matrix.jackknife(statistic, NAMES, some) for some in (free, free[::-1])]
    pd.testing.assert_frame_equal(*found)
    usual = matrix.jackknife(statistic, NAMES)  # eleven degrees of freedom
    wider = (found[0].high - found[0].value) / (usual.high - usual.value)
    assert wider.to_dict() == pytest.approx(
        {"CNN": 2.5706 / 2.2010, "Transformer": 12.7062 / 2.2010}, rel=1e-4
    )
    rows = np.nansum(matrix.relative_anew(score, NAMES[:8]), axis=1)  # nothing of one model alone is left
    np.testing.assert_allclose(rows, 0, atol=1e-9)


def test_hand_made_means_of_bases_and_seeds():
    score_of = partial(matrix.chosen, symmetric(both(range(4))))
    found = matrix.by_base(score_of, dict(zip(NAMES, "CCNN", strict=False)), NAMES[:4])
    assert found.to_dict() == {"C": 1 - 3, "N": 5 - 3}
    score = symmetric(np.array([[9, 1, 2, 7], [1, 9, 4, 3], [2, 4, 9, 6], [7, 3, 6, 9]], float))
    score = score.assign_coords({end: ["a", "b", "c", "a-seed1"] for end in score.dims})
    found = matrix.matched(score, {"a": "C", "b": "C", "c": "N"}, "a")
    assert found.to_dict() == {"its other seed": 7, "its base": 2, "other bases": 4}
    assert [matrix.rank(score, *ends) for ends in (("a", "a-seed1"), ("a-seed1", "b"))] == [1, 3]


def test_variance_explained_by_the_number_of_members_is_on_ranks_the_statistic_of_kruskal_and_wallis():
    has = pd.Series([i % 3 == 0 for i in range(12)], NAMES)
    assert matrix.explained_by_number(symmetric(both(has) ** 2), has, NAMES).item() == pytest.approx(1)
    order = ms.pairs(symmetric(noise() + both(has))).rank()
    ranks = np.zeros((12, 12))
    ranks[np.triu_indices(12, 1)] = order
    kinds = [order[matrix.total(order.index, has) == number] for number in range(3)]
    found = matrix.explained_by_number(symmetric(ranks + ranks.T), has, NAMES).item()
    assert found == pytest.approx(kruskal(*kinds).statistic / (len(order) - 1))


@pytest.mark.parametrize("effect", [0.0, 1.5])
def test_control_for_accuracy_leaves_what_accuracy_does_not_make(effect):
    names = [f"m{i}" for i in range(80)]
    has = pd.Series(np.arange(80) < 40, names)
    accuracy = pd.Series(np.random.default_rng(0).normal(size=80), names) + has
    fragility = 2 * accuracy + effect * has
    raw, fair = (matrix.gap(fragility, accuracy, has, within, names).item() for within in (99, 0.05))
    assert raw > effect + 1
    assert fair == pytest.approx(effect, abs=0.05)
    alone, added = matrix.beyond_accuracy(symmetric(both(fragility)), has, accuracy, names)
    assert (added > 0.01) == (effect > 0)
    assert alone + added == pytest.approx(1)


def test_noise_of_planted_seeds_is_found():
    names = [f"m{i}" for i in range(40)]
    first, again = (noise(0, 40) + 0.3 * noise(seed, 40) / 2**0.5 for seed in (1, 2))
    score = symmetric(np.block([[first, again], [again, again]]))
    score = score.assign_coords({end: names + [f"{name}-seed1" for name in names] for end in score.dims})
    found = matrix.noise(score, symmetric(np.full((40, 40), 0.392)), names)
    assert found.to_list() == pytest.approx([0.3, 0.1, 3], rel=0.1)
