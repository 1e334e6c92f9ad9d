import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny
import torch
from torch import nn

import modelsim as ms
from modelsim import study as stored
from modelsim.workers import sole_writer

TEST = tiny.image_set(30, seed=1)


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
        ({"zoo": {"first": tiny.zoo()["first"]}}, ValueError, "the study's 'second' .* give it in `zoo`"),
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
    twin = ms.compare(nn.Sequential(zoo[names[-1]]), whole, name="twin", progress=False)
    assert ms.neighbours(twin, "twin").index[0] == names[-1]
    score, (low, high) = ms.sat(twin).sel(model="twin"), ms.interval(twin).sel(model=names[-1])
    assert ((low <= score) & (score <= high)).all()


# Keeping the result


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What `transfer` makes of the first one, two and three models, with test images."""

    few = [dict(list(tiny.zoo().items())[:n]) for n in (1, 2, 3)]
    return [tiny.transfer(tmp_path_factory.mktemp("kept"), zoo=zoo, test_images=TEST) for zoo in few]


def keep(study, out, name="third", **changed):
    return compare(study, name, **({"test_images": TEST, "out": out} | changed))


@pytest.fixture
def attacked(monkeypatch):
    """The size of every batch that is attacked."""
    sizes = []
    monkeypatch.setattr(tiny.WATCHING, "watchers", [lambda network, n, seed: sizes.append(n)])
    return sizes


def test_kept_study_is_what_transfer_makes_of_all_and_goes_on_with(kept, two_and_three, attacked, tmp_path):
    two, three, extended = *kept[1:], keep(kept[1], tmp_path)
    assert extended.identical(three)
    assert keep(two, None).equals(extended.drop_dims("channel"))
    assert keep(two, tmp_path / "without", test_images=None).identical(two_and_three[1])
    expected = tiny.zoo()["third"].eval()(TEST.images).softmax(1).detach()
    np.testing.assert_allclose(extended.clean_probability.sel(target="third"), expected, atol=1e-4)
    attacked.clear()
    watch = dict(test_images=TEST, watcher=tiny.WATCHING.watchers[0])
    assert tiny.transfer(tmp_path, **watch).identical(three)
    assert attacked == []
    tiny.transfer(tmp_path, zoo=tiny.zoo() | {"fourth": tiny.linear(4)}, **watch)
    assert attacked == [5, 5, 2]


def test_newcomers_one_after_the_other_extend_one_folder_and_attack_only_themselves(kept, attacked, tmp_path):
    one, two, three = kept
    for _ in range(2):  # the second time, both are there
        second = keep(one, tmp_path, "second")
        assert second.identical(two)
        assert keep(second, tmp_path).identical(three)
        assert attacked == [5, 5, 2] * 2


@pytest.mark.parametrize("places", [slice(0, 7), [7, 2, 11, 0, 4, 9, 1, 8]])
def test_part_by_images_and_models_is_kept_as_a_study_of_that_part(kept, places, tmp_path):
    names, images = ["third", "first"], tiny.image_set()[np.arange(12)[places]]
    part = kept[2].sel(source=names, target=names).isel(image=places, test_image=slice(20))
    found = keep(part, tmp_path / "kept", "second")
    assert found.drop_dims("channel").equals(keep(part, None, "second"))
    assert found.perturbation.sel(source=names).equals(part.perturbation)
    if isinstance(places, slice):  # else its images came in other batches, with other random starts
        given = dict(zoo={name: tiny.zoo()[name] for name in (*names, "second")}, images=images)
        assert found.identical(tiny.transfer(tmp_path / "made", test_images=TEST[range(20)], **given))
    assert keep(found, tmp_path / "kept", "fourth", classifier=tiny.linear(4)).sizes["source"] == 4


@pytest.mark.parametrize(
    ("there", "now", "message"),
    [
        ({"zoo": {"other": tiny.linear(5)}}, {}, "models.other: .* there, absent now.* another folder"),
        ({"images": tiny.image_set(9)}, {}, "images_sha256: "),
        ({"test_images": TEST[range(20)]}, {}, "test_images_sha256: "),
        ({}, {"test_images": None}, "test_images: tiny there, absent now"),
    ],
)
def test_folder_of_another_study_is_refused_at_once(there, now, message, kept, attacked, tmp_path):
    watcher, zoo = tiny.WATCHING.watchers, {"first": tiny.zoo()["first"]}
    tiny.transfer(tmp_path / "there", **({"zoo": zoo, "test_images": TEST} | there))
    before, tiny.WATCHING.watchers = tiny.files(tmp_path / "there"), watcher
    with pytest.raises(ValueError, match=f"was made with other settings .*{message}") as refused:
        keep(kept[1], tmp_path / "there", **now)
    assert "delete" not in str(refused.value)
    with sole_writer(tmp_path / "held"), pytest.raises(BlockingIOError, match="is being written by process"):
        keep(kept[1], tmp_path / "held")
    assert (attacked, tiny.files(tmp_path / "there")) == ([], before)


@pytest.mark.parametrize("at", [(stored, "_add", 7), (Path, "rename", 0), (Path, "rename", 1)])
def test_killed_while_it_writes_the_old_study_is_whole_and_the_next_call_writes_it(at, kept, tmp_path):
    one, two, three = kept
    keep(one, tmp_path, "second")
    with tiny.killed_at(*at):
        keep(ms.open_study(tmp_path), tmp_path)
    old = ms.open_study(tmp_path)
    assert old.identical(two)
    assert keep(old, tmp_path).identical(three)
    opened = ms.open_study(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="perturbations of first are gone"):
        ms.adversarial_images(opened, "first", tiny.image_set())


def small(name, size=32, **settings):
    return ms.Classifier(timm.create_model(name, **({"in_chans": 1} | settings)), input_size=size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small("test_resnet", num_classes=0), r"classes, .* \(does it return features"),
        (lambda: small("test_resnet", features_only=True), r"logits of shape \(8, class\), got list"),
        (lambda: small("test_vit", 60, num_classes=3), r"height \(60\) .*input_size of Classifier"),
        (lambda: small("test_resnet", in_chans=3, num_classes=3), "to have 3 channels.* repeat channels"),
        (
            lambda: tiny.Odd(after=lambda logits: logits.roll(1, 1)),
            "another order of classes, or nothing learned",
        ),
        (lambda: small("test_resnet", num_classes=3), "its scores say little"),
    ],
)
def test_network_that_is_not_ready_is_refused_or_warned_of_in_one_line(make, message, two_and_three):
    torch.manual_seed(0)
    with pytest.raises((TypeError, ValueError, UserWarning)) as said:
        compare(two_and_three[0], classifier=make())
    assert re.fullmatch(rf"model 'third': .*{message}.*", str(said.value))


def blind(classifier, images, labels, *, eps=0.1):
    return images + eps * torch.autograd.grad(classifier(images).sum(), images)[0].sign()


def test_stranger_of_the_study_is_asked_for_and_an_attack_without_gradient_named(kept, tmp_path):
    zoo = {name: tiny.zoo()[name] for name in ("first", "second")}
    with pytest.raises(ValueError, match="the study's 'third' isn't the book's: give it in `zoo`, or leave"):
        keep(kept[2], None, "fourth", zoo=zoo, classifier=tiny.linear(4))
    with pytest.raises(ValueError, match=r"model 'first': the attack blind .* images\.requires_grad_"):
        tiny.transfer(tmp_path, attack=blind)
    with pytest.raises(ValueError, match=r"not the study's test images \(tiny\): give `test_images`"):
        keep(kept[1], None, test_images=tiny.image_set(30, seed=2))


def test_many_changed_models_are_told_in_a_short_message():
    before, now = ({f"models.model{i:02d}": digit * 64 for i in range(69)} for digit in "ab")
    told = stored.setting_differences(before | {"images_sha256": "c" * 64}, now)
    first = [f"models.model0{i}: aaaaaaaa… there, bbbbbbbb… now" for i in range(3)]
    assert told == ["images_sha256: cccccccc… there, absent now", *first, "and 66 models more"]
