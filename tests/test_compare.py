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


def compare(study, classifier=None, **changed):
    classifier = tiny.zoo()["third"] if classifier is None else classifier
    given = dict(
        name="third",
        images=tiny.image_set(),
        zoo=tiny.zoo(),
        attack=tiny.attack,
        device="cpu",
        progress=False,
    )
    return ms.compare(classifier, study, **(given | changed))


def test_compared_classifier_has_the_row_and_column_that_a_study_of_all_gives_it(two_and_three):
    two, three = two_and_three
    extended = compare(two)
    for name in ("adversarial_prediction", "clean_prediction", "label"):
        assert extended[name].equals(three[name])
        assert extended[name].dtype == three[name].dtype
    assert ms.sat(extended).equals(ms.sat(three))


def test_the_study_stays_as_it_was(two_and_three):
    two, _ = two_and_three
    before = two.copy(deep=True)
    compare(two)
    assert two.identical(before)


def test_part_of_a_study_gives_that_part_of_the_row(two_and_three):
    two, three = two_and_three
    extended = compare(two.sel(source=["second"], target=["second"]))
    names = ["second", "third"]
    expected = three.adversarial_prediction.sel(source=names, target=names)
    assert np.array_equal(extended.adversarial_prediction, expected)


def test_several_classifiers_one_after_the_other_give_the_whole_study(two_and_three):
    two, three = two_and_three
    one = two.sel(source=["first"], target=["first"])
    by_itself = compare(one, tiny.zoo()["second"], name="second")
    assert np.array_equal(
        by_itself.adversarial_prediction,
        three.adversarial_prediction.sel(source=["first", "second"], target=["first", "second"]),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "first"}, "'first' is a model of the study already"),
        ({"images": tiny.image_set(seed=5)}, "these are not the images of the study"),
        ({"images": None}, r"these are not the images of the study \(tiny\): 12 of 12 .* give `images`"),
        ({"attack": None}, "the study's attack is tiny.attack: give it"),
        (
            {"attack": partial(tiny.attack, steps=4)},
            r"the attack is not the one of the study \(attack_settings: .*3} there, .*4} now\)",
        ),
        ({"zoo": tiny.zoo() | {"second": tiny.mlp(9)}}, "'second' of the zoo is not the one in the study"),
        ({"zoo": {"first": tiny.zoo()["first"]}}, "unknown model 'second'"),
        ({"classifier": tiny.linear(0, n_classes=4)}, "model 'third': it has 4 classes"),
    ],
)
def test_bad_input_is_named(changed, message, two_and_three):
    with pytest.raises(ValueError, match=message):
        compare(two_and_three[0], **changed)


def test_sources_and_targets_must_be_the_same(two_and_three):
    with pytest.raises(ValueError, match="1 sources and 2 targets"):
        compare(two_and_three[0].sel(source=["first"]))


def test_models_images_and_attack_of_the_book_are_found_by_themselves(tmp_path):
    names, images = ["resnet50", "seresnet50"], ms.fashion_mnist("test", n=20, seed=3)
    attack, zoo = partial(ms.pgd, steps=2), ms.load_zoo(names=names)
    one = ms.transfer({names[0]: zoo[names[0]]}, images, attack, tmp_path / "one", progress=False)
    both = ms.transfer(zoo, images, attack, tmp_path / "both", progress=False)
    extended = ms.compare(zoo[names[1]], one, name=names[1], progress=False)
    assert np.array_equal(extended.adversarial_prediction, both.adversarial_prediction)
