import math
import re
from contextlib import nullcontext
from functools import cache, partial

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import modelsim as ms
from modelsim.attacks import mi_fgsm

every_attack = pytest.mark.parametrize(
    "attack", [partial(ms.pgd, steps=3), ms.fgsm, partial(mi_fgsm, steps=3)], ids=["pgd", "fgsm", "mi_fgsm"]
)


class Odd(nn.Module):
    """Returns what a function makes of the logits inside, or of the images."""

    def __init__(self, output, inside=None):
        super().__init__()
        self.output, self.inside = output, inside or nn.Identity()

    def forward(self, images):
        return self.output(self.inside(images))


@every_attack
def test_gradients_taken_in_parts_are_those_of_the_whole_batch(attack, monkeypatch):
    images, classifier = tiny.image_set(13), tiny.convolutional(3)
    expected = attack(classifier, images.images, images.labels)
    for at_a_time in (1, 5, 13):
        monkeypatch.setattr(ms.attacks, "AT_A_TIME", at_a_time)
        torch.testing.assert_close(attack(classifier, images.images, images.labels), expected)


def test_gradients_of_photographs_are_taken_of_a_few_together_on_a_processor():
    asked = []
    network = tiny.Odd(lambda x: asked.append(len(x)) or x, inside=tiny.linear(0, pixels=3 * 224**2))
    ms.attacks.input_gradients(network, torch.rand(12, 3, 224, 224), torch.zeros(12).long())
    assert asked == [5, 5, 2]
    at_a_time = ms.attacks.gradients_at_a_time
    assert [at_a_time("cpu", 28 * 28), at_a_time("cpu", 2000**2), at_a_time("cuda", 224**2)] == [125, 1, 125]


class Small(tiny.Odd):
    """A network that finds no memory for more than some images, as on a GPU."""

    def __init__(self, most, **options):
        self.asked = []
        super().__init__(lambda x: x if self.note(len(x)) <= most else self.fail(), **options)

    def note(self, n):
        self.asked.append(n)
        return n

    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@every_attack
def test_fewer_images_are_taken_together_when_memory_runs_out_and_the_result_is_the_same(attack):
    images, small = tiny.image_set(30), Small(10, inside=tiny.convolutional(3))
    made = attack(small, images.images, images.labels)
    torch.testing.assert_close(made, attack(small.inside, images.images, images.labels))
    told = ms.attacks.logits(small, images.images, batch_size=30)
    torch.testing.assert_close(told, ms.attacks.logits(small.inside, images.images))
    # That 30 and 15 are too many is found out once for gradients, and once for logits.
    assert sorted(n for n in small.asked if n > 10) == [15, 15, 30, 30]
    assert set(small.asked) <= {1, 2, 7, 15, 30}


def test_network_for_which_memory_never_suffices_is_named(tmp_path):
    zoo, message = {"first": tiny.linear(1), "huge": Small(0)}, "model 'huge': .*out of memory"
    with pytest.raises(ValueError, match=message):
        tiny.transfer(tmp_path, zoo=zoo)
    with pytest.raises(ValueError, match="memory doesn't suffice for a single image: CUDA out of memory"):
        ms.attacks.logits(Small(0), tiny.image_set().images)


@pytest.mark.filterwarnings("ignore:model")
def test_study_of_a_network_that_finds_little_memory_is_that_of_the_network(tmp_path):
    network = tiny.convolutional(3)
    studies = [
        tiny.transfer(tmp_path / str(i), zoo={"a": one}, images=tiny.image_set(30), batch_size=20, fold=False)
        for i, one in enumerate((network, Small(8, inside=network)))
    ]
    assert tiny.same_predictions(*studies)
    assert studies[0].perturbation.equals(studies[1].perturbation)


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (partial(ms.pgd, steps=7, step_size=0.03, seed=11), "PGD", dict(steps=7, alpha=0.03)),
        (ms.fgsm, "FGSM", {}),
        (partial(mi_fgsm, step_size=0.03, decay=0.8), "MIFGSM", dict(steps=10, alpha=0.03, decay=0.8)),
    ],
    ids=["pgd", "fgsm", "mi_fgsm"],
)
@pytest.mark.parametrize("make", [tiny.mlp, tiny.convolutional])
def test_attack_agrees_with_torchattacks_from_the_same_start(ours, theirs, settings, make, images):
    torchattacks = pytest.importorskip("torchattacks", reason="pip alone can't install it beside the rest")
    classifier = make(4).eval()
    result = ours(classifier, images.images, images.labels, eps=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        peer = getattr(torchattacks, theirs)(classifier, eps=0.1, **settings)
        torch.testing.assert_close(result, peer(images.images, images.labels), rtol=0, atol=1e-6)


@every_attack
@pytest.mark.parametrize("label", [0, 1])
def test_attack_on_a_linear_classifier_follows_the_signs_of_its_weights(attack, label):
    weights, image = torch.tensor([[1.0, -2.0], [3.0, -0.5]]), torch.tensor([[[[0.5, 0.5], [0.995, 0.005]]]])
    classifier = Odd(lambda x: torch.stack([torch.zeros(len(x)), (x[:, 0] * weights).sum((1, 2))], 1))
    result = attack(classifier, image, torch.tensor([label]), eps=3 / 255)
    change = (1 - 2 * label) * 3 / 255 * weights.sign()
    torch.testing.assert_close(result, (image + change).clamp(0, 1))


@given(st.integers(0, 1000), st.floats(0.001, 1.0), st.integers(1, 6), st.floats(0.001, 2.0))
def test_adversarial_images_stay_in_the_ball_and_on_the_canvas(seed, eps, steps, step_size):
    images, classifier = tiny.image_set(6, seed=seed), tiny.mlp(seed)
    settings = dict(steps=steps, step_size=step_size)
    for attack in (partial(ms.pgd, seed=seed, **settings), partial(mi_fgsm, **settings), ms.fgsm):
        result = attack(classifier, images.images, images.labels, eps=eps)
        assert (result - images.images).abs().max() <= eps + 1e-6
        assert result.min() >= 0
        assert result.max() <= 1


def state(classifier):
    """Copy all that an attack could leave changed in a classifier."""
    gradients = [None if p.grad is None else p.grad.tolist() for p in classifier.parameters()]
    modes = [module.training for module in classifier.modules()]
    return modes, [p.requires_grad for p in classifier.parameters()], gradients


@every_attack
@pytest.mark.parametrize("fails", [False, True])
def test_classifier_is_attacked_in_evaluation_mode_and_all_is_left_as_it_was(attack, fails, images):
    def output(logits):
        if fails and logits.requires_grad:
            raise RuntimeError("out of order")
        return logits

    classifier = Odd(output, tiny.mlp(0)).train()
    classifier.inside[1].eval().weight.requires_grad_(False)
    classifier.inside(tiny.image_set().images).sum().backward()
    before = state(classifier)
    assert before[:2] == ([True, True, True, False, True, True, True], [False, True, True, True])
    with pytest.raises(ValueError, match="RuntimeError: out of order") if fails else nullcontext():
        result = attack(classifier, images.images, images.labels)
        assert torch.equal(result, attack(tiny.mlp(0).eval(), images.images, images.labels))
    assert state(classifier) == before
    assert images.fingerprint() == tiny.image_set().fingerprint()
    assert not images.images.requires_grad
    assert images.images.grad is None


def fixed(images):
    """Ignore the images but for the gradient, which is 0."""
    return torch.tensor([1.0, 0.0, 0.0]) + 0 * images.sum((1, 2, 3))[:, None]


@pytest.mark.parametrize("seed", [0, 3, np.int64(3)])
def test_final_iterate_of_a_failed_attack_is_its_start_which_depends_on_the_seed_alone(seed, images):
    generator = torch.Generator().manual_seed(int(seed))
    noise = torch.empty_like(images.images).uniform_(-0.2, 0.2, generator=generator)
    for global_seed in (1, 2):
        before = torch.manual_seed(global_seed).get_state()
        labels = torch.zeros_like(images.labels)
        result = ms.pgd(Odd(fixed), images.images, labels, eps=0.2, steps=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(result, (images.images + noise).clamp(0, 1))
        assert not torch.equal(result, images.images)


def with_pixel(value):
    images = tiny.image_set(3).images.clone()
    images[1, 0, 0, 0] = value
    return images


def nan_for_one(images):
    return torch.where(torch.arange(len(images))[:, None] == 1, torch.nan, images.flatten(1)[:, :3])


@every_attack
@pytest.mark.parametrize(
    ("given", "error", "culprit"),
    [
        (dict(images=with_pixel(torch.nan)), ValueError, "1 image(s) contain NaN"),
        (dict(images=with_pixel(0)[:0]), ValueError, "empty"),
        (dict(labels=torch.tensor([0, 1, 3])), ValueError, "first is 3 at position 2"),
        (dict(labels=torch.tensor([0, 1])), ValueError, "3 images, got shape (2,)"),
        (dict(classifier=Odd(lambda x: x)), ValueError, "got (1, 1, 8, 8)"),
        (dict(classifier=Odd(lambda x: x.flatten(1) * torch.nan)), ValueError, "NaN logits for 1 of 1"),
        (dict(classifier=Odd(nan_for_one)), ValueError, "NaN logits for 1 of 3 images"),
    ],
)
def test_what_can_not_be_attacked_is_refused_naming_the_culprit(attack, given, error, culprit):
    usual = dict(classifier=tiny.linear(0), images=with_pixel(0), labels=torch.tensor([0, 1, 2]))
    with pytest.raises(error, match=re.escape(culprit)):
        attack(**usual | given)


@pytest.mark.parametrize(
    ("attack", "setting", "value", "error", "message"),
    [
        (ms.pgd, "eps", 0, ValueError, "must be greater than 0, got 0"),
        (ms.pgd, "eps", math.nan, ValueError, "must be greater than 0, got nan"),
        (ms.pgd, "eps", math.inf, ValueError, "must be at most 1, got inf"),
        (ms.fgsm, "eps", 8, ValueError, "must be at most 1, got 8"),
        (mi_fgsm, "eps", -1, ValueError, "must be greater than 0, got -1"),
        *(
            (attack, "step_size", 0, ValueError, "must be greater than 0, got 0")
            for attack in (ms.pgd, mi_fgsm)
        ),
        (ms.pgd, "step_size", math.inf, ValueError, "must be at most 1.798e+308, got inf"),
        (mi_fgsm, "decay", math.nan, ValueError, "must be greater than 0, got nan"),
        (ms.pgd, "eps", "8/255", TypeError, "must be a number, got '8/255'"),
        (ms.pgd, "steps", 0, ValueError, "must be at least 1, got 0"),
        (mi_fgsm, "steps", -1, ValueError, "must be at least 1, got -1"),
        (ms.pgd, "steps", 2.0, TypeError, "must be a whole number, got 2.0"),
        (ms.pgd, "seed", -1, ValueError, "must be at least 0, got -1"),
        (ms.pgd, "seed", None, TypeError, "must be a whole number, got None"),
        (ms.pgd, "seed", 2**64, ValueError, "must be less than 2**63"),
    ],
)
def test_setting_out_of_range_is_refused_by_name(attack, setting, value, error, message, images):
    with pytest.raises(error, match=re.escape(f"{setting} {message}")):
        attack(tiny.linear(0), images.images, images.labels, **{setting: value})


def test_network_that_keeps_what_it_computes_at_first_can_be_attacked(images):
    # As ConViT its relative positions; autograd refuses what torch's inference mode has made.
    kept = cache(lambda: torch.ones(1, 3))
    classifier = Odd(lambda logits: logits * kept(), tiny.linear(0))
    ms.accuracy(classifier, images)
    adversarial = ms.pgd(classifier, images.images, images.labels, steps=1)
    assert (adversarial != images.images).any()
