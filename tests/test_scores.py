import re
import warnings

import numpy as np
import pytest
import tiny
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import modelsim as ms

# Five images. Model a is right about images 0, 1, 2, 3 and b about 0, 1, 2, 4, so three count for the pair.
LABELS = [0, 1, 2, 0, 1]
CLEAN = [[0, 1, 2, 0, 0], [0, 1, 2, 1, 1]]
ADVERSARIAL = [
    # Made on a: fools a on 0, 1, 2, 3 (all four that count) and b on 0, 1 of 0, 1, 2.
    [[1, 0, 0, 1, 1], [1, 0, 2, 2, 0]],
    # Made on b: fools a on 2 of 0, 1, 2, and b on 0, 2 of 0, 1, 2, 4.
    [[0, 1, 0, 1, 0], [2, 1, 0, 0, 1]],
]


def part(**places):
    return tiny.study(LABELS, CLEAN, ADVERSARIAL).isel(places)


@pytest.fixture
def study():
    return part()


@st.composite
def studies(draw, models=3, images=6):
    """Any predictions; every model is right about the first image."""

    def predictions(*shape):
        return draw(arrays(np.int16, shape, elements=st.integers(0, 2)))

    labels, clean = predictions(images), predictions(models, images)
    clean[:, 0] = labels[0]
    return tiny.study(labels, clean, predictions(models, models, images))


def test_neighbours_are_ranked_with_interval_and_relative_sat():
    # Of 10 images all know all; made on d, 8 fool a, 5 b and 1 c, and so back.
    hits = {(3, 0): 8, (3, 1): 5, (3, 2): 1, (0, 1): 2, (0, 2): 3, (1, 2): 4}
    adversarial = np.zeros((4, 4, 10), dtype=int)
    for (one, other), count in hits.items():
        adversarial[one, other, :count] = adversarial[other, one, :count] = 1
    four = tiny.study([0] * 10, [[0] * 10] * 4, adversarial)
    table = ms.neighbours(four, "d", level=0.5)
    assert table.index.tolist() == ["a", "b", "c"]
    np.testing.assert_allclose(table.SAT, np.log([80, 50, 10]))
    bounds = ms.interval(four, level=0.5).sel(model="d", other=table.index)
    np.testing.assert_array_equal(table[["low", "high"]].T, bounds)
    relative = ms.relative_sat(ms.transferability(four)).sel(model="d", other=table.index)
    np.testing.assert_array_equal(table["relative SAT"], relative)
    assert "relative SAT" not in ms.neighbours(four.isel(source=slice(3), target=slice(3)), "c")
    with pytest.raises(ValueError, match="unknown model 'dd': did you mean 'd'"):
        ms.neighbours(four, "dd")


def test_scores_and_counts_are_those_computed_by_hand(study):
    rate, score, own = ms.transferability(study), ms.sat(study), ms.white_box_success(study)
    assert rate.dims == ("source", "target")
    assert rate.hits.values.tolist() == [[4, 2], [1, 2]]
    assert rate.trials.values.tolist() == [[4, 3], [3, 4]]
    assert rate.values.tolist() == [[1, 2 / 3], [1 / 3, 1 / 2]]
    assert score.dims == ("model", "other")
    np.testing.assert_allclose(score, [[np.log(100), np.log(50)], [np.log(50), np.log(50)]])
    assert float(score.sel(model="a", other="b")) == pytest.approx(3.912023)
    assert score.trials.to_series().loc["a"].to_dict() == {"a": 4, "b": 3}
    assert own.to_series().to_dict() == {"a": 1.0, "b": 0.5}
    assert own.trials.to_series().to_dict() == {"a": 4, "b": 4}
    # Each is right about four of the five images.
    assert rate.accuracy.to_series().to_dict() == score.accuracy.to_series().to_dict() == {"a": 0.8, "b": 0.8}
    assert (rate.accuracy.dims, score.accuracy.dims) == (("target",), ("model",))
    assert ms.transferability(study.isel(source=[1])).identical(rate.isel(source=[1]))


def test_images_without_gradient_stand_beside_the_white_box_success_of_their_source(study):
    study["images_without_gradient"] = ("source", [0, 5])
    own = ms.white_box_success(study.isel(source=[1, 0]))
    assert own.to_series().to_dict() == {"b": 0.5, "a": 1.0}
    assert own.images_without_gradient.to_series().to_dict() == {"b": 5, "a": 0}


def test_notes_on_models_and_images_stay_out_of_the_scores(study):
    noted = study.assign_coords(model_sha256=("target", ["1", "2"]), image_sha256=("image", list("vwxyz")))
    noted = noted.set_coords("images_without_gradient")
    assert ms.transferability(noted).identical(ms.transferability(study))
    assert ms.sat(noted.isel(source=[0], target=[0])).identical(ms.sat(study.isel(source=[0], target=[0])))
    assert ms.interval(noted, resamples=9).identical(ms.interval(study, resamples=9))


def test_difference_of_two_studies_keeps_no_count_of_only_one_of_them(study):
    other = study.copy(deep=True)
    other.clean_prediction[0, 4] = other.label[4]
    other.adversarial_prediction[1, 0] = 3
    change = ms.sat(other) - ms.sat(study)
    assert change.to_pandas().loc["a", "b"] == pytest.approx(np.log(100 * (1 + 3 / 4) / 2) - np.log(50))
    assert set(change.coords) == {"model", "other"}


def test_sat_has_a_floor_where_no_adversarial_image_fools_anyone():
    study = tiny.study([0, 1], [[0, 1], [0, 1]], np.tile([0, 1], (2, 2, 1)))
    np.testing.assert_allclose(ms.sat(study), np.log(0.01))


@pytest.mark.parametrize(
    ("measure", "clean", "message"),
    [
        *(
            (measure, [[0, 2], [2, 1], [0, 1]], "a and b")
            for measure in (ms.transferability, ms.sat, ms.interval)
        ),
        (lambda study: ms.transferability(study.isel(source=[2])), [[0, 2], [0, 1], [2, 1]], "a and c"),
        (ms.transferability, [[1, 2]] * 4, "a and a; a and b; a and c; and 7 more"),
    ],
)
def test_pairs_without_trials_are_nan_and_counted_once_in_one_warning_that_names_three(
    measure, clean, message
):
    n, right = len(clean), (np.array(clean) == [0, 1]).astype(int)
    with pytest.warns(UserWarning, match=f"both of {message}: their scores are NaN") as caught:
        result = measure(tiny.study([0, 1], clean, np.zeros((n, n, 2))))
    assert len(caught) == 1
    missing = np.isnan(result.values.reshape(-1, *result.shape[-2:])[0])
    both = right @ right.T  # images that both classify correctly
    assert missing.tolist() == (both == 0)[-len(missing) :].tolist()


@given(studies(), st.permutations(range(3)), arrays(np.int16, (3, 3, 6), elements=st.integers(0, 2)))
def test_scores_are_symmetric_go_with_their_models_and_count_what_both_get_right(study, order, others):
    score, rate = ms.sat(study), ms.transferability(study)
    np.testing.assert_array_equal(score, score.T)
    assert (score <= np.log(100) + 1e-12).all()
    permuted = study.isel(source=order, target=order)
    np.testing.assert_array_equal(ms.sat(permuted), score.values[np.ix_(order, order)])
    right, own = study.clean_prediction.values == study.label.values, study.adversarial_prediction.values
    both = right[:, None] & right[None, :]
    assert (rate.trials.values == both.sum(2)).all()
    own[~both] = others[~both]
    assert ms.transferability(study).identical(rate)
    own[range(3), range(3)] = (study.label.values + 1) % 3  # every attack fools its own model
    np.testing.assert_allclose(np.diag(ms.sat(study)), np.log(100))


@pytest.mark.parametrize(("measure", "score"), [("sat", ms.sat), ("transferability", ms.transferability)])
def test_interval_equals_a_bootstrap_that_scores_redrawn_studies(study, measure, score):
    n, resamples = study.sizes["image"], 60
    weights = np.random.default_rng(4).multinomial(n, [1 / n] * n, size=resamples)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        redrawn = (study.isel(image=np.repeat(np.arange(n), weight)) for weight in weights)
        expected = np.nanquantile([score(one).values for one in redrawn], [0.05, 0.95], axis=0)
    result = ms.interval(study, measure, level=0.9, resamples=resamples, seed=4)
    np.testing.assert_allclose(result.values, expected, rtol=1e-5)
    assert result.dims == ("bound", *score(study).dims)


def test_interval_of_many_images_is_the_binomial_one():
    random, rates = np.random.default_rng(0), np.array([[0.9, 0.3], [0.5, 0.8]])
    fooled = random.random((2, 2, 4000)) < rates[:, :, None]
    study = tiny.study(np.zeros(4000), np.zeros((2, 4000)), fooled)
    rate = ms.transferability(study).values
    half = 1.96 * np.sqrt(rate * (1 - rate) / 4000)
    low, high = ms.interval(study, "transferability", resamples=2000).values
    # A 2.5 % quantile of 2,000 draws has a standard error of 0.06 deviations, 3 % of the half-width.
    np.testing.assert_allclose((rate - low) / half, 1, atol=0.12)
    np.testing.assert_allclose((high - rate) / half, 1, atol=0.12)


def test_first_seeds_are_kept_in_their_order_on_both_sides():
    study = tiny.study([0, 1], [[0, 1]] * 3, np.arange(18).reshape(3, 3, 2))
    names = ["resnet50-seed2", "resnet50", "dpn107"]
    kept = ms.first_seeds(study.assign_coords(source=names, target=names))
    assert kept.source.values.tolist() == kept.target.values.tolist() == ["resnet50", "dpn107"]
    assert kept.adversarial_prediction.values.tolist() == [[[8, 9], [10, 11]], [[14, 15], [16, 17]]]


THREE = np.array([[np.nan, 1.0, 2.0], [1.0, np.nan, 4.0], [2.0, 4.0, np.nan]])
WORDS = np.array([["", "x", "y"], ["x", "", "z"], ["y", "z", ""]])


def matrix(values=THREE, names="abc", dims=("model", "other"), **entries):
    """Name a matrix, with some entries changed: `ab=1` is that of row a and column b."""
    values = np.array(values)
    for (row, column), value in entries.items():
        values["abc".index(row), "abc".index(column)] = value
    return xr.DataArray(values, {dim: list(names) for dim in dims}, dims, name="alike")


def test_pairs_are_read_once_along_the_rows_and_named():
    found = ms.pairs(matrix(dims=("row", "column"), cb=4 + 1e-9))  # rounding is no asymmetry
    assert found.to_dict() == {("a", "b"): 1, ("a", "c"): 2, ("b", "c"): 4}
    assert found.index.names == ["model", "other"]
    assert found.name == "alike"
    assert ms.pairs(matrix(WORDS)).tolist() == ["x", "y", "z"]
    assert ms.pairs(matrix(WORDS == "x")).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("use", "given", "message"),
    [
        (ms.pairs, matrix()[:2], "got shape (2, 3)"),
        (ms.pairs, matrix()[0], "got shape (3,)"),
        (ms.pairs, matrix()[:, [0, 2, 1]], "must name the same models in one order: b against c"),
        (ms.pairs, matrix(names="aba"), "a stands more than once in the matrix"),
        (ms.pairs, matrix(cb=np.nan), "the value of b and c is NaN or infinite: leave one of them out"),
        (ms.pairs, matrix(ab=-np.inf), "the value of a and b is NaN or infinite"),
        (ms.pairs, matrix(ac=3), "the value of a and c differs with their order"),
        (ms.pairs, matrix(WORDS, ac="w"), "the value of a and c differs with their order"),
        (ms.sat, part(target=[1, 0]), "in one order: a against b"),
        (ms.sat, part(source=[1]), "got shape (1, 2)"),
        *(
            (lambda level: ms.interval(part(), level=level), level, f"0 and 1, got {level}")
            for level in (0, 1, 95, -0.1, float("nan"))
        ),
        (
            lambda measure: ms.interval(part(), measure),
            "cka",
            "or 'transferability', got 'cka'",
        ),
    ],
)
def test_what_has_no_score_or_no_pairs_is_refused_naming_why(use, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        use(given)
