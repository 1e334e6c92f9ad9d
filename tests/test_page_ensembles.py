import math
import re
from fractions import Fraction
from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from pages import page
from scipy.stats import binom

import modelsim as ms
from modelsim import ensembles
from modelsim.agreement import rank_correlation

book = page("ensembles")
VOTES = ["soft", "hard", "logit"]


def study_of(probability, label):
    """Lay out probabilities (model, image, class) as a study does; every fifth image is attacked."""
    names = [f"m{i:02d}" for i in range(len(probability))]
    ids = np.array([f"image {i:04d}" for i in range(len(label))])
    coordinates = {"target": names, "image": ids[::5], "test_image": ids}
    coordinates["test_label"] = ("test_image", np.asarray(label))
    variables = {
        "clean_probability": (("target", "test_image", "class"), np.asarray(probability, dtype=float))
    }
    return xr.Dataset(variables, coordinates)


def random_study(models=5, images=60, classes=4):
    random = np.random.default_rng(0)
    steps = random.multinomial(10_000, random.dirichlet(np.ones(classes), size=(models, images)))
    return study_of(steps / 10_000, random.integers(classes, size=images))


@st.composite
def few_probabilities(draw):
    """Four models and six images, with so few different probabilities that ties abound."""
    classes = draw(st.integers(2, 4))
    parts = st.lists(st.integers(0, 4), min_size=classes, max_size=classes).filter(any)
    weights = np.array(draw(st.lists(parts, min_size=24, max_size=24)), dtype=float).reshape(4, 6, classes)
    label = draw(st.lists(st.integers(0, classes - 1), min_size=6, max_size=6))
    return study_of((weights / weights.sum(axis=2, keepdims=True)).round(4), label)


def elected(members, how):
    """Class that some members (model, class) elect on one image, in whole numbers and without shortcuts."""
    classes = range(len(members[0]))
    if how == "hard":
        ballots = [max(classes, key=lambda c: m[c]) for m in members]
        total = [ballots.count(c) for c in classes]
    elif how == "soft":
        total = [sum(m[c] for m in members) for c in classes]
    else:
        total = [math.prod(max(Fraction(m[c]), Fraction(1, 2)) for m in members) for c in classes]
    return total.index(max(total))


@pytest.mark.parametrize("how", VOTES)
@pytest.mark.parametrize("size", [2, 3])
@given(study=few_probabilities())
def test_vote_is_that_of_a_plain_slow_computation(study, how, size):
    steps = np.rint(study.clean_probability.values * 10_000).astype(int).tolist()
    found = ms.vote(study, ms.member_sets(study.target.values, size), how=how)
    assert found.index.tolist() == list(combinations(study.target.values, size))
    for share, members in zip(found, combinations(steps, size), strict=True):
        right = [elected([m[i] for m in members], how) == label for i, label in enumerate(study.test_label)]
        assert share == sum(right) / 6


@pytest.mark.parametrize("how", VOTES)
def test_identical_members_gain_nothing(how):
    one = random_study(models=1)
    study = study_of(np.repeat(one.clean_probability.values, 4, axis=0), one.test_label)
    alone = (one.clean_probability.values.argmax(axis=2) == one.test_label.values).mean()
    for size in (2, 3, 4):
        assert (ms.vote(study, ms.member_sets(study.target.values, size), how=how) == alone).all()


def test_independent_members_vote_as_the_binomial_formula_says():
    images, p = 20_000, 0.7
    right = np.random.default_rng(0).random((5, images)) < p
    study = study_of(np.stack([right, ~right], axis=2), np.zeros(images, dtype=int))
    for size in (3, 5):
        sets = ms.member_sets(study.target.values, size)
        _, alone, table = book.describe(study, sets, alike(study), colour_of(study))
        assert alone == pytest.approx(np.full(alone.shape, p), abs=0.02)
        voted, none = binom.sf(size // 2, size, p), (1 - p) ** size
        assert ms.vote(study, sets, how="hard").to_numpy() == pytest.approx(voted, abs=0.015)
        assert table["none right"].to_numpy() == pytest.approx(none, abs=4 * np.sqrt(none / images))


def test_neither_batches_nor_models_outside_the_sets_change_a_vote(monkeypatch):
    study, sets = random_study(), ms.member_sets(["m00", "m02", "m03", "m04"], 3)
    whole = ms.vote(study, sets)
    monkeypatch.setattr(ensembles, "_AT_ONCE", 3)
    study.clean_probability[1] = np.nan
    assert ms.vote(study.isel(target=[4, 1, 3, 2, 0]), sets).equals(whole)


@given(st.integers(2, 8), st.data())
def test_sets_are_those_of_itertools(n, data):
    size, names = data.draw(st.integers(2, n)), [f"m{i}" for i in reversed(range(n))]
    assert ms.member_sets(names, size).tolist() == list(combinations(names, size))


def test_drawn_sets_differ_and_follow_the_seed():
    names = [f"m{i:02d}" for i in range(69)]
    drawn, again, other = (ms.member_sets(names, 4, most=20_000, seed=seed) for seed in (0, 0, 1))
    assert len(drawn) == drawn.nunique() == 20_000
    assert all((np.diff(drawn.codes, axis=0) > 0).ravel())
    counts, expected = np.bincount(np.concatenate(drawn.codes), minlength=69), 4 * 20_000 / 69
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert drawn.equals(again)
    assert not drawn.equals(other)


def broken(value):
    study = random_study(models=3, images=10, classes=3)
    study.clean_probability[1, 7] = value
    return study


PAIR = [("m00", "m01")]


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: ms.vote(random_study().drop_vars("clean_probability"), PAIR), "holds no probabilities"),
        (lambda: ms.vote(random_study(images=0), PAIR), "holds no probabilities"),
        (
            lambda: ms.vote(broken([0.5, 0.4, 0.2]), PAIR),
            "those of m01 for image image 0007 are [0.5 0.4 0.2]",
        ),
        (lambda: ms.vote(broken([1.2, -0.2, 0.0]), PAIR), "those of m01 for image image 0007"),
        (lambda: ms.vote(broken(np.nan), PAIR), "those of m01 for image image 0007 are [nan nan nan]"),
        (
            lambda: ms.vote(random_study(), [("m00", "m01", "m00")]),
            "m00 is repeated in the set m00, m01, m00",
        ),
        (lambda: ms.vote(random_study(), [("m00", "m07")]), "unknown model 'm07': did you mean"),
        (lambda: ms.vote(random_study(), [*PAIR, ("m00", "m01", "m02")]), "all as many; got [2, 3]"),
        (lambda: ms.vote(random_study(), []), "got no set"),
        (lambda: ms.vote(random_study(), PAIR, how="sotf"), "one of soft, hard, logit; got 'sotf'"),
        (lambda: ms.member_sets(["a", "b"], 3), "size must be 2 … 2, the number of models; got 3"),
        (lambda: ms.member_sets(["a", "b", "a"], 2), "a is named twice"),
        (lambda: ms.member_sets([f"m{i}" for i in range(93)], 40), "choose a smaller size"),
    ],
)
def test_what_cannot_vote_is_refused_by_name(call, culprit):
    with pytest.raises(ValueError, match=re.escape(culprit)):
        call()
    assert len(ms.vote(broken([0.3334, 0.3334, 0.3333]), PAIR)) == 1  # rounding is no fault


def alike(study, values=None):
    """A similarity: `values` by pair, or some that all differ."""
    names = study.target.values
    matrix, upper = np.zeros((len(names), len(names))), np.triu_indices(len(names), 1)
    matrix[upper] = np.arange(len(upper[0])) if values is None else values
    return xr.DataArray(matrix + matrix.T, {"model": names, "other": names}, ("model", "other"))


def colour_of(study):
    return xr.zeros_like(study.target, dtype=int).copy(data=np.arange(study.sizes["target"]) % 4)


def planted(diversity, models=24, images=4000):
    """Sets of three. Either of equal accuracy, with errors shared in four groups, and similar as errors are;
    or of unequal accuracy with independent errors, and similar as they are accurate."""
    random = np.random.default_rng(1)
    share = np.full(models, 0.18) if diversity else np.linspace(0.1, 0.3, models)
    errs = np.zeros((models, images), dtype=bool)
    for group in range(4 if diversity else 0):
        hard = random.choice(images, int(0.09 * images), replace=False)
        errs[np.ix_(np.arange(models) % 4 == group, hard)] = True
    for row, wanted in zip(errs, share, strict=True):
        row[random.choice(np.flatnonzero(~row), int(wanted * images) - row.sum(), replace=False)] = True
    of_true = np.where(errs, random.uniform(0.3, 0.49, errs.shape), random.uniform(0.5, 1, errs.shape)).round(
        4
    )
    study = study_of(np.stack([of_true, 1 - of_true], axis=2), np.zeros(images, dtype=int))
    one, other = np.triu_indices(models, 1)
    by_accuracy = -share[one] - share[other] + random.normal(scale=0.03, size=len(one))
    return study, alike(study, np.corrcoef(errs)[one, other] if diversity else by_accuracy)


def test_planted_effect_of_diversity_is_found_with_accuracy_fixed():
    study, similarity = planted(diversity=True)
    names, sets = study.target.to_index(), ms.member_sets(study.target.values, 3)
    members, alone, table = book.describe(study, sets, similarity, colour_of(study))
    rest = book.controlled(members, alone + 1e-6 * np.random.default_rng(0).random(alone.shape), table, 24)
    for control in ("nothing", book.FORESTS, book.OWN):
        found = book.correlations(rest[control], members, names)
        assert found.high[0, 0] < -0.1, control  # similarity with accuracy
        assert found.low[1, 0] > 0.1, control  # clusters with accuracy
        assert found.low[0, 1] > 0.1, control  # similarity with images that nobody gets right
    assert (led(study, similarity).low[:2] > [60, 0.2]).all()


def test_effect_of_accuracy_alone_vanishes_under_matching():
    study, similarity = planted(diversity=False)
    names, sets = study.target.to_index(), ms.member_sets(study.target.values, 3)
    members, alone, table = book.describe(study, sets, similarity, colour_of(study))
    rest = book.controlled(members, alone, table, 24)
    assert book.correlations(rest["nothing"], members, names).low[0, 0] > 0.6
    matched = book.correlations(rest[book.FORESTS], members, names)
    assert matched.low[0, 0] < 0 < matched.high[0, 0]
    assert abs(matched.estimate[0, 0]) < 0.15
    found = led(study, similarity)
    assert found.low[0] < 50 < found.high[0]
    partial = rank_correlation(table["mean SAT"], table.accuracy, [alone.mean(axis=1), alone[:, -1]])
    assert np.corrcoef(rest["accuracy, by a line"].T)[2, 0] == pytest.approx(partial, abs=1e-6)


def led(study, similarity):
    names = study.target.to_index()
    pairs = ms.member_sets(names, 2)
    votes = book.square(book.positions(pairs, names), ms.vote(study, pairs))
    accuracy = (study.clean_probability.argmax("class") == study.test_label).mean("test_image").values
    rows = book.matched_partners(accuracy, 0.01)
    expected = [r for r in permutations(range(24), 3) if abs(accuracy[r[1]] - accuracy[r[2]]) <= 0.01]
    assert sorted(map(tuple, rows)) == expected
    less = similarity.values[rows[:, 0], rows[:, 1]] < similarity.values[rows[:, 0], rows[:, 2]]
    return book.lead(rows[less], votes, accuracy, names)


def test_no_forest_sees_an_architecture_that_it_is_asked_about(monkeypatch):
    members = np.array(list(combinations(range(20), 2)))

    class Spy:
        def __init__(self, *_, **__): ...

        def fit(self, seen, _):
            self.seen = set(np.ravel(seen))

        def predict(self, asked):
            assert all(set(row) - self.seen for row in asked)  # a member is new
            assert len(self.seen) == 16
            return np.ones((len(asked), 1))

    monkeypatch.setitem(book.cross_fitted.__globals__, "RandomForestRegressor", Spy)
    assert (book.cross_fitted(members, np.zeros((190, 1)), members, 20) == 1).all()


def test_halves_share_nothing_and_keep_the_classes():
    study = random_study(images=101, classes=3)
    first, second = book.halves(study)
    assert sorted([*first.test_image.values, *second.test_image.values]) == list(study.test_image.values)
    counts = [np.bincount(half.test_label, minlength=3) for half in (first, second)]
    assert (abs(counts[0] - counts[1]) <= 1).all()
    for half in (first, second):
        assert set(half.image.values) == set(study.image.values) & set(half.test_image.values)


def test_rules_choose_as_they_say():
    similarity = np.array([[9, 1, 3, 2], [1, 9, 4, 5], [3, 4, 9, 6], [2, 5, 6, 9.0]])
    votes = np.array([[9, 0.8, 0.7, 0.9], [0.8, 9, 0.6, 0.5], [0.7, 0.6, 9, 0.4], [0.9, 0.5, 0.4, 9]])
    chosen = book.partners(np.array([0.9, 0.8, 0.896, 0.7]), similarity, votes)
    assert {rule: partner.tolist() for rule, partner in chosen.items()} == {
        "least similar": [1, 0, 0, 0],
        "most accurate": [2, 0, 0, 0],
        "diverse among the best": [2, 0, 0, 0],
        "tried out": [3, 0, 0, 0],
    }


def test_luck_of_the_half_chosen_on_is_no_gain_on_the_other():
    random, names = np.random.default_rng(0), pd.Index([f"m{i}" for i in range(60)])
    noise = [random.normal(size=(2, 60, 60)) for _ in range(2)]
    halves = [{"accuracy": np.zeros(60), "similarity": s + s.T, "votes": v + v.T} for s, v in noise]
    lucky = ms.jackknife(lambda kept: book.gains(kept, names, halves).mean(), names)
    assert (lucky.low[:-1] < 0).all()
    assert (lucky.high[:-1] > 0).all()
    seen = book.gains(names, names, halves[:1] * 2).mean()
    assert seen["tried out"] > 200  # where the choice judges itself, luck looks like 2 (of 100 points each)


def test_budget_is_kept_and_leaves_enough_for_the_others():
    cost, worth = pd.Series({"a": 3.0, "b": 8.0, "c": 4.0, "d": 1.0}), {"a": 3, "b": 4, "c": 2, "d": 1}

    def choose(first, size, budget):
        return book.choose(first, size, lambda _, name: worth[name], cost, budget)

    assert choose("a", 2, 11) == ["a", "b"]
    assert choose("a", 2, 10) == ["a", "c"]
    assert choose("a", 3, 11) == ["a", "c", "d"]  # b alone could be paid for, but not with another one
    assert choose("d", 3, 12) == ["d", "b", "a"]
    with pytest.raises(ValueError, match="7 is too little for 3 members"):
        choose("a", 3, 7)
