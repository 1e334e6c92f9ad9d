import math
import re
from fractions import Fraction
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, mode, rankdata, spearmanr
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import VotingClassifier
from sklearn.preprocessing import LabelEncoder

import modelsim as ms
from modelsim.ensembles import (
    choose_teammates,
    count_clusters,
    ensembles,
    member_sets,
    set_correlation,
    set_means,
    split_halves,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def study_of(probability, label, names=None):
    """Lay out probabilities (model, image, class) as a study does; every fifth image is attacked."""
    probability, label = np.asarray(probability, dtype=float), np.asarray(label, dtype=np.int16)
    names = [f"m{i}" for i in range(len(probability))] if names is None else names
    ids = np.array([f"image {i:04d}" for i in range(len(label))])
    shape = (len(names), len(names), len(label[::5]))
    return xr.Dataset(
        {
            "clean_probability": (("target", "test_image", "class"), probability),
            "label": ("image", label[::5]),
            "clean_prediction": (("target", "image"), np.tile(label[::5], (len(names), 1))),
            "adversarial_prediction": (("source", "target", "image"), np.zeros(shape, dtype=np.int16)),
        },
        {
            "source": names,
            "target": names,
            "image": ids[::5],
            "test_image": ids,
            "test_label": ("test_image", label),
            "class": [f"class {i}" for i in range(probability.shape[2])],
        },
    )


def alike(names, values=None):
    """A similarity: `values` by condensed pair, or some that all differ."""
    names = list(getattr(names, "values", names))
    matrix, upper = np.zeros((len(names), len(names))), np.triu_indices(len(names), 1)
    matrix[upper] = np.arange(len(upper[0])) / 10 if values is None else values
    return xr.DataArray(matrix + matrix.T, {"model": names, "other": names}, ("model", "other"))


def one_hot(predictions, n_classes):
    return np.eye(n_classes)[np.asarray(predictions, dtype=int)]


def random_study(models=5, images=60, classes=4, seed=0):
    random = np.random.default_rng(seed)
    steps = random.multinomial(10_000, random.dirichlet(np.ones(classes), size=(models, images)))
    return study_of(steps / 10_000, random.integers(classes, size=images))


@st.composite
def voting(draw):
    """Three to five models, few images, and so few different probabilities that ties abound."""
    models, classes = draw(st.integers(3, 5)), draw(st.integers(2, 4))
    parts = st.lists(st.integers(0, 4), min_size=classes, max_size=classes).filter(any)
    rows = draw(st.lists(st.lists(parts, min_size=6, max_size=6), min_size=models, max_size=models))
    weights = np.array(rows, dtype=float)
    probability = weights / weights.sum(axis=2, keepdims=True)
    label = draw(st.lists(st.integers(0, classes - 1), min_size=6, max_size=6))
    return study_of(np.round(probability, 4), label)


def exact_vote(members, vote):
    """Class that some members (model, class) elect on one image, in whole numbers and without shortcuts."""
    n_classes = len(members[0])
    if vote == "hard":
        ballots = [max(range(n_classes), key=lambda c: m[c]) for m in members]
        total = [ballots.count(c) for c in range(n_classes)]
    elif vote == "soft":
        total = [sum(m[c] for m in members) for c in range(n_classes)]
    else:
        total = [math.prod(max(Fraction(m[c]), Fraction(1, 2)) for m in members) for c in range(n_classes)]
    return total.index(max(total))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vote", ["soft", "hard", "logit"])
@pytest.mark.parametrize("size", [2, 3])
@given(study=voting())
def test_table_is_that_of_a_plain_slow_computation(study, vote, size, device):
    similarity, label = alike(study.target), study.test_label.values
    steps = np.rint(study.clean_probability.values * 10_000).astype(int).tolist()
    table = ensembles(study, member_sets(study.target.values, size), similarity, vote=vote, device=device)
    assert table.index.tolist() == list(combinations(study.target.values, size))
    for row, members in zip(table.itertuples(), combinations(range(len(steps)), size), strict=True):
        elected = [exact_vote([steps[m][i] for m in members], vote) for i in range(6)]
        alone = [np.array([exact_vote([steps[m][i]], "soft") for i in range(6)]) != label for m in members]
        error, errors = np.mean(elected != label), [wrong.mean() for wrong in alone]
        pairs = [float(similarity[a, b]) for a, b in combinations(members, 2)]
        expected = [1 - error, 1 - np.mean(errors), 1 - min(errors)]
        expected += [
            1 - error / reference if reference else np.nan for reference in (np.mean(errors), min(errors))
        ]
        expected += [np.all(alone, axis=0).mean(), np.mean(pairs), max(pairs)]
        np.testing.assert_allclose(list(row)[1:], expected, atol=1e-12)


@pytest.mark.parametrize("vote", ["soft", "hard", "logit"])
def test_whole_tables_agree_with_numpy_on_a_zoo_of_some_size(vote):
    study = random_study(models=8, images=500, classes=6)
    steps = np.rint(study.clean_probability.values * 10_000).astype(int)
    sets = member_sets(study.target.values, 4, most=40, seed=1)
    table = ensembles(study, sets, alike(study.target), vote=vote)
    names = list(study.target.values)
    score = {"soft": steps, "hard": one_hot(steps.argmax(2), 6), "logit": np.log(np.maximum(steps, 0.5))}[
        vote
    ]
    for members, accuracy in table.accuracy.items():
        elected = score[[names.index(m) for m in members]].sum(axis=0).argmax(axis=1)
        assert accuracy == pytest.approx((elected == study.test_label.values).mean())


class Stored(ClassifierMixin, BaseEstimator):
    """A fitted estimator whose probabilities, of images named by number, are known."""

    def __init__(self, probability):
        self.probability = probability
        self.classes_ = np.arange(probability.shape[1])

    def predict_proba(self, images):
        return self.probability[images[:, 0]]

    def predict(self, images):
        return self.predict_proba(images).argmax(axis=1)

    def fit(self, images, labels):
        return self


@pytest.mark.parametrize("vote", ["soft", "hard"])
def test_votes_are_those_of_scikit_learn(vote):
    # Sixteenths: whole steps, and exact in binary too, so that ties are ties for both.
    random = np.random.default_rng(3)
    probability = random.multinomial(16, [0.4, 0.2, 0.2, 0.2], size=(6, 300)) / 16
    study = study_of(probability, random.integers(4, size=300))
    table = ensembles(study, member_sets(study.target.values, 4), alike(study.target), vote=vote)
    images = np.arange(300)[:, None]
    for members, accuracy in table.accuracy.items():
        voters = [(name, Stored(probability[int(name[1:])])) for name in members]
        peer = VotingClassifier(voters, voting=vote)
        peer.estimators_ = [voter for _, voter in voters]
        peer.le_ = LabelEncoder().fit(np.arange(4))
        peer.classes_ = np.arange(4)
        assert accuracy == np.mean(peer.predict(images) == study.test_label.values)


def test_hard_vote_is_scipys_mode():
    study = random_study(models=5, classes=3)
    predicted = study.clean_probability.values.argmax(axis=2)
    table = ensembles(study, member_sets(study.target.values, 5), alike(study.target), vote="hard")
    assert table.accuracy.item() == np.mean(mode(predicted).mode == study.test_label.values)


def test_one_image_by_hand():
    # Mean 0.45, 0.4, 0.15: soft elects the first. Geometric means 0.28, 0.4: logit elects the second.
    probability = [[[0.8, 0.2, 0.0]], [[0.1, 0.6, 0.3]], [[0.45, 0.4, 0.15]]]
    study = study_of(probability, [0])
    pairs = [("m0", "m1"), ("m1", "m0")]
    accuracy = {
        v: ensembles(study, pairs, alike(study.target), vote=v).accuracy for v in ("soft", "logit", "hard")
    }
    assert accuracy["soft"].tolist() == [1, 1]
    assert accuracy["logit"].tolist() == [0, 0]
    assert accuracy["hard"].tolist() == [1, 1]  # a tie goes to the class that comes first


@pytest.mark.parametrize("vote", ["soft", "hard", "logit"])
def test_identical_members_reduce_nothing(vote):
    one = random_study(models=1).clean_probability.values
    study = study_of(np.repeat(one, 4, axis=0), random_study(models=1).test_label)
    for size in (2, 3, 4):
        table = ensembles(study, member_sets(study.target.values, size), alike(study.target), vote=vote)
        assert (table.reduction == 0).all()
        assert (table.reduction_of_best == 0).all()
        np.testing.assert_allclose(table.all_wrong, 1 - table.accuracy)


def test_independent_errors_give_the_binomial_prediction():
    images, p, random = 20_000, 0.7, np.random.default_rng(0)
    study = study_of(one_hot(random.random((5, images)) > p, 2), np.zeros(images))
    for size in (3, 5):
        expected = binom.sf(size // 2, size, p)
        table = ensembles(study, member_sets(study.target.values, size), alike(study.target), vote="hard")
        np.testing.assert_allclose(
            table.accuracy, expected, atol=4 * np.sqrt(expected * (1 - expected) / images)
        )
        np.testing.assert_allclose(
            table.all_wrong, (1 - p) ** size, atol=4 * np.sqrt((1 - p) ** size / images)
        )


def test_members_without_errors_have_none_to_reduce():
    study = study_of(one_hot([[0, 1], [0, 1], [0, 0]], 2), [0, 1])
    table = ensembles(study, [("m0", "m1"), ("m0", "m2")], alike(study.target))
    assert np.isnan(table.reduction.iloc[0])
    assert np.isnan(table.reduction_of_best).all()
    # On the second image m0 and m2 disagree, and the class that comes first is the wrong one.
    assert table.accuracy.tolist() == [1.0, 0.5]
    assert table.reduction.iloc[1] == 1 - 0.5 / 0.25


@pytest.mark.parametrize("vote", ["soft", "hard", "logit"])
def test_models_that_are_always_right_make_ensembles_that_are(vote):
    study = study_of(one_hot([[0, 1, 2]] * 3, 3), [0, 1, 2])
    table = ensembles(study, member_sets(study.target.values, 2), alike(study.target), vote=vote)
    assert (table.accuracy == 1).all()
    assert (table.all_wrong == 0).all()


def test_batches_change_nothing_and_threads_stay():
    threads = torch.get_num_threads()
    study = random_study(models=9, images=300)
    sets = member_sets(study.target.values, 4)
    tables = [ensembles(study, sets, alike(study.target), batch_size=size) for size in (1, 7, 126, 10_000)]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)
    assert torch.get_num_threads() == threads


def test_members_in_another_order_are_the_same_ensemble():
    study = random_study()
    rows = ensembles(study, [("m0", "m3", "m4"), ("m4", "m0", "m3")], alike(study.target), vote="logit")
    assert rows.index.tolist() == [("m0", "m3", "m4"), ("m4", "m0", "m3")]
    assert (rows.iloc[0] == rows.iloc[1]).all()


def test_models_outside_the_sets_do_not_count():
    study = random_study()
    study.clean_probability[4] = np.nan
    few = ensembles(study, [("m0", "m3")], alike(study.target))
    same = ensembles(study.isel(target=[3, 0]), [("m0", "m3")], alike(study.target))
    pd.testing.assert_frame_equal(few, same)


@given(st.integers(2, 8), st.data())
def test_sets_are_those_of_itertools(n, data):
    size = data.draw(st.integers(2, n))
    names = [f"m{i}" for i in reversed(range(n))]
    assert member_sets(names, size).tolist() == list(combinations(names, size))


def test_drawn_sets_differ_and_follow_the_seed():
    names = [f"m{i:02d}" for i in range(69)]
    drawn = member_sets(names, 4, most=20_000)
    assert len(drawn) == drawn.nunique() == 20_000
    assert drawn.is_monotonic_increasing
    assert all(drawn.codes[i].max() <= 65 + i and (np.diff(drawn.codes, axis=0) > 0).all() for i in range(4))
    counts = np.bincount(np.concatenate(drawn.codes), minlength=69)
    expected = 4 * 20_000 / 69
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert drawn.equals(member_sets(names, 4, most=20_000, seed=0))
    assert not drawn.equals(member_sets(names, 4, most=20_000, seed=1))


def planted(diversity_helps, models=12, images=3000):
    """Models that are wrong, and then less sure, on 18 % of the images each; and similarities of their pairs.

    Where diversity helps, each has half of its errors in common with its group of three or four, and
    similarity is how much two err together. Where it doesn't, errors are independent.
    """
    random = np.random.default_rng(0)
    errs = np.zeros((models, images), dtype=bool)
    for group in range(4 if diversity_helps else 0):
        hard = random.choice(images, int(0.09 * images), replace=False)
        errs[np.ix_(np.arange(models) % 4 == group, hard)] = True
    for row in errs:
        more = int(0.18 * images) - row.sum()
        row[random.choice(np.flatnonzero(~row), more, replace=False)] = True
    right, wrong = random.uniform(0.5, 1, size=errs.shape), random.uniform(0.3, 0.49, size=errs.shape)
    of_true = np.where(errs, wrong, right).round(4)
    study = study_of(np.stack([of_true, 1 - of_true], axis=2), np.zeros(images))
    pairs = np.triu_indices(models, 1)
    values = np.corrcoef(errs)[pairs] if diversity_helps else random.random(len(pairs[0]))
    return study, alike(study.target, values)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("vote", ["soft", "logit"])
def test_where_diversity_helps_the_correlation_is_negative(size, vote):
    study, similarity = planted(diversity_helps=True)
    table = ensembles(study, member_sets(study.target.values, size), similarity, vote=vote)
    assert table.mean_accuracy.nunique() == 1
    assert set_correlation(table).high < -0.1
    clusters = {name: i % 4 for i, name in enumerate(study.target.values)}
    table["clusters"] = count_clusters(table.index, clusters)
    assert set_correlation(table, by="clusters").low > 0.1
    means = set_means(table, "reduction", table.clusters)["mean"]
    assert means.is_monotonic_increasing


@pytest.mark.parametrize("size", [2, 3, 4])
def test_where_it_does_not_the_interval_holds_0(size):
    study, similarity = planted(diversity_helps=False)
    table = ensembles(study, member_sets(study.target.values, size), similarity)
    found = set_correlation(table)
    assert found.low < 0 < found.high


def simulated(random, n, size=3, slope=0.0):
    """A table whose outcome has effects of models and pairs, and depends on similarity by `slope`."""
    names = [f"m{i}" for i in range(n)]
    sets = member_sets(names, size)
    members = np.column_stack(sets.codes)
    pairs = [random.normal(size=(n, n)) for _ in range(2)]
    single = random.normal(size=(2, n))
    x, y = (
        single[k][members].mean(axis=1) + sum((p + p.T)[a, b] for a, b in combinations(members.T, 2)) / 6
        for k, p in enumerate(pairs)
    )
    return pd.DataFrame({"mean_similarity": x, "reduction": slope * x + y}, sets)


def test_intervals_cover_0_about_as_often_as_they_claim():
    random = np.random.default_rng(0)
    found = [set_correlation(simulated(random, 14), level=0.9) for _ in range(150)]
    cover = np.mean([low < 0 < high for _, low, high in found])
    assert 0.82 < cover < 0.97


def test_interval_is_the_jackknife_over_models():
    table = simulated(np.random.default_rng(1), 8, slope=1.0)
    found = set_correlation(table, level=0.8)

    def z(rows):
        return np.arctanh(spearmanr(rows.reduction, rows.mean_similarity).statistic)

    each = [
        z(table[[name not in members for members in table.index]])
        for name in table.index.levels[0].union(table.index.levels[2])
    ]
    assert len(each) == 8
    error = np.sqrt(7 / 8 * np.sum((each - np.mean(each)) ** 2))
    expected = np.tanh([z(table), z(table) - 1.41492 * error, z(table) + 1.41492 * error])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_seeds_of_one_architecture_are_left_out_together():
    table = simulated(np.random.default_rng(2), 8, size=2, slope=1.0)
    names = ["a", "a-seed1", "b", "b-seed1", "c", "c-seed1", "d", "d-seed1"]
    table.index = member_sets(names, 2)
    found = set_correlation(table, level=0.8)
    each = []
    for letter in "abcd":
        rows = table[[not any(m.startswith(letter) for m in members) for members in table.index]]
        each.append(np.arctanh(spearmanr(rows.reduction, rows.mean_similarity).statistic))
    error = np.sqrt(3 / 4 * np.sum((each - np.mean(each)) ** 2))
    assert np.arctanh(found.high) - np.arctanh(found.correlation) == pytest.approx(1.63774 * error, rel=1e-4)


def test_partial_correlation_is_that_of_residual_ranks():
    random = np.random.default_rng(4)
    table = simulated(random, 9, slope=0.5).round(1)  # rounded, for ties
    table["mean_accuracy"] = (table.reduction + random.normal(size=len(table))).round(1)
    table["best_accuracy"] = (table.mean_similarity + random.normal(size=len(table))).round(1)
    found = set_correlation(table, given=["mean_accuracy", "best_accuracy"]).correlation
    ranks = {column: rankdata(table[column]) for column in table}
    design = np.column_stack([np.ones(len(table)), ranks["mean_accuracy"], ranks["best_accuracy"]])
    rest = [
        ranks[c] - design @ np.linalg.lstsq(design, ranks[c], rcond=None)[0]
        for c in ("reduction", "mean_similarity")
    ]
    assert found == pytest.approx(np.corrcoef(rest)[0, 1], abs=1e-9)


def test_control_that_explains_both_leaves_nothing():
    random = np.random.default_rng(5)
    table = simulated(random, 16)
    cause = table.mean_similarity.copy()
    table["mean_similarity"] = cause + random.normal(scale=0.05, size=len(table))
    table["reduction"] = -cause + random.normal(scale=0.05, size=len(table))
    table["mean_accuracy"] = cause
    assert set_correlation(table).high < -0.9
    assert abs(set_correlation(table, given=["mean_accuracy"]).correlation) < 0.2


def test_perfect_correlation_has_no_width():
    table = simulated(np.random.default_rng(6), 6)
    table["reduction"] = -table.mean_similarity
    np.testing.assert_allclose(set_correlation(table), -1)


def test_means_of_groups_and_their_intervals():
    table = simulated(np.random.default_rng(7), 9)
    clusters = {f"m{i}": i % 3 for i in range(9)}
    number = count_clusters(table.index, clusters)
    assert number.tolist() == [len({clusters[m] for m in members}) for members in table.index]
    means = set_means(table, "reduction", number)
    assert means.index.tolist() == [1, 2, 3]
    assert means.sets.tolist() == [3, 54, 27]
    np.testing.assert_allclose(means["mean"], table.reduction.groupby(number).mean())
    left = [table[[f"m{i}" not in members for members in table.index]] for i in range(9)]
    each = np.array([rows.reduction.groupby(number).mean() for rows in left])
    half = 2.306004 * np.sqrt(8 / 9 * ((each - each.mean(axis=0)) ** 2).sum(axis=0))
    np.testing.assert_allclose(means.high - means["mean"], half, rtol=1e-6)
    np.testing.assert_allclose(means["mean"] - means.low, half, rtol=1e-6)


def test_group_that_hangs_on_one_architecture_has_no_interval():
    table = simulated(np.random.default_rng(8), 6, size=2)
    with_m0 = pd.Series(["m0" in members for members in table.index], table.index)
    means = set_means(table, "reduction", with_m0)
    assert np.isnan(means.loc[True, ["low", "high"]].astype(float)).all()
    assert means.loc[False, "low"] < means.loc[False, "mean"] < means.loc[False, "high"]


def test_halves_share_nothing_and_keep_the_classes():
    study = random_study(images=101, classes=3)
    first, second = split_halves(study, seed=2)
    together = np.concatenate([first.test_image, second.test_image])
    assert sorted(together) == sorted(study.test_image.values)
    counts = [np.bincount(half.test_label, minlength=3) for half in (first, second)]
    assert (abs(counts[0] - counts[1]) <= 1).all()
    for half in (first, second):
        assert set(half.image.values) == set(study.image.values) & set(half.test_image.values)
    assert first.identical(split_halves(study, seed=2)[0])
    assert not first.identical(split_halves(study, seed=3)[0])


def test_attacked_images_from_elsewhere_are_in_both_halves():
    study = random_study()
    study = study.assign_coords(image=[f"elsewhere {i}" for i in range(study.sizes["image"])])
    assert all(half.sizes["image"] == study.sizes["image"] for half in split_halves(study))


# Right (1) or wrong (0) on ten images: m1 is like m0, m2 is right, and sure, where they are wrong.
RIGHT = [
    [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
    [0, 1, 1, 1, 0, 1, 0, 1, 1, 1],
    [1, 0, 0, 1, 0, 0, 1, 0, 1, 0],
]


@pytest.fixture
def team_study():
    sure, unsure = np.array([[[0.6], [0.6], [0.9], [0.6]], [[0.4], [0.4], [0.45], [0.4]]])
    of_true = np.where(RIGHT, sure, unsure)
    return study_of(np.stack([of_true, 1 - of_true], axis=2), np.zeros(10))


SIMILARITY = [0.9, 0.5, 0.1, 0.4, 0.2, 0.3]  # 01 02 03 12 13 23


@pytest.mark.parametrize(
    ("rule", "first", "expected"),
    [
        ("accuracy", None, ("m1", "m0", "m2")),  # m0 and m2 are equally good: the first one first
        ("diversity", None, ("m1", "m3", "m2", "m0")),
        ("diversity", "m0", ("m0", "m3", "m2")),
        ("both", None, ("m1", "m2")),
        ("accuracy", "m3", ("m3", "m1", "m0", "m2")),
    ],
)
def test_rules_choose_as_they_say(team_study, rule, first, expected):
    similarity = alike(team_study.target, SIMILARITY)
    team = choose_teammates(team_study, len(expected), similarity, rule=rule, first=first)
    assert team == expected


def test_greedy_choice_is_the_best_next_member_each_time():
    study = random_study(models=7, images=200)
    similarity = alike(study.target)
    team = choose_teammates(study, 4, similarity, first="m2", rule="both", vote="logit")
    for chosen in (1, 2, 3):
        candidates = [n for n in study.target.values if n not in team[:chosen]]
        sets = [(*team[:chosen], name) for name in candidates]
        accuracy = ensembles(study, sets, similarity, vote="logit").accuracy
        assert team[chosen] == candidates[int(np.argmax(accuracy))]


def test_budget_is_kept_and_spent_so_that_the_team_is_complete(team_study):
    similarity, cost = alike(team_study.target, SIMILARITY), {"m0": 3.0, "m1": 8.0, "m2": 4.0, "m3": 1.0}
    choose = dict(rule="accuracy", cost=cost)
    assert choose_teammates(team_study, 2, similarity, budget=11, **choose) == ("m1", "m0")
    assert choose_teammates(team_study, 2, similarity, budget=10, **choose) == ("m1", "m3")
    # m1 alone could be paid for, but not with two others.
    assert choose_teammates(team_study, 3, similarity, budget=11, **choose) == ("m0", "m2", "m3")
    assert choose_teammates(team_study, 3, similarity, budget=12, first="m3", **choose) == ("m3", "m1", "m0")
    with pytest.raises(ValueError, match=r"budget of 7 is too small: the cheapest such ensemble costs 8"):
        choose_teammates(team_study, 3, similarity, budget=7, **choose)
    with pytest.raises(ValueError, match=r"budget of 8 is too small: the cheapest such ensemble costs 9"):
        choose_teammates(team_study, 2, similarity, budget=8, first="m1", **choose)


def test_no_choice_costs_more_than_the_budget():
    study, random = random_study(models=8), np.random.default_rng(0)
    for seed in range(10):
        cost = pd.Series(random.integers(1, 20, size=8), study.target.values)
        budget = float(cost.nsmallest(3).sum() + seed)
        team = choose_teammates(study, 3, alike(study.target), budget=budget, cost=cost)
        assert len(set(team)) == 3
        assert cost[list(team)].sum() <= budget


def merged(**changed):
    """Two studies of different images or classes, put together as xarray does."""
    study = random_study(models=2, images=10, classes=3)
    other = study.assign_coords(target=["m2", "m3"], **changed).drop_vars(["label", "image", "source"])
    both = [s.clean_probability.reset_coords(drop=True) for s in (study, other)]
    joined = xr.concat(both, "target", join="outer").to_dataset()
    return joined.assign_coords(
        test_label=("test_image", np.zeros(joined.sizes["test_image"], dtype=np.int16))
    )


def with_probability(value):
    study = random_study(models=3, images=10, classes=3)
    study.clean_probability[1, 7] = value
    return study


PAIR = [("m0", "m1")]


@pytest.mark.parametrize(
    ("study", "sets", "culprit"),
    [
        (random_study().drop_vars("clean_probability"), PAIR, "python -m modelsim transfer"),
        (random_study(images=0), PAIR, "python -m modelsim transfer"),
        (random_study().isel(target=[0, 1, 1]), PAIR, "m1 stands more than once"),
        (
            merged(test_image=[f"other {i}" for i in range(10)]),
            [("m0", "m3")],
            "m0 has no probability of class class 0 for image other 0",
        ),
        (merged(**{"class": ["x", "y", "z"]}), [("m0", "m3")], "m0 has no probability of class x"),
        (
            with_probability([0.5, 0.4, 0.2]),
            PAIR,
            "add up to 1; those of m1 for image image 0007 are [0.5, 0.4, 0.2]",
        ),
        (with_probability([1.2, -0.2, 0.0]), PAIR, "[1.2, -0.2, 0.0]"),
        (with_probability(np.inf), PAIR, "those of m1"),
        (random_study(), [("m0", "m1", "m0")], "m0 is repeated in the set m0, m1, m0"),
        (random_study(), [("m0", "m1"), ("m0", "m7")], "unknown model 'm7': did you mean"),
        (random_study(), [("m0", "m1"), ("m0", "m1", "m2")], "got [2, 3]"),
        (random_study(), [("m0",)], "got [1]"),
        (random_study(), [], "got no set"),
    ],
)
def test_bad_input_is_refused_naming_the_culprit(study, sets, culprit):
    with pytest.raises(ValueError, match=re.escape(culprit)):
        ensembles(study, sets, alike(study.target.to_index().drop_duplicates()))


def test_rounding_of_probabilities_is_no_fault():
    study = with_probability([0.3334, 0.3334, 0.3333])
    assert len(ensembles(study, PAIR, alike(study.target))) == 1


@pytest.mark.parametrize(
    ("similarity", "culprit"),
    [
        (alike(["m0", "m2"]), "m1 has no similarity to others"),
        (alike(["m0", "m1"], [np.nan]), "m0 and m1 is NaN"),
    ],
)
def test_incomplete_similarity_is_refused(similarity, culprit):
    with pytest.raises(ValueError, match=culprit):
        ensembles(random_study(), PAIR, similarity)


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda s, m: member_sets(["a", "b"], 3), "size must be 2 … 2, the number of models; got 3"),
        (lambda s, m: member_sets(["a", "b"], 1), "got 1"),
        (lambda s, m: member_sets(["a", "b", "a"], 2), "a is named twice"),
        (lambda s, m: member_sets([f"m{i}" for i in range(93)], 40), "choose a smaller size"),
        (
            lambda s, m: ensembles(s, PAIR, m, vote="sotf"),
            "vote must be one of soft, hard, logit; got 'sotf'",
        ),
        (lambda s, m: choose_teammates(s, 2, m, rule="luck"), "rule must be one of"),
        (lambda s, m: choose_teammates(s, 6, m), "size must be 2 … 5"),
        (lambda s, m: choose_teammates(s, 2, m, first="m55"), "unknown model 'm55': did you mean 'm"),
        (lambda s, m: choose_teammates(s, 2, m, budget=3), "a budget needs costs"),
        (lambda s, m: choose_teammates(s, 2, m, budget=3, cost={"m0": 1}), "m1 has no cost"),
        (lambda s, m: choose_teammates(s.drop_vars("clean_probability"), 2, m), "holds no probabilities"),
        (lambda s, m: split_halves(s.drop_vars("clean_probability")), "holds no probabilities"),
        (lambda s, m: count_clusters(member_sets(["a", "b"], 2), {"a": 1}), "unknown model 'b'"),
    ],
)
def test_bad_call_is_refused_naming_the_culprit(call, culprit):
    study = random_study()
    with pytest.raises(ValueError, match=re.escape(culprit)):
        call(study, alike(study.target))


@pytest.mark.parametrize(
    ("changed", "options", "culprit"),
    [
        ({}, {"by": "mean_similarty"}, "unknown column 'mean_similarty': did you mean 'mean_similarity'"),
        ({"reduction": [np.nan, *range(9)]}, {}, "'reduction' of the set m0, m1 is NaN"),
        ({"reduction": 1.0}, {}, "'reduction' or 'mean_similarity' doesn't vary"),
        ({}, {"given": ["reduction"]}, "'reduction' or 'mean_similarity' doesn't vary"),
        ({}, {"level": 95}, "level must be between 0 and 1, got 95"),
    ],
)
def test_nothing_to_correlate_is_refused(changed, options, culprit):
    table = simulated(np.random.default_rng(0), 5, size=2).assign(**changed)
    with pytest.raises(ValueError, match=culprit):
        set_correlation(table, **options)


def test_interval_needs_sets_without_each_architecture():
    table = simulated(np.random.default_rng(0), 6, size=2)
    with pytest.raises(ValueError, match="none of them in all sets"):
        set_correlation(table[["m0" in members for members in table.index]])
    with pytest.raises(ValueError, match="needs four architectures"):
        set_correlation(table[[set(members) <= {"m0", "m1", "m2"} for members in table.index]])


def test_a_study_made_by_transfer_serves(tmp_path):
    import tiny

    images = tiny.image_set(30)
    study = tiny.transfer(tmp_path, test_images=images)
    table = ensembles(study, member_sets(study.target.values, 2), ms.sat(study))
    alone = (study.clean_probability.values.argmax(axis=2) == images.labels.numpy()).mean(axis=1)
    np.testing.assert_allclose(table.best_accuracy, [max(p) for p in combinations(alone, 2)])
    first, _ = split_halves(study)
    assert len(choose_teammates(first, 2, ms.sat(study))) == 2
