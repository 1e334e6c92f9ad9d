import numpy as np
import pandas as pd
import pytest
import xarray as xr
from pages import page
from scipy.spatial.distance import squareform
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import modelsim as ms
from modelsim.agreement import rank_correlation, residual_ranks

book = page("measures")
NAMES = [f"m{i}" for i in range(24)]


def put(monkeypatch, **values):
    """Give the page's functions what its cells would have computed."""
    for name, value in values.items():
        monkeypatch.setitem(book.of_pairs.__globals__, name, value)


@pytest.fixture(autouse=True)
def forms(monkeypatch):
    put(monkeypatch, FORMS={"as it is": np.array, "without effects": book.without_effects})


def noise(seed, n=24):
    values = np.random.default_rng(seed).normal(size=(n, n))
    return values + values.T


def square(values, names=NAMES):
    values = np.asarray(values)
    return pd.DataFrame(squareform(values) if values.ndim == 1 else values, names, names)


def in_pairs(values):
    return squareform(values, checks=False)


@pytest.fixture
def known(monkeypatch):
    """Accuracy, and two outcomes: one is a half of each pair's kind, the other of its gain."""
    accuracy = np.random.default_rng(0).normal(size=24)
    kind = np.arange(24) % 2
    tables = {
        "mean accuracy": square(np.add.outer(accuracy, accuracy) / 2),
        "difference": square(abs(np.subtract.outer(accuracy, accuracy))),
        "reduction": square(noise(1)),
        "same base": square(np.equal.outer(kind, kind)),
        "released": square(noise(2)),
    }
    put(monkeypatch, known=tables)
    return tables


def test_what_is_left_without_effects_is_the_residual_of_the_package_and_pairs_stand_in_its_order():
    score = xr.DataArray(noise(3), {"model": NAMES, "other": NAMES}, ("model", "other"))
    rest = ms.main_effects(score).residual.values
    apart = ~np.eye(24, dtype=bool)
    np.testing.assert_allclose(book.without_effects(score.values)[apart], rest[apart], atol=1e-8)
    assert book.of_pairs(score.to_pandas(), NAMES).tolist() == ms.pairs(score).tolist()
    few = NAMES[5:9]
    assert book.of_pairs(score.to_pandas(), few)[-1] == score.values[7, 8]
    anew = book.without_effects(score.sel(model=few, other=few).values)
    np.testing.assert_allclose(book.of_pairs(score.to_pandas(), few, "without effects"), in_pairs(anew))


def test_correlations_and_areas_are_those_of_other_implementations(known):
    x = np.column_stack([in_pairs(noise(seed)) for seed in (4, 5)])
    x[:, 1] = x[:, 1].round()  # ties
    y, extra = in_pairs(noise(6)), in_pairs(noise(7))
    fixed = [in_pairs(known[key].to_numpy()) for key in ("mean accuracy", "difference")]
    gain, same = (in_pairs(known[key].to_numpy()) for key in ("reduction", "same base"))
    released = in_pairs(known["released"].to_numpy())
    expected = [
        [
            rank_correlation(column, y, [extra]),
            -rank_correlation(column, gain, [*fixed, extra]),
            roc_auc_score(same, residual_ranks([column, column, *fixed, extra])[0]),
            rank_correlation(column, released, [*fixed, extra]),
        ]
        for column in x.T
    ]
    found = [
        book.correlated(book.ranked(x, extra), book.ranked(y, extra)),
        book.lowers_error(x, NAMES, "as it is", extra),
        book.tells("same base", x, NAMES, "as it is", extra),
        book.foretells(x, NAMES, "as it is", extra),
    ]
    np.testing.assert_allclose(np.transpose(found), expected, atol=1e-10)


def test_planted_kin_and_gain_are_found_and_accuracy_is_not_taken_for_them(known):
    mean, difference = (in_pairs(known[key].to_numpy()) for key in ("mean accuracy", "difference"))
    same = in_pairs(known["same base"].to_numpy())
    by_accuracy = mean - difference
    x = np.column_stack([by_accuracy, by_accuracy + same, by_accuracy + in_pairs(noise(8))])
    nothing, kin, _ = book.tells("same base", x, NAMES, "as it is")
    assert kin > 0.9
    assert nothing == pytest.approx(0.5, abs=0.1)
    known["reduction"] = square(mean - x[:, 2])
    nothing, _, gain = book.lowers_error(x, NAMES, "as it is")
    assert gain > 0.6
    assert abs(nothing) < 0.2


@pytest.mark.parametrize(("effects", "expected"), [("both", (0.9, -0.2, 0.2)), ("released", (-0.4, 0.9, 1))])
def test_what_single_networks_share_foretells_only_as_it_is(known, effects, expected):
    effect, pair = 4 * np.random.default_rng(9).normal(size=24), noise(10)
    both = np.add.outer(effect, effect)
    known["released"] = square(both + pair)
    score = square(both + noise(11) if effects == "both" else pair)

    def found(form):
        return book.foretells(book.of_pairs(score, NAMES, form)[:, None], NAMES, form).item()

    least, low, high = expected
    assert least < found("as it is") < least + 0.8
    assert low < found("without effects") <= high + 1e-9


def test_a_twin_is_first_only_if_it_is_nearer_than_every_other(monkeypatch):
    networks = ["a", "b", "c", "a-seed1", "b-seed1"]
    #                a  b  c  a1 b1: the two twins are nearest to each other, but don't compete.
    values = np.array([[9, 1, 2, 3, 3], [1, 9, 5, 2, 4], [2, 5, 9, 2, 0], [3, 2, 2, 9, 8], [3, 4, 0, 8, 9]])
    put(monkeypatch, networks=networks, names=pd.Index(["a", "b", "c"]), seeded=["a", "b"])
    found = book.firsts(square(values, networks), "as it is")
    # Only b has a nearer one than its twin: c.
    assert found.to_dict() == {"a": 1, "b": 0.5}
    assert [*book.ways("a")] == [("a", "a-seed1"), ("a-seed1", "a")]


@pytest.mark.parametrize(("form", "expected"), [("as it is", 1), ("without effects", 0)])
def test_a_teacher_helps_by_what_is_left_with_accuracy_fixed(monkeypatch, form, expected):
    random = np.random.default_rng(12)
    accuracy, own, liked = (pd.Series(random.normal(size=24), NAMES) for _ in range(3))
    put(
        monkeypatch,
        teacher_accuracy=accuracy,
        with_all={"measure": liked},
        similar={("measure", "student"): liked + 0.01 * own},
        gain={"student": liked},
    )
    found = book.helps("measure", "student", form, NAMES)
    # Nothing but what the teacher has in common with all makes this gain: with it fixed, nothing is left.
    assert (found if expected else np.nan_to_num(found)) == pytest.approx(expected, abs=0.02)


def test_planted_parts_of_sat_are_found(monkeypatch):
    effect = np.random.default_rng(13).normal(size=24)
    clean, rest = (book.without_effects(noise(seed)) for seed in (14, 15))
    score = 2 * np.add.outer(effect, effect) + clean + rest
    others = {f"c{i}": square(np.add.outer(effect, effect) + clean) for i in range(2)}
    put(monkeypatch, matrices={"SAT": square(score), "relative SAT": square(rest), **others}, CLEAN=others)
    single, told, left, of_pair, of_rest = book.parts(NAMES)
    sizes = [np.var(in_pairs(part)) for part in (clean, rest)]
    assert single + told + left == pytest.approx(1)
    assert single > 0.5
    assert told / left == pytest.approx(sizes[0] / sizes[1], rel=0.25)
    assert of_pair == pytest.approx(told / (told + left))
    assert of_rest < 0.1


def test_measure_of_the_reader_is_the_rank_correlation_of_what_the_true_class_is_given():
    p = np.random.default_rng(16).dirichlet(np.ones(3), (4, 30))
    label = np.arange(30) % 3
    coordinates = {"target": NAMES[:4]}
    variables = {"clean_probability": (("target", "image", "class"), p), "label": ("image", label)}
    found = book.mine(xr.Dataset(variables, coordinates))
    true = [[row[image, label[image]] for image in range(30)] for row in p]
    np.testing.assert_allclose(found, spearmanr(np.transpose(true)).statistic)
    assert [*found.index] == NAMES[:4]


def test_a_number_is_written_with_its_interval():
    assert book.bounded([0.126, -0.004, 0.3]).replace("\xa0", " ") == "0.13 [−0.00, 0.30]"
    assert book.bounded([np.nan] * 3) == ""
