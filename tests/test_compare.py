from functools import partial

import numpy as np
import pytest
import tiny

import modelsim as ms


@pytest.fixture(scope="module")
def two_and_three(tmp_path_factory):
    """A study of two models, and one of all three."""
    few = {name: tiny.zoo()[name] for name in ("first", "second")}
    folder = tmp_path_factory.mktemp("compare")
    return tiny.transfer(folder / "two", zoo=few), tiny.transfer(folder / "three")


def compare(study, name="third", **changed):
    given = dict(classifier=tiny.zoo().get(name), name=name, zoo=tiny.zoo(), attack=tiny.attack)
    return tiny.compare(study, **(given | changed))


def test_compared_classifier_has_the_row_and_column_that_a_study_of_all_gives_it(two_and_three):
    two, three = two_and_three
    before = two.copy(deep=True)
    extended = compare(two)
    assert two.identical(before)
    for name in ("adversarial_prediction", "clean_prediction", "label", "images_without_gradient"):
        assert extended[name].equals(three[name])
        assert extended[name].dtype == three[name].dtype
    assert extended.model_sha256.equals(three.model_sha256)
    assert ms.sat(extended).equals(ms.sat(three))
    one = two.sel(source=["first"], target=["first"])
    one_after_the_other = compare(compare(one, "second").assign(perturbation=two.perturbation))
    assert tiny.same_predictions(one_after_the_other, three)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"name": "first"}, ValueError, "'first' is a model of the study already"),
        ({"name": ""}, ValueError, "names of models .* got ''"),
        ({"name": 7}, TypeError, "names of models .* got 7"),
        ({"images": tiny.image_set(seed=5)}, ValueError, "these are not the images of the study"),
        ({"images": None}, ValueError, r"not the images of the study \(tiny\): 12 of 12 .* give `images`"),
        ({"attack": None}, ValueError, "the study's attack is tiny.attack: give it"),
        (
            {"attack": partial(tiny.attack, steps=4)},
            ValueError,
            r"the attack is not the one of the study \(attack_settings: .*3} there, .*4} now\)",
        ),
        ({"zoo": tiny.zoo() | {"second": tiny.mlp(9)}}, ValueError, "'second' of the zoo is not the one in"),
        ({"zoo": {"first": tiny.zoo()["first"]}}, ValueError, "'second' of the study .* give it in `zoo`"),
        ({"classifier": tiny.linear(0, n_classes=4)}, ValueError, "model 'third': it has 4 classes"),
    ],
)
def test_bad_input_is_named(changed, error, message, two_and_three):
    with pytest.raises(error, match=message):
        compare(two_and_three[0], **({"classifier": tiny.linear(0)} | changed))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda study: study.sel(source=["first"]), "1 sources and 2 targets"),
        (lambda study: study.drop_vars("perturbation"), "the study was made without perturbations"),
    ],
)
def test_study_that_cannot_be_compared_with_is_refused(spoil, message, two_and_three):
    with pytest.raises(ValueError, match=message):
        compare(spoil(two_and_three[0]))


def test_ordinary_networks_are_measured_without_a_word_and_found_by_compare_by_themselves(tmp_path):
    """Convolutional and without, folded and not, with every normalisation: as they ship with the book."""
    names = [
        "resnet50_gn",
        "nf_resnet50",
        "deit_small_patch16_224",
        "resmlp_24_224",
        "convnext_tiny",
        "resnet50",
    ]
    images, attack = ms.fashion_mnist("test", n=30, seed=3), partial(ms.pgd, steps=2, step_size=8 / 255)
    zoo = ms.load_zoo(names=names)
    whole = ms.transfer(zoo, images, attack, tmp_path, progress=False)
    assert ms.white_box_success(whole).min() > 0.1
    assert (whole.images_without_gradient == 0).all()
    few = whole.sel(source=names[:-1], target=names[:-1])
    found = ms.compare(zoo[names[-1]], few, name=names[-1], progress=False)
    assert np.array_equal(found.adversarial_prediction, whole.adversarial_prediction)
