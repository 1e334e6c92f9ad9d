"""Attacks of one's own, and callers who have switched gradients off."""

from contextlib import nullcontext
from functools import cache, partial
from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
import torchattacks
from tiny import QUICK
from torch import nn
from torch.nn.functional import relu

import modelsim as ms
from modelsim import distillation
from modelsim.attacks import mi_fgsm
from modelsim.zoo import count_flops


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The study of one plain network."""
    return tiny.transfer(tmp_path_factory.mktemp("plain"), zoo={"plain": tiny.linear(2)}, attack=QUICK)


# Identity of an attack


def with_closure(eps):
    def attack(classifier, images, labels, *, seed=0):
        return ms.fgsm(classifier, images, labels, eps=eps)

    return attack


class Settings:
    """Settings as attributes, as torchattacks and foolbox have them."""

    def __init__(self, eps):
        self.eps = eps

    def __call__(self, classifier, images, labels):
        return ms.fgsm(classifier, images, labels, eps=self.eps)


HIDDEN = {
    "closure": with_closure(0.1),
    "partial of a closure": partial(with_closure(0.1), seed=3),
    "object": Settings(0.1),
    "method": Settings(0.1).__call__,
    "partial of an object": partial(Settings(0.1)),
    "by position": partial(ms.fgsm, tiny.linear(1)),
}


@pytest.mark.parametrize("attack", HIDDEN.values(), ids=HIDDEN)
def test_settings_that_cannot_be_seen_are_refused_with_advice(attack, plain, tmp_path):
    for use in (partial(tiny.transfer, tmp_path / "out"), partial(tiny.compare, plain, tiny.mlp(3))):
        with pytest.raises((ValueError, TypeError), match=r"functools\.partial|keyword parameter"):
            use(attack=attack)
    assert list(tmp_path.iterdir()) == []


SOURCE = """
EPS, SIZES, CONFIG, KINDS = 0.1, [1, 2], {"share": 1}, (1, 2)

def size_of(step):
    return EPS * step * SIZES[0] * CONFIG["share"] * KINDS[0]

def attack(classifier, images, labels, *, factor=1.0):
    shift = lambda x: x + 0
    is_known = factor in {"a", "b", "c"}
    return shift(ms.fgsm(classifier, images, labels, eps=factor * size_of(1)))
"""


def defined(source):
    """Define an attack from its source, as a notebook or another module would."""
    space = {"__name__": "mine", "ms": ms}
    exec(compile(source, "<cell>", "exec"), space)
    return space["attack"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a study by an attack of one's own, and the study."""
    folder = tmp_path_factory.mktemp("own")
    return folder, tiny.transfer(folder, attack=defined(SOURCE))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        pytest.param("eps=factor * ", "eps=", id="expression"),
        pytest.param("ms.fgsm", "ms.pgd", id="function called"),
        pytest.param("x + 0", "x + 0.01", id="number in a function inside"),
        pytest.param("x + 0", "x - 0", id="operator"),
        pytest.param("factor=1.0", "factor=0.9", id="default"),
        pytest.param('"c"}', '"d"}', id="set"),
        pytest.param("0.1, [", "0.2, [", id="number beside it"),
        pytest.param("* step", "/ step", id="function beside it"),
        pytest.param("[1, 2]", "[2, 2]", id="list beside it"),
        pytest.param("(1, 2)", "(2, 2)", id="tuple beside it"),
        pytest.param('"share": 1', '"share": 2', id="dictionary beside it"),
    ],
)
def test_attack_of_other_code_under_the_same_name_is_refused(before, now, own):
    folder, study = own
    assert SOURCE.count(before) == 1
    other = defined(SOURCE.replace(before, now))
    for use in (partial(tiny.transfer, folder), partial(tiny.compare, study, tiny.mlp(3), zoo=tiny.zoo())):
        with pytest.raises(ValueError, match="attack"):
            use(attack=other)


@pytest.mark.parametrize(
    "again",
    [
        defined(SOURCE),  # as when its cell is run again, or its module imported in another process
        defined("# a word\n\n" + SOURCE),
        partial(defined(SOURCE)),
        partial(partial(defined(SOURCE), factor=0.2), factor=1.0),
    ],
)
def test_attack_defined_anew_or_with_its_defaults_said_is_the_same(again, own):
    folder, study = own
    assert tiny.transfer(folder, attack=again).identical(study)
    tiny.compare(study, tiny.mlp(4), zoo=tiny.zoo(), attack=again)


# Attacks of one's own


def one_step(classifier, images, labels, *, size=0.1):
    """As in a tutorial: gradients everywhere, the mode as it comes."""
    images = images.clone().requires_grad_()
    nn.functional.cross_entropy(classifier(images), labels).backward()
    return (images + size * images.grad.sign()).clamp(0, 1)


def careless(classifier, images, labels, *, size=0.1):
    """Steps on the tensor that it is given, and leaves behind a mode and flags."""
    images.requires_grad_()
    nn.functional.cross_entropy(classifier(images), labels).backward()
    classifier.train().requires_grad_(True)
    return (images + size * images.grad.sign()).clamp(0, 1)


def writes(classifier, images, labels, *, size=0.1):
    """Changes the images, and for once the labels, that it is given."""
    images.copy_(one_step(classifier, images, labels, size=size).detach())
    labels.add_(1).remainder_(3)
    return images


def apgd(classifier, images, labels, *, eps=0.1, steps=3):
    return torchattacks.APGD(classifier, eps=eps, steps=steps)(images, labels)


def in_training_mode():
    """All in training mode, but for one layer; one weight fixed; one network with gradients from before."""
    zoo = tiny.zoo()
    for network in zoo.values():
        network.train()
    zoo["second"][3].eval()
    zoo["second"][1].bias.requires_grad_(False)
    zoo["first"](tiny.image_set().images).sum().backward()
    return zoo


def state(network):
    """Copy all of a network that an attack may change."""
    gradients = [None if p.grad is None else p.grad.tolist() for p in network.parameters()]
    values = {name: value.tolist() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    return values, gradients, modes, [p.requires_grad for p in network.parameters()]


@pytest.mark.parametrize("attack", [one_step, careless, writes, apgd])
def test_attack_of_ones_own_leaves_all_as_it_was_and_sees_evaluation_mode(attack, tmp_path):
    zoo, images, mine = in_training_mode(), tiny.image_set(), tiny.convolutional(5).train()
    everything = [*zoo.values(), mine]
    before = [state(network) for network in everything]
    whole = tiny.transfer(tmp_path / "whole", zoo=zoo | {"odd": mine}, images=images, attack=attack)
    part = tiny.transfer(tmp_path / "part", zoo=zoo, images=images, attack=attack)
    assert tiny.transfer(tmp_path / "part", zoo=zoo, images=images, attack=attack).identical(part)
    found = tiny.compare(part, mine, zoo=zoo, images=images, attack=attack)
    assert [state(network) for network in everything] == before
    assert images.fingerprint() == tiny.image_set().fingerprint()
    assert not images.images.requires_grad
    assert images.images.grad is None
    assert np.array_equal(found.clean_prediction, whole.clean_prediction)
    if attack is not apgd:  # which draws from torch's global random state
        assert tiny.same_predictions(found, whole)
        for name, network in tiny.zoo().items():
            batches = zip(images.images.split(5), images.labels.split(5), strict=True)
            made = torch.cat([one_step(network.eval(), x, y).detach() for x, y in batches])
            assert torch.equal(ms.adversarial_images(part, name, images), (made * 255).round() / 255)


def test_attack_of_ones_own_on_a_network_that_writes_into_its_input_is_refused_by_name(tmp_path):
    """Torch itself refuses that the tensor which takes the gradient is written into; we only say of whom."""
    images, zoo = tiny.image_set(), {"plain": tiny.linear(2), "odd": tiny.Odd(lambda x: x.sub_(0.1))}
    with pytest.raises(ValueError, match=r"^model 'odd': RuntimeError: .*in-place"):
        tiny.transfer(tmp_path, zoo=zoo, images=images, attack=one_step)
    assert images.fingerprint() == tiny.image_set().fingerprint()


# Gradients switched off or precision reduced around us, networks that write into what they are given


def transferred(network, images, *, out, attack=QUICK, **_):
    zoo = {"a": network, "b": tiny.linear(1)}
    made = tiny.transfer(out, zoo=zoo, images=images, test_images=images, attack=attack)
    return [made, ms.sat(made)]


def compared_with(network, images, *, out, **_):
    study = tiny.transfer(out, zoo={"a": network}, images=images, attack=QUICK)
    return [tiny.compare(study, tiny.mlp(3), zoo={"a": network}, images=images)]


def taught(network, images, **_):
    with torch.inference_mode(False):
        student = ms.Classifier(tiny.linear(1), input_size=8)
    recipe, teacher = (
        ms.Recipe(epochs=2, batch_size=6),
        ms.Teacher(distillation.teacher_logits(network, images)),
    )
    return list(ms.fit(student, images, teacher=teacher, recipe=recipe, progress=False).parameters())


def trained(network, images, **_):
    recipe = ms.Recipe(epochs=1, batch_size=12)
    with patch("modelsim.training.fashion_mnist", lambda part: images):
        return list(ms.train("resmlp_24_224", recipe=recipe, progress=False).parameters())


def attacked(attack):
    return lambda network, images, **_: [attack(network, images.images, images.labels)]


USES = {
    "transfer": transferred,
    "an attack of one's own": partial(transferred, attack=one_step),
    "compared": lambda network, images, plain, **_: [tiny.compare(plain, network, images=images)],
    "compared with": compared_with,
    "fit": taught,
    "train": trained,
    "pgd": attacked(partial(ms.pgd, steps=3)),
    "fgsm": attacked(ms.fgsm),
    "mi_fgsm": attacked(partial(mi_fgsm, steps=3)),
    "accuracy": lambda network, images, **_: [torch.tensor(ms.accuracy(network, images))],
    "flops": lambda network, images, **_: [torch.tensor(count_flops(network, (1, 8, 8)))],
}


def rectified():
    return tiny.Odd(lambda x: relu(x * 2 - 0.3), inside=tiny.convolutional(3))


def rectified_in_place():
    return tiny.Odd(lambda x: relu(x.mul_(2).sub_(0.3), inplace=True), inside=tiny.convolutional(3))


SITUATIONS = {
    "no_grad": (rectified, nullcontext, torch.no_grad),
    "inference_mode": (rectified, nullcontext, torch.inference_mode),
    "set_grad_enabled": (rectified, nullcontext, partial(torch.set_grad_enabled, False)),
    "made in inference mode": (rectified, torch.inference_mode, nullcontext),
    "made and used in inference mode": (rectified, torch.inference_mode, torch.inference_mode),
    "autocast": (rectified, nullcontext, partial(torch.autocast, "cpu", dtype=torch.bfloat16)),
    "a network that writes into its input": (rectified_in_place, nullcontext, nullcontext),
}
NOT_PROMISED = {
    ("fit", "autocast"),
    ("train", "autocast"),
    ("an attack of one's own", "a network that writes into its input"),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory, plain):
    """What each use of a network gives if nothing is the matter."""
    out = tmp_path_factory.mktemp
    return cache(lambda use: USES[use](rectified(), tiny.image_set(), out=out("expected"), plain=plain))


def switches():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("use", "what"), sorted({*product(USES, SITUATIONS)} - NOT_PROMISED))
def test_what_is_switched_off_or_written_into_makes_no_difference(use, what, expected, plain, tmp_path):
    make, makes, uses = SITUATIONS[what]
    with makes():
        network, images = make(), tiny.image_set()
    with uses():
        before = switches()
        found = USES[use](network, images, out=tmp_path, plain=plain)
        assert switches() == before
    assert images.fingerprint() == tiny.image_set().fingerprint()
    for one, other in zip(found, expected(use), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one.identical(other)
