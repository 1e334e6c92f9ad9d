import math
from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from pages import page
from scipy.spatial.distance import squareform
from scipy.stats import binom
from sklearn.ensemble import RandomForestRegressor

import modelsim as ms
from modelsim import ensembles
from modelsim.agreement import rank_correlation

book = page("ensembles")
NAMES = [f"m{i:02d}" for i in range(69)]
VOTES, GROUPS = ["soft", "hard", "logit"], [np.arange(24) % 4] * 2  # two starts


def study_of(probability, label):
    """Lay out probabilities (model, image, class) as a study does; every fifth image is attacked."""
    ids = np.array([f"image {i:04d}" for i in range(len(label))])
    coordinates = {"target": NAMES[: len(probability)], "image": ids[::5], "test_image": ids}
    variables = {"clean_probability": (("target", "test_image", "class"), probability)}
    return xr.Dataset(variables, coordinates | {"test_label": ("test_image", label)})


def random_study(models=5, images=60, classes=4, parts=10_000):
    random = np.random.default_rng(0)
    counts = random.multinomial(parts, random.dirichlet(np.ones(classes), size=(models, images)))
    return study_of(counts / parts, random.integers(classes, size=images))


def elected(members, how):
    """Class that some members (model, class) elect on one image, in whole numbers and without shortcuts."""
    classes = range(len(members[0]))
    ballots = [max(classes, key=lambda c: m[c]) for m in members]
    total = {
        "hard": [ballots.count(c) for c in classes],
        "soft": [sum(m[c] for m in members) for c in classes],
        "logit": [math.prod(max(2 * m[c], 1) for m in members) for c in classes],
    }[how]
    return total.index(max(total))


@pytest.mark.parametrize("how", VOTES)
@pytest.mark.parametrize(("size", "parts"), [(2, 4), (2, 10_000), (3, 5)])  # few probabilities: many ties
def test_vote_is_that_of_a_plain_slow_computation(how, size, parts, monkeypatch):
    monkeypatch.setattr(ensembles, "_AT_ONCE", 3)
    study = random_study(5, 300, 3, parts)
    study.clean_probability[4] = np.nan  # one that doesn't vote doesn't count
    steps, label = np.rint(study.clean_probability.values[:4] * 10_000).astype(int), study.test_label.values
    found = ms.vote(study[dict(target=[4, 1, 3, 2, 0])], book.member_sets(NAMES[:4], size), how=how)
    assert found.index.tolist() == list(combinations(NAMES[:4], size))
    for share, members in zip(found, combinations(steps.tolist(), size), strict=True):
        assert share == np.mean([elected(image, how) for image in zip(*members, strict=True)] == label)


@pytest.mark.parametrize("how", VOTES)
def test_identical_members_gain_nothing(how):
    one = random_study(models=1)
    probability, label = one.clean_probability.values, one.test_label.values
    study, alone = study_of(np.repeat(probability, 4, axis=0), label), probability[0].argmax(axis=1) == label
    for size in (2, 3, 4):
        assert (ms.vote(study, book.member_sets(study.target.values, size), how=how) == alone.mean()).all()


def test_independent_members_vote_as_the_binomial_formula_says():
    images, p = 20_000, 0.7
    right = np.random.default_rng(0).random((5, images)) < p
    study = study_of(np.stack([right, ~right], axis=2), np.zeros(images, dtype=int))
    for size in (3, 5):
        sets = book.member_sets(study.target.values, size)
        table, none = book.describe(study, sets, xr.DataArray(np.eye(5)), GROUPS)[2], (1 - p) ** size
        voted, expected = ms.vote(study, sets, how="hard").to_numpy(), binom.sf(size // 2, size, p)
        assert voted == pytest.approx(expected, abs=0.015)
        assert table["none right"].to_numpy() == pytest.approx(none, abs=4 * np.sqrt(none / images))


def test_drawn_sets_differ_follow_the_seed_and_are_those_of_itertools():
    drawn, again, other = (book.member_sets(NAMES, 4, most=20_000, seed=seed) for seed in (0, 0, 1))
    assert len(drawn) == drawn.nunique() == 20_000
    counts, expected = np.unique(np.ravel(drawn.tolist()), return_counts=True)[1], 4 * 20_000 / 69
    assert len(counts) == 69
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert drawn.equals(again) > drawn.equals(other)
    for size in range(2, 8):
        assert book.member_sets(NAMES[6::-1], size).tolist() == list(combinations(NAMES[6::-1], size))


def with_probability(value):
    study = random_study(models=3, images=10, classes=3)
    study.clean_probability[1, 7] = value
    return study


A_B, GOOD = ("m00", "m01"), random_study()


@pytest.mark.parametrize(
    ("study", "sets", "culprit"),
    [
        (GOOD.drop_vars("clean_probability"), [A_B], "holds no probabilities"),
        (with_probability([0.5, 0.4, 0.2]), [A_B], "of m01 for image image 0007 are .0.5 0.4 0.2]"),
        (with_probability(np.nan), [A_B], "of m01 for image image 0007 are .nan nan nan]"),
        (GOOD, [("m00", "m01", "m00")], "m00 is repeated in the set m00, m01, m00"),
        (GOOD, [("m00", "m07")], "unknown model 'm07': did you mean"),
        (GOOD, [A_B, ("m00", "m01", "m02")], "all as many; got .2, 3]"),
    ],
)
def test_what_cannot_vote_is_refused_by_name(study, sets, culprit):
    with pytest.raises(ValueError, match=culprit):
        ms.vote(study, sets)
    with pytest.raises(ValueError, match="one of soft, hard, logit; got 'sotf'"):
        ms.vote(study, sets, how="sotf")


def test_rounding_is_no_mistake():
    assert len(ms.vote(with_probability([0.3334, 0.3334, 0.3333]), [A_B])) == 1


def planted(diversity, models=24, images=4000):
    """Errors in common in four groups, and similarity as of errors; or as of accuracies that differ."""
    random = np.random.default_rng(1)
    share = np.full(models, 0.18) if diversity else np.linspace(0.1, 0.3, models)
    errs = np.zeros((models, images), dtype=bool)
    for group in range(4 if diversity else 0):
        errs[group::4, random.choice(images, int(0.09 * images), replace=False)] = True
    for row, wanted in zip(errs, share, strict=True):
        row[random.choice(np.flatnonzero(~row), int(wanted * images) - row.sum(), replace=False)] = True
    right, wrong = random.uniform(0.5, 1, errs.shape), random.uniform(0.3, 0.49, errs.shape)
    of_true = np.where(errs, wrong, right).round(4)
    study = study_of(np.stack([of_true, 1 - of_true], axis=2), np.zeros(images, dtype=int))
    one, other = np.triu_indices(models, 1)
    by_accuracy = -share[one] - share[other] + random.normal(scale=0.03, size=len(one))
    return study, xr.DataArray(squareform(np.corrcoef(errs)[one, other] if diversity else by_accuracy))


def sets_of_three(study, similarity):
    names, sets = study.target.to_index(), book.member_sets(study.target.values, 3)
    members, alone, table = book.describe(study, sets, similarity, GROUPS)
    alone += 1e-6 * np.random.default_rng(0).random(alone.shape)  # equal accuracies make no bands
    rest = book.controlled(members, alone, table, 24)
    found = {control: book.correlations(values, members, names) for control, values in rest.items()}
    return found, rank_correlation(table["mean SAT"], table.accuracy, [alone.mean(axis=1), alone[:, -1]])


def test_planted_effect_of_diversity_is_found_with_accuracy_fixed():
    study, similarity = planted(diversity=True)
    found, _ = sets_of_three(study, similarity)
    for control in ("nothing", book.FORESTS, book.OWN):
        assert found[control].high[0, 0] < -0.1, control  # similarity with accuracy
        assert found[control].low[1, 0] > 0.1, control  # clusters with accuracy
        assert found[control].low[0, 1] > 0.1, control  # similarity with images that nobody gets right
    assert (led(study, similarity).low[:2] > [60, 0.2]).all()


def test_effect_of_accuracy_alone_vanishes_under_matching():
    study, similarity = planted(diversity=False)
    found, partial = sets_of_three(study, similarity)
    assert found["nothing"].low[0, 0] > 0.6
    assert found[book.FORESTS].low[0, 0] < 0 < found[book.FORESTS].high[0, 0] < 0.4
    assert found["accuracy, by a line"].estimate[0, 0] == pytest.approx(partial, abs=1e-6)
    led_by = led(study, similarity)
    assert led_by.low[0] < 50 < led_by.high[0]


def led(study, similarity):
    names, pairs = study.target.to_index(), book.member_sets(study.target.values, 2)
    votes = book.square(book.positions(pairs, names), ms.vote(study, pairs))
    accuracy = (study.clean_probability.values.argmax(axis=2) == 0).mean(axis=1)
    rows = book.matched_partners(accuracy, 0.01)
    near = abs(accuracy[:, None] - accuracy) <= 0.01
    assert sorted(map(tuple, rows)) == [r for r in permutations(range(24), 3) if near[r[1:]]]
    less = similarity.values[rows[:, 0], rows[:, 1]] < similarity.values[rows[:, 0], rows[:, 2]]
    return book.lead(rows[less], votes, accuracy, names)


def test_no_forest_sees_an_architecture_that_it_is_asked_about(monkeypatch):
    members = np.array(list(combinations(range(20), 2)))

    class Spy(RandomForestRegressor):
        def fit(self, accuracies, outcomes):
            self.seen = set(np.ravel(accuracies))
            assert len(self.seen) == 16
            return super().fit(accuracies, outcomes)

        def predict(self, accuracies):
            assert all(set(row) - self.seen for row in accuracies)  # a member is new
            return super().predict(accuracies) + 1

    monkeypatch.setitem(book.cross_fitted.__globals__, "RandomForestRegressor", Spy)
    assert book.cross_fitted(members, np.zeros((190, 2)), members, 20) == pytest.approx(np.ones((190, 2)))


def test_halves_share_nothing_and_keep_the_classes():
    study = random_study(images=101, classes=3)
    first, second = book.halves(study)
    assert sorted([*first.test_image.values, *second.test_image.values]) == list(study.test_image.values)
    assert (abs(np.bincount(first.test_label) - np.bincount(second.test_label)) <= 1).all()
    for half in (first, second):
        assert set(half.image.values) == set(study.image.values) & set(half.test_image.values)


def test_table_of_pairs_is_what_votes_add_up_to_and_halves_take_their_share():
    study = random_study(6, 101, 3, parts=4)  # few probabilities: many ties
    study["pair_right"] = ("pair", "test_image"), book.pairs_right(study)
    for half in (study, *book.halves(study)):
        assert half.pair_right.mean("test_image").values == pytest.approx(
            ms.vote(half, book.member_sets(half.target.values, 2)).to_numpy()
        )


def test_rules_choose_as_they_say():
    similarity, votes = squareform([3, 1, 2, 4, 5, 6.0]), squareform([0.8, 0.7, 0.9, 0.6, 0.5, 0.4])
    chosen = book.partners(np.array([0.9, 0.899, 0.896, 0.7]), similarity, votes)
    expected = [[2, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0]]
    assert [partner.tolist() for partner in chosen.values()] == expected


def test_luck_of_the_half_chosen_on_is_no_gain_on_the_other():
    random, names = np.random.default_rng(0), pd.Index(NAMES[:60])
    noise = random.normal(size=(2, 2, 60, 60))
    halves = [{"accuracy": np.zeros(60), "similarity": s + s.T, "votes": v + v.T} for s, v in noise]
    lucky = ms.jackknife(lambda kept: book.gains(kept, names, halves)["tried out"].mean(), names)
    assert lucky.low < 0 < lucky.high
    first, second = (half["votes"] for half in halves)
    pair = 50 * (first[59, 58] + second[59, 58])  # of equals the last two
    assert book.gains(names, names, halves)["two most accurate"].to_numpy() == pytest.approx(pair)
    assert book.over_splits(names, names, [halves, halves[:1] * 2])["tried out"].mean() > 100
    assert book.gains(names, names, halves[:1] * 2)["tried out"].mean() > 200  # where choice judges itself


def test_budget_is_kept_and_leaves_enough_for_the_others():
    cost, worth = pd.Series({"a": 3.0, "b": 8.0, "c": 4.0, "d": 1.0}), dict(a=3, b=4, c=2, d=1)
    for first, size, budget, team in (("a", 2, 11, "ab"), ("a", 2, 10, "ac"), ("a", 3, 11, "acd")):
        assert book.choose(first, size, lambda _, name: worth[name], cost, budget) == list(team)
    with pytest.raises(ValueError, match="7 is too little for 3 members"):
        book.choose("a", 3, lambda _, name: worth[name], cost, 7)


def test_relations_follow_from_names():
    names = ["resnet50", "resnet50-seed1", "seresnet50", "convnext_tiny", "mixnet_xl", "gmlp_s16_224"]
    found = book.relations(pd.Index(names))
    same, base, two = book.RELATIONS
    assert found[0].tolist() == [same, same, base, base, two, two]
    assert (found == found.T).all()
