import math
import re
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import modelsim as ms
from modelsim.attacks import mi_fgsm

ATTACKS = [
    pytest.param(partial(ms.pgd, steps=3), id="pgd"),
    pytest.param(ms.fgsm, id="fgsm"),
    pytest.param(partial(mi_fgsm, steps=3), id="mi_fgsm"),
]
every_attack = pytest.mark.parametrize("attack", ATTACKS)
LABELS = torch.tensor([0, 1, 2])


class Fixed(nn.Module):
    """Ignores its input but for the gradient, which is 0."""

    def forward(self, images):
        return torch.tensor([1.0, 0.0, 0.0]) + 0 * images.sum((1, 2, 3))[:, None]


class Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images):
        return self.output(images)


class FailsOnThirdCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = tiny.mlp(0)
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("out of order")
        return self.inside(images)


def sign_classifier():
    """Two classes on a canvas of 2 × 2: class 1 likes bright pixels where the weight is positive."""
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    classifier[1].weight.data = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 3.0, -0.5]])
    return classifier


@every_attack
def test_gradients_taken_in_parts_are_those_of_the_whole_batch(attack, monkeypatch):
    images, classifier = tiny.image_set(13), tiny.convolutional(3)
    expected = attack(classifier, images.images, images.labels)
    for at_a_time in (1, 5, 13):
        monkeypatch.setattr(ms.attacks, "_AT_A_TIME", at_a_time)
        torch.testing.assert_close(attack(classifier, images.images, images.labels), expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param(
            partial(ms.pgd, eps=0.1, steps=7, step_size=0.03, seed=11),
            ("PGD", dict(eps=0.1, steps=7, alpha=0.03)),
            id="pgd",
        ),
        pytest.param(partial(ms.fgsm, eps=0.1), ("FGSM", dict(eps=0.1)), id="fgsm"),
        pytest.param(
            partial(mi_fgsm, eps=0.1, steps=7, step_size=0.03, decay=0.8),
            ("MIFGSM", dict(eps=0.1, steps=7, alpha=0.03, decay=0.8)),
            id="mi_fgsm",
        ),
    ],
)
@pytest.mark.parametrize("make", [tiny.mlp, tiny.convolutional])
def test_attack_agrees_with_torchattacks_from_the_same_start(ours, theirs, make, images):
    torchattacks = pytest.importorskip("torchattacks", reason="pip alone can't install it beside the rest")
    classifier, (name, settings) = make(4).eval(), theirs
    result = ours(classifier, images.images, images.labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        expected = getattr(torchattacks, name)(classifier, **settings)(images.images, images.labels)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(partial(ms.pgd, steps=20, step_size=0.02), id="pgd"),
        pytest.param(ms.fgsm, id="fgsm"),
        pytest.param(partial(mi_fgsm, steps=20, step_size=0.02), id="mi_fgsm"),
    ],
)
@pytest.mark.parametrize(
    ("label", "expected"), [(1, [[0.4, 0.6], [0.85, 0.15]]), (0, [[0.6, 0.4], [1.0, 0.0]])]
)
def test_attack_on_a_linear_classifier_follows_the_signs_of_its_weights(attack, label, expected):
    images = torch.tensor([[[[0.5, 0.5], [0.95, 0.05]]]])
    result = attack(sign_classifier(), images, torch.tensor([label]), eps=0.1)
    torch.testing.assert_close(result, torch.tensor([[expected]]))


@pytest.mark.parametrize(("decay", "end"), [(0.1, 0.45), (1.0, 0.55), (2.0, 0.65)])
def test_momentum_weighs_the_first_gradient_against_one_that_has_turned(decay, end):
    def uphill_until_one_half(images):
        x = images.sum((1, 2, 3))
        return torch.stack([torch.zeros_like(x), torch.where(x < 0.5, 4 * x, 2.5 - x)], 1)

    images, labels = torch.full((1, 1, 1, 1), 0.45), torch.tensor([0])
    classifier = Returns(uphill_until_one_half)
    result = mi_fgsm(classifier, images, labels, eps=0.4, steps=2, step_size=0.1, decay=decay)
    assert result.item() == pytest.approx(end)


@given(
    seed=st.integers(0, 1000),
    eps=st.floats(0.001, 1.0),
    steps=st.integers(1, 6),
    step_size=st.floats(0.001, 2.0),
)
def test_adversarial_images_stay_in_the_ball_and_on_the_canvas(seed, eps, steps, step_size):
    images = tiny.image_set(6, seed=seed)
    classifier = tiny.mlp(seed)
    for result in (
        ms.pgd(
            classifier, images.images, images.labels, eps=eps, steps=steps, step_size=step_size, seed=seed
        ),
        mi_fgsm(classifier, images.images, images.labels, eps=eps, steps=steps, step_size=step_size),
        ms.fgsm(classifier, images.images, images.labels, eps=eps),
    ):
        assert (result - images.images).abs().max() <= eps + 1e-6
        assert result.min() >= 0
        assert result.max() <= 1


@every_attack
def test_caller_gets_back_everything_as_it_was(attack):
    images, classifier = tiny.image_set(), tiny.mlp(0)
    classifier.train()
    classifier[3].eval()
    classifier[1].weight.requires_grad_(False)
    classifier(images.images).sum().backward()
    before = [m.training for m in classifier.modules()]
    flags = [p.requires_grad for p in classifier.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in classifier.parameters()]
    attack(classifier, images.images, images.labels)
    assert [m.training for m in classifier.modules()] == before
    assert [p.requires_grad for p in classifier.parameters()] == flags == [False, True, True, True]
    for parameter, gradient in zip(classifier.parameters(), gradients, strict=True):
        assert (parameter.grad is None) if gradient is None else torch.equal(parameter.grad, gradient)
    untouched = tiny.image_set()
    assert torch.equal(images.images, untouched.images)
    assert torch.equal(images.labels, untouched.labels)
    assert not images.images.requires_grad
    assert images.images.grad is None


@pytest.mark.parametrize("attack", [ATTACKS[0], ATTACKS[2]])
def test_classifier_that_raises_in_the_middle_is_left_as_it_was(attack, images):
    classifier = FailsOnThirdCall().train()
    classifier.inside[1].eval()
    classifier.inside[1].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="RuntimeError: out of order"):
        attack(classifier, images.images, images.labels)
    assert [m.training for m in classifier.modules() if m is not classifier.inside[1]] == [True] * 6
    assert not classifier.inside[1].training
    assert [p.requires_grad for p in classifier.parameters()] == [True, False, True, True]


@every_attack
def test_classifier_is_attacked_in_evaluation_mode(attack, images):
    classifier = tiny.mlp(0)
    in_training, in_evaluation = (
        attack(classifier.train(mode), images.images, images.labels) for mode in (True, False)
    )
    assert torch.equal(in_training, in_evaluation)


def test_start_depends_on_the_seed_and_not_on_the_global_random_state(images):
    results = []
    for state, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        results.append(ms.pgd(Fixed(), images.images, images.labels, eps=0.2, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_final_iterate_is_returned_where_the_attack_failed(images):
    labels = torch.zeros_like(images.labels)
    result = ms.pgd(Fixed(), images.images, labels, eps=0.2, steps=4, seed=3)
    generator = torch.Generator().manual_seed(3)
    noise = torch.empty_like(images.images).uniform_(-0.2, 0.2, generator=generator)
    assert (Fixed()(result).argmax(1) == labels).all()
    assert torch.equal(result, (images.images + noise).clamp(0, 1))
    assert not torch.equal(result, images.images)


def with_pixel(value):
    images = tiny.image_set(3).images.clone()
    images[1, 0, 0, 0] = value
    return images


@every_attack
@pytest.mark.parametrize(
    ("images", "labels", "error", "culprit"),
    [
        (with_pixel(torch.nan), LABELS, ValueError, "1 image(s) contain NaN"),
        (with_pixel(1.5), LABELS, ValueError, "to 1.5"),
        (with_pixel(-0.5), LABELS, ValueError, "from -0.5"),
        (with_pixel(0).expand(3, 2, 8, 8), LABELS, ValueError, "(3, 2, 8, 8)"),
        (with_pixel(0).double(), LABELS, TypeError, "float64"),
        (with_pixel(0)[:0], LABELS[:0], ValueError, "empty"),
        (with_pixel(0), torch.tensor([0, 1, 3]), ValueError, "first is 3 at position 2"),
        (with_pixel(0), torch.tensor([0, -1, 2]), ValueError, "first is -1 at position 1"),
        (with_pixel(0), LABELS[:2], ValueError, "3 images, got shape (2,)"),
        (with_pixel(0), LABELS.int(), TypeError, "int32"),
    ],
)
def test_bad_images_and_labels_are_refused_naming_the_culprit(attack, images, labels, error, culprit):
    with pytest.raises(error, match=re.escape(culprit)):
        attack(tiny.linear(0), images, labels)


@every_attack
@pytest.mark.parametrize(
    ("output", "culprit"),
    [
        (lambda images: images, "got (1, 1, 8, 8)"),
        (lambda images: images.sum((1, 2, 3)), "got (1,)"),
        (lambda images: torch.zeros(len(images) + 1, 3), "got (2, 3)"),
        (lambda images: (images.flatten(1)[:, :3],), "got tuple"),
        (lambda images: images.flatten(1)[:, :3] * torch.nan, "NaN logits for 1 of 1 images"),
    ],
)
def test_classifier_that_returns_no_logits_is_refused(attack, output, culprit):
    images = tiny.image_set(3)
    with pytest.raises(ValueError, match=re.escape(culprit)):
        attack(Returns(output), images.images, images.labels)


@every_attack
def test_nan_logits_of_one_image_are_counted(attack):
    images = tiny.image_set(3)
    classifier = Returns(
        lambda x: torch.where(torch.arange(len(x))[:, None] == 1, torch.nan, x.flatten(1)[:, :3])
    )
    with pytest.raises(ValueError, match="NaN logits for 1 of 3 images"):
        attack(classifier, images.images, images.labels)


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (ms.pgd, "eps"),
        (ms.pgd, "step_size"),
        (ms.fgsm, "eps"),
        (mi_fgsm, "eps"),
        (mi_fgsm, "step_size"),
        (mi_fgsm, "decay"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_setting_that_is_not_positive_is_refused_by_name(attack, setting, value, images):
    with pytest.raises(ValueError, match=f"{setting} must be greater than 0, got {value}"):
        attack(tiny.linear(0), images.images, images.labels, **{setting: value})


@pytest.mark.parametrize(
    ("attack", "setting", "error", "message"),
    [
        (ms.pgd, dict(eps=math.inf), ValueError, "eps must be at most 1, got inf"),
        (ms.fgsm, dict(eps=8), ValueError, "eps must be at most 1, got 8"),
        (ms.pgd, dict(step_size=math.inf), ValueError, r"step_size must be at most 1.798e\+308, got inf"),
        (mi_fgsm, dict(decay=math.inf), ValueError, r"decay must be at most 1.798e\+308, got inf"),
        (ms.pgd, dict(eps="8/255"), TypeError, "eps must be a number, got '8/255'"),
        (ms.pgd, dict(steps=0), ValueError, "steps must be at least 1, got 0"),
        (mi_fgsm, dict(steps=-1), ValueError, "steps must be at least 1, got -1"),
        (ms.pgd, dict(steps=2.0), TypeError, "steps must be a whole number, got 2.0"),
        (ms.pgd, dict(seed=-1), ValueError, "seed must be at least 0, got -1"),
        (ms.pgd, dict(seed=None), TypeError, "seed must be a whole number, got None"),
        (ms.pgd, dict(seed=2**64), ValueError, r"seed must be less than 2\*\*63"),
    ],
)
def test_setting_out_of_range_is_refused_by_name(attack, setting, error, message, images):
    with pytest.raises(error, match=message):
        attack(tiny.linear(0), images.images, images.labels, **setting)


def test_seed_of_numpy_is_the_same_seed(images):
    one, other = (
        ms.pgd(tiny.linear(0), images.images, images.labels, seed=s, steps=1) for s in (3, np.int64(3))
    )
    assert torch.equal(one, other)


def test_network_that_keeps_what_it_computes_at_first_can_be_attacked():
    # ConViT computes its relative positions once; autograd refuses what torch's inference mode has made.
    classifier = ms.build("convit_base").eval()
    images = ms.fashion_mnist("test", n=10, seed=0)
    ms.accuracy(classifier, images)
    adversarial = ms.pgd(classifier, images.images, images.labels, steps=1)
    assert (adversarial != images.images).any()
