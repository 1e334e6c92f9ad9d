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
HITS = [[4, 2], [1, 2]]
TRIALS = [[4, 3], [3, 4]]


@pytest.fixture
def study():
    return tiny.study(LABELS, CLEAN, ADVERSARIAL)


@st.composite
def studies(draw, models=3, images=6):
    """Any predictions; every model is right about the first image."""

    def predictions(*shape):
        return draw(arrays(np.int16, shape, elements=st.integers(0, 2)))

    labels, clean = predictions(images), predictions(models, images)
    clean[:, 0] = labels[0]
    return tiny.study(labels, clean, predictions(models, models, images))


def simulated(n, rates, seed=0):
    """Two models that are always right; images made on one fool the other with the probability in `rates`."""
    random = np.random.default_rng(seed)
    rates = np.asarray(rates)
    adversarial = random.random((2, 2, n)) < rates[:, :, None]
    return tiny.study(np.zeros(n), np.zeros((2, n)), adversarial)


def test_hits_and_trials_are_those_counted_by_hand(study):
    rate = ms.transferability(study)
    assert rate.dims == ("source", "target")
    assert rate.hits.values.tolist() == HITS
    assert rate.trials.values.tolist() == TRIALS


def test_transferability_is_that_computed_by_hand(study):
    rate = ms.transferability(study)
    assert float(rate.sel(source="a", target="b")) == 2 / 3
    assert float(rate.sel(source="b", target="a")) == 1 / 3
    assert ms.white_box_success(study).to_series().to_dict() == {"a": 1.0, "b": 0.5}


def test_counts_and_accuracy_stand_beside_every_score(study):
    # Each is right about four of the five images.
    rate, score, own = ms.transferability(study), ms.sat(study), ms.white_box_success(study)
    assert rate.accuracy.to_series().to_dict() == {"a": 0.8, "b": 0.8}
    assert score.accuracy.to_series().to_dict() == {"a": 0.8, "b": 0.8}
    assert score.trials.to_series().loc["a"].to_dict() == {"a": 4, "b": 3}
    assert own.trials.to_series().to_dict() == {"a": 4, "b": 4}
    assert rate.accuracy.dims == ("target",)
    assert score.accuracy.dims == ("model",)


def test_images_without_gradient_stand_beside_the_white_box_success_of_their_source(study):
    study["images_without_gradient"] = ("source", [0, 5])
    own = ms.white_box_success(study.isel(source=[1, 0]))
    assert own.to_series().to_dict() == {"b": 0.5, "a": 1.0}
    assert own.images_without_gradient.to_series().to_dict() == {"b": 5, "a": 0}


def test_notes_on_models_and_images_stay_out_of_the_scores(study):
    noted = study.assign_coords(model_sha256=("target", ["1", "2"]), image_sha256=("image", list("vwxyz")))
    noted["images_without_gradient"] = ("source", [0, 0])
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


def test_sat_of_sources_that_are_not_the_targets_in_order_is_refused(study):
    for part in (study.isel(target=[1, 0]), study.isel(source=[1])):
        with pytest.raises(ValueError, match=r"a against b|got shape \(1, 2\)"):
            ms.sat(part)


def test_sat_is_the_log_of_the_mean_per_cent_of_both_directions(study):
    score = ms.sat(study)
    expected = [[np.log(100), np.log(50)], [np.log(50), np.log(50)]]
    np.testing.assert_allclose(score.values, expected)
    assert float(score.sel(model="a", other="b")) == pytest.approx(3.912023)


def test_sat_has_a_floor_where_no_adversarial_image_fools_anyone():
    study = tiny.study([0, 1], [[0, 1], [0, 1]], np.tile([0, 1], (2, 2, 1)))
    np.testing.assert_allclose(ms.sat(study), np.log(0.01))


def test_pair_without_trials_is_nan_and_named_in_one_warning():
    labels, clean = [0, 1], [[0, 2], [2, 1], [0, 1]]
    study = tiny.study(labels, clean, np.zeros((3, 3, 2)))
    for measure in (ms.transferability, ms.sat, ms.interval):
        with pytest.warns(UserWarning, match="both of a and b: their scores are NaN") as caught:
            result = measure(study)
        assert len(caught) == 1
        missing = np.argwhere(np.isnan(result.values.reshape(-1, 3, 3)[0]))
        assert missing.tolist() == [[0, 1], [1, 0]]
    with warnings.catch_warnings(action="ignore"):
        assert ms.transferability(study).trials.values.tolist() == [[1, 0, 1], [0, 1, 1], [1, 1, 2]]


def test_pair_without_trials_is_named_by_its_source_too():
    study = tiny.study([0, 1], [[0, 2], [0, 1], [2, 1]], np.zeros((3, 3, 2)))
    with pytest.warns(UserWarning, match="both of a and c: their scores"):
        ms.transferability(study.isel(source=[2]))


def test_warning_about_many_pairs_names_three_and_counts_the_rest():
    study = tiny.study([0, 0], [[1, 1]] * 4, np.zeros((4, 4, 2)))
    with pytest.warns(UserWarning, match="a and a; a and b; a and c; and 7 more"):
        ms.transferability(study)


@given(studies())
def test_sat_is_symmetric_and_never_above_log_100(study):
    score = ms.sat(study).values
    np.testing.assert_array_equal(score, score.T)
    assert (score <= np.log(100) + 1e-12).all()


@given(studies())
def test_diagonal_is_log_100_when_every_attack_fools_its_own_model(study):
    own = study.adversarial_prediction.values
    for i in range(3):
        own[i, i] = (study.label.values + 1) % 3
    np.testing.assert_allclose(np.diag(ms.sat(study)), np.log(100))


@given(studies(), st.permutations(range(3)))
def test_permuting_the_models_permutes_the_scores(study, order):
    permuted = study.isel(source=order, target=order)
    np.testing.assert_array_equal(ms.sat(permuted), ms.sat(study).values[np.ix_(order, order)])
    moved = ms.interval(permuted, resamples=20).values
    np.testing.assert_array_equal(moved, ms.interval(study, resamples=20).values[:, order][:, :, order])


@given(studies(), arrays(np.int16, (3, 3, 6), elements=st.integers(0, 2)))
def test_images_that_either_model_gets_wrong_do_not_count(study, others):
    right = study.clean_prediction.values == study.label.values
    both = right[:, None] & right[None, :]
    before = ms.transferability(study)
    study.adversarial_prediction.values[~both] = others[~both]
    assert ms.transferability(study).identical(before)
    assert (before.trials.values == both.sum(2)).all()


def test_transferability_of_one_source_is_its_row_of_the_whole(study):
    part, whole = ms.transferability(study.isel(source=[1])), ms.transferability(study)
    assert part.identical(whole.isel(source=[1]))


@pytest.mark.parametrize(("measure", "score"), [("sat", ms.sat), ("transferability", ms.transferability)])
def test_interval_equals_a_bootstrap_that_scores_redrawn_studies(study, measure, score):
    n, resamples = study.sizes["image"], 60
    weights = np.random.default_rng(4).multinomial(n, [1 / n] * n, size=resamples)
    samples = []
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        for weight in weights:
            redrawn = study.isel(image=np.repeat(np.arange(n), weight))
            samples.append(score(redrawn).values)
    expected = np.nanquantile(samples, [0.05, 0.95], axis=0)
    result = ms.interval(study, measure, level=0.9, resamples=resamples, seed=4)
    np.testing.assert_allclose(result.values, expected, rtol=1e-5)
    assert result.dims == ("bound", *score(study).dims)


def test_interval_holds_the_score_and_widens_with_its_level():
    study = simulated(300, [[0.9, 0.3], [0.5, 0.8]])
    point, wide, narrow = ms.sat(study), ms.interval(study), ms.interval(study, level=0.5)
    assert (wide.sel(bound="low") < narrow.sel(bound="low")).all()
    assert (narrow.sel(bound="low") < point).all()
    assert (point < narrow.sel(bound="high")).all()
    assert (narrow.sel(bound="high") < wide.sel(bound="high")).all()


def test_interval_depends_on_its_seed_only(study):
    first, again, other = (ms.interval(study, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert first.identical(again)
    assert not np.array_equal(first.values, other.values)


def test_interval_of_many_images_is_the_binomial_one():
    study = simulated(4000, [[0.9, 0.3], [0.5, 0.8]])
    rate = ms.transferability(study).values
    half = 1.96 * np.sqrt(rate * (1 - rate) / 4000)
    low, high = ms.interval(study, "transferability", resamples=2000).values
    # A 2.5 % quantile of 2,000 draws has a standard error of 0.06 deviations, 3 % of the half-width.
    np.testing.assert_allclose((rate - low) / half, 1, atol=0.12)
    np.testing.assert_allclose((high - rate) / half, 1, atol=0.12)


@pytest.mark.parametrize("level", [0, 1, 95, -0.1, float("nan")])
def test_level_outside_0_to_1_is_refused(study, level):
    with pytest.raises(ValueError, match=f"level must be between 0 and 1, got {level}"):
        ms.interval(study, level=level)


def test_unknown_measure_is_named(study):
    with pytest.raises(ValueError, match="'cka'"):
        ms.interval(study, "cka")


def test_first_seeds_are_kept_in_their_order_on_both_sides():
    study = tiny.study([0, 1], [[0, 1]] * 3, np.arange(18).reshape(3, 3, 2))
    names = ["resnet50-seed2", "resnet50", "dpn107"]
    kept = ms.first_seeds(study.assign_coords(source=names, target=names))
    assert kept.source.values.tolist() == kept.target.values.tolist() == ["resnet50", "dpn107"]
    assert kept.adversarial_prediction.values.tolist() == [[[8, 9], [10, 11]], [[14, 15], [16, 17]]]


def matrix(values, names="abc", dims=("model", "other")):
    return xr.DataArray(np.asarray(values), {dim: list(names) for dim in dims}, dims, name="alike")


THREE = np.array([[np.nan, 1.0, 2.0], [1.0, np.nan, 4.0], [2.0, 4.0, np.nan]])


def test_pairs_are_read_once_along_the_rows_and_named():
    found = ms.pairs(matrix(THREE, dims=("row", "column")))
    assert found.to_dict() == {("a", "b"): 1, ("a", "c"): 2, ("b", "c"): 4}
    assert found.index.names == ["model", "other"]
    assert found.name == "alike"


def test_pairs_of_words_and_of_truths_are_read_too():
    words = np.array([["", "x", "y"], ["x", "", "z"], ["y", "z", ""]])
    assert ms.pairs(matrix(words)).tolist() == ["x", "y", "z"]
    assert ms.pairs(matrix(words == "x")).tolist() == [True, False, False]


def test_rounding_is_no_asymmetry():
    values = THREE.copy()
    values[2, 1] += 1e-9
    assert ms.pairs(matrix(values)).tolist() == [1, 2, 4]


def entry(i, j, value, values=THREE):
    values = values.copy()
    values[i, j] = value
    return matrix(values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (matrix(THREE)[:2], "got shape (2, 3)"),
        (matrix(THREE)[0], "got shape (3,)"),
        (matrix(THREE)[:, [0, 2, 1]], "rows and columns must name the same models in one order: b against c"),
        (matrix(THREE, "aba"), "a stands more than once in the matrix"),
        (entry(2, 1, np.nan), "the value of b and c is NaN or infinite: leave one of them out"),
        (entry(0, 1, -np.inf), "the value of a and b is NaN or infinite"),
        (entry(0, 2, 3), "the value of a and c differs with their order"),
        (entry(0, 2, "w", np.full((3, 3), "v")), "the value of a and c differs with their order"),
    ],
)
def test_matrix_without_pairs_is_refused_naming_the_models(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ms.pairs(wrong)
