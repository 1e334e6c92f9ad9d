"""Attacks of one's own, networks without a gradient, and callers who have switched gradients off."""

import warnings
from functools import partial

import numpy as np
import pytest
import tiny
import torch
import torchattacks
from torch import nn

import modelsim as ms
from modelsim import distillation, training
from modelsim.attacks import mi_fgsm
from modelsim.zoo import count_flops

REFUSALS = (ValueError, TypeError)
QUICK = partial(ms.pgd, eps=0.15, steps=3, step_size=0.1)


class Odd(nn.Module):
    def __init__(self, before=None, after=None, inside=None):
        super().__init__()
        self.inside = tiny.linear(1) if inside is None else inside
        self.before, self.after = before or (lambda x: x), after or (lambda logits: logits)

    def forward(self, x):
        return self.after(self.inside(self.before(x)))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study of one plain network on 40 images."""
    folder = tmp_path_factory.mktemp("plain")
    return tiny.transfer(folder, zoo={"plain": tiny.linear(2)}, images=tiny.image_set(40), attack=QUICK)


@pytest.fixture(params=["transfer", "compare"])
def measure(request, study, tmp_path):
    """Measure an odd network beside a plain one on 40 images, in one of the two ways."""
    given = dict(images=tiny.image_set(40), attack=QUICK)

    def measured(odd, **changed):
        if request.param == "transfer":
            zoo = {"plain": tiny.linear(2), "odd": odd}
            return tiny.transfer(tmp_path / "out", zoo=zoo, **(given | changed))
        zoo = {"plain": tiny.linear(2)}
        options = dict(name="odd", zoo=zoo, device="cpu", progress=False)
        return ms.compare(odd, study, **(options | given | changed))

    return measured


def said_of(caught, name):
    return [str(w.message) for w in caught if str(w.message).startswith(f"model {name!r}")]


# Identity of an attack


def with_closure(eps):
    def attack(classifier, images, labels):
        return ms.fgsm(classifier, images, labels, eps=eps)

    return attack


def with_closure_in_a_list(*settings):
    def attack(classifier, images, labels, *, seed=0):
        return ms.fgsm(classifier, images, labels, eps=settings[0])

    return attack


ADVICE = r"functools\.partial|keyword parameter"


class Callable:
    """Settings as attributes, as torchattacks and foolbox have them."""

    def __init__(self, eps):
        self.eps = eps

    def __call__(self, classifier, images, labels):
        return ms.fgsm(classifier, images, labels, eps=self.eps)

    def run(self, classifier, images, labels):
        return ms.fgsm(classifier, images, labels, eps=self.eps)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(with_closure, id="closure"),
        pytest.param(with_closure_in_a_list, id="list in a closure"),
        pytest.param(lambda eps: partial(with_closure_in_a_list(eps), seed=3), id="partial of a closure"),
        pytest.param(Callable, id="object"),
        pytest.param(lambda eps: Callable(eps).run, id="method"),
        pytest.param(lambda eps: partial(Callable(eps)), id="partial of an object"),
        pytest.param(lambda eps: lambda c, x, y: ms.fgsm(c, x, y, eps=eps), id="lambda"),
    ],
)
def test_settings_that_cannot_be_seen_are_refused_with_advice(make, study, tmp_path):
    with pytest.raises(REFUSALS, match=ADVICE):
        tiny.transfer(tmp_path / "out", attack=make(0.1))
    assert not list(tmp_path.rglob("*zarr*"))
    with pytest.raises(REFUSALS, match=ADVICE):
        ms.compare(
            tiny.mlp(3),
            study,
            images=tiny.image_set(40),
            zoo={"plain": tiny.linear(2)},
            attack=make(0.1),
            progress=False,
        )


def defined(source, name="attack", **around):
    """Define an attack from its source, as a notebook or another module would."""
    space = {"__name__": "mine", "ms": ms, "torch": torch, **around}
    exec(compile(source, "<cell>", "exec"), space)
    return space[name]


ATTACK = """
def attack(classifier, images, labels, *, eps=0.1):
    shift = lambda x: x + 0
    return shift(ms.fgsm(classifier, images, labels, eps=eps))
"""


@pytest.mark.parametrize(
    ("before", "now"),
    [
        pytest.param("eps=eps)", "eps=eps / 2)", id="expression"),
        pytest.param("ms.fgsm", "ms.pgd", id="function called"),
        pytest.param("x + 0", "x + 0.01", id="number in a function inside"),
        pytest.param("x + 0", "x - 0", id="operator"),
    ],
)
def test_attack_of_other_code_under_the_same_name_is_refused(before, now, tmp_path):
    zoo = {"plain": tiny.linear(2), "first": tiny.linear(1)}
    study = tiny.transfer(tmp_path, zoo=zoo, attack=defined(ATTACK))
    other = defined(ATTACK.replace(before, now))
    with pytest.raises(REFUSALS, match="attack"):
        tiny.transfer(tmp_path, zoo=zoo, attack=other)
    with pytest.raises(REFUSALS, match="attack"):
        ms.compare(tiny.mlp(3), study, images=tiny.image_set(), zoo=zoo, attack=other, progress=False)


AROUND = """
{setting}

def size_of(step):
    return {size}

def attack(classifier, images, labels):
    return ms.fgsm(classifier, images, labels, eps=size_of(1))
"""


@pytest.mark.parametrize(
    ("setting", "size", "changed"),
    [
        pytest.param("EPS = 0.1", "EPS", {"setting": "EPS = 0.2"}, id="number"),
        pytest.param("EPS = 0.1", "EPS", {"size": "EPS / 2"}, id="function"),
        pytest.param("SIZES = (0.1, 0.2)", "SIZES[0]", {"setting": "SIZES = (0.2, 0.2)"}, id="tuple"),
        pytest.param("SIZES = [0.1, 0.2]", "SIZES[0]", {"setting": "SIZES = [0.2, 0.2]"}, id="list"),
        pytest.param(
            "CONFIG = {'eps': 0.1}", "CONFIG['eps']", {"setting": "CONFIG = {'eps': 0.2}"}, id="dict"
        ),
    ],
)
def test_settings_that_stand_beside_an_attack_in_its_module_count_or_are_refused(
    setting, size, changed, tmp_path
):
    given = dict(setting=setting, size=size)
    one, other = (defined(AROUND.format(**which)) for which in (given, given | changed))
    try:
        made = tiny.transfer(tmp_path, attack=one)
    except REFUSALS as error:
        assert "attack" in str(error)  # noqa: PT017
    else:
        assert tiny.transfer(tmp_path, attack=one).identical(made)
        with pytest.raises(REFUSALS, match="attack"):
            tiny.transfer(tmp_path, attack=other)


def test_two_lambdas_are_two_attacks(tmp_path):
    tiny.transfer(tmp_path, attack=lambda c, x, y: ms.fgsm(c, x, y, eps=0.1))
    with pytest.raises(REFUSALS, match="attack"):
        tiny.transfer(tmp_path, attack=lambda c, x, y: ms.fgsm(c, x, y, eps=0.2))


def test_attack_defined_anew_is_the_same_attack(tmp_path):
    """As when its cell is run again, its module imported in another process, or lines were added above it."""
    made = tiny.transfer(tmp_path, attack=defined(ATTACK))
    for again in (ATTACK, "\n\n" + ATTACK, "# a word\n" + ATTACK):
        assert tiny.transfer(tmp_path, attack=defined(again)).identical(made)
    zoo = tiny.zoo()
    ms.compare(tiny.mlp(4), made, images=tiny.image_set(), zoo=zoo, attack=defined(ATTACK), progress=False)


@pytest.mark.parametrize("wrap", [partial, lambda attack: partial(partial(attack, eps=0.2), eps=0.1)])
def test_partial_that_says_the_default_is_the_same_attack(wrap, tmp_path):
    made = tiny.transfer(tmp_path, attack=defined(ATTACK))
    assert tiny.transfer(tmp_path, attack=wrap(defined(ATTACK))).identical(made)


# Attacks of one's own


def one_step(classifier, images, labels, *, size=0.1):
    """As in a tutorial: gradients everywhere, the mode as it comes."""
    images = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(classifier(images), labels)
    loss.backward()
    return (images + size * images.grad.sign()).clamp(0, 1)


def steps_on_the_given_tensor(classifier, images, labels, *, size=0.1):
    images.requires_grad_()
    nn.functional.cross_entropy(classifier(images), labels).backward()
    return (images + size * images.grad.sign()).clamp(0, 1)


def careless(classifier, images, labels, *, size=0.1):
    """Leaves behind a mode and flags."""
    changed = one_step(classifier, images, labels, size=size)
    classifier.train().requires_grad_(True)
    return changed


def writes(classifier, images, labels, *, size=0.1):
    """Changes the images, and for once the labels, that it is given."""
    changed = one_step(classifier, images, labels, size=size)
    images.copy_(changed.detach())
    labels.add_(1).remainder_(3)
    return images


def apgd(classifier, images, labels, *, eps=0.1, steps=3):
    return torchattacks.APGD(classifier, eps=eps, steps=steps)(images, labels)


OWN = [one_step, steps_on_the_given_tensor, careless, writes, apgd]
own_attacks = pytest.mark.parametrize("attack", OWN, ids=lambda attack: attack.__name__)


def in_training_mode():
    zoo = {"first": tiny.linear(1), "third": tiny.convolutional(3), "second": tiny.mlp(2)}
    for network in zoo.values():
        network.train()
    return zoo


@own_attacks
def test_attack_of_ones_own_leaves_networks_and_images_as_they_were(attack, tmp_path):
    zoo, images = in_training_mode(), tiny.image_set()
    zoo["second"][3].eval()
    zoo["second"][1].bias.requires_grad_(False)
    before = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in zoo.items()}
    modes = {name: [m.training for m in net.modules()] for name, net in zoo.items()}
    flags = {name: [p.requires_grad for p in net.parameters()] for name, net in zoo.items()}
    made = tiny.transfer(tmp_path, zoo=zoo, images=images, attack=attack)
    for name, network in zoo.items():
        assert all(torch.equal(v, before[name][k]) for k, v in network.state_dict().items()), name
        assert [m.training for m in network.modules()] == modes[name]
        assert [p.requires_grad for p in network.parameters()] == flags[name]
        assert all(p.grad is None for p in network.parameters())
    assert images.fingerprint() == tiny.image_set().fingerprint()
    assert not images.images.requires_grad
    assert images.images.grad is None
    assert tiny.transfer(tmp_path, zoo=zoo, images=images, attack=attack).identical(made)


@own_attacks
def test_attack_of_ones_own_can_be_compared_with(attack, tmp_path):
    zoo, mine = in_training_mode(), tiny.convolutional(5)
    mine.train()
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    whole = tiny.transfer(tmp_path / "whole", zoo=zoo | {"mine": mine}, attack=attack)
    part = tiny.transfer(tmp_path / "part", zoo=zoo, attack=attack)
    found = ms.compare(
        mine, part, images=tiny.image_set(), zoo=zoo, attack=attack, device="cpu", progress=False
    )
    assert np.array_equal(found.clean_prediction, whole.clean_prediction)
    if attack is not apgd:  # which draws from torch's global random state
        assert np.array_equal(found.adversarial_prediction, whole.adversarial_prediction)
    assert all(torch.equal(v, before[k]) for k, v in mine.state_dict().items())
    assert mine.training
    assert all(p.grad is None for p in mine.parameters())


def test_attack_of_ones_own_makes_what_it_makes_on_a_network_in_evaluation_mode(tmp_path):
    zoo = in_training_mode()
    for attack in (one_step, steps_on_the_given_tensor, careless, writes):
        made = tiny.transfer(tmp_path / attack.__name__, zoo=zoo, attack=attack)
        for name, network in tiny.zoo().items():
            images = tiny.image_set()
            expected = [
                (one_step(network.eval(), x, y).detach() * 255).round() / 255
                for x, y in zip(images.images.split(5), images.labels.split(5), strict=True)
            ]
            assert torch.equal(ms.adversarial_images(made, name, images), torch.cat(expected)), attack


def test_gradients_that_the_caller_has_are_kept(tmp_path):
    network = tiny.linear(1)
    network(tiny.image_set().images).sum().backward()
    before = network[1].weight.grad.clone()
    tiny.transfer(tmp_path, zoo={"a": network, "b": tiny.linear(2)}, attack=one_step)
    assert torch.equal(network[1].weight.grad, before)


@pytest.mark.parametrize("attack", [one_step, apgd])
def test_attack_of_ones_own_on_a_network_that_writes_into_its_input(attack, tmp_path):
    """Torch itself refuses that the tensor which takes the gradient is written into; we only say of whom."""
    images = tiny.image_set()

    def made(name, before):
        torch.manual_seed(0)
        zoo = {"odd": Odd(before), "plain": tiny.linear(2)}
        return tiny.transfer(tmp_path / name, zoo=zoo, images=images, attack=attack)

    expected = made("pure", lambda x: x.sub(0.1).clamp(0, 1))
    try:
        found = made("writes", lambda x: x.sub_(0.1).clamp_(0, 1))
    except REFUSALS as error:
        assert str(error).startswith("model 'odd': RuntimeError: ")  # noqa: PT017
    else:
        assert np.array_equal(found.adversarial_prediction, expected.adversarial_prediction)
        assert np.array_equal(found.clean_prediction, expected.clean_prediction)
    assert images.fingerprint() == tiny.image_set().fingerprint()


# No gradient to follow


def saturated():
    return Odd(after=lambda logits: logits * 1000)


def quantised():
    return Odd(lambda x: (x * 255).round() / 255)


def constant():
    return Odd(after=lambda logits: logits.detach() + 0 * logits)


def rooted():
    """Its gradient is NaN where a pixel is 0."""
    return Odd(lambda x: x.sqrt() ** 2)


def images_without_gradient(network, images):
    """Count them as one would by hand."""
    x = images.images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(network.eval()(x), images.labels, reduction="sum")
    gradient = torch.autograd.grad(loss, x)[0].flatten(1)
    return int(((gradient == 0).all(1) | ~gradient.isfinite().all(1)).sum())


@pytest.mark.parametrize("make", [saturated, quantised, constant, rooted])
def test_images_without_gradient_are_counted_kept_and_warned_of(make, measure):
    expected = images_without_gradient(make(), tiny.image_set(40))
    assert expected > 2
    with pytest.warns(UserWarning, match=rf"^model 'odd'.*\b{expected}\b") as caught:
        made = measure(make())
    assert len(said_of(caught, "odd")) == 1
    assert not said_of(caught, "plain")
    assert made.images_without_gradient.dims == ("source",)
    assert made.images_without_gradient.dtype.kind == "i"
    assert made.images_without_gradient.sel(source=["plain", "odd"]).values.tolist() == [0, expected]
    own = ms.white_box_success(made)
    assert own.images_without_gradient.sel(model=["plain", "odd"]).values.tolist() == [0, expected]


class FlatOn(nn.Module):
    """Has no gradient on some images, which their first pixel tells."""

    def __init__(self, share):
        super().__init__()
        self.inside, self.share = tiny.linear(1), share

    def forward(self, x):
        return self.inside(torch.where(x[:, :1, :1, :1] < self.share, x.detach(), x))


def numbered(n):
    """Images of which the first pixel tells the place."""
    images = tiny.image_set(n)
    images.images[:, 0, 0, 0] = torch.arange(n) / n
    return images


@pytest.mark.parametrize(
    ("n", "flat", "is_said"), [(40, 2, False), (40, 3, True), (100, 5, False), (100, 6, True)]
)
def test_warning_begins_above_five_per_cent_of_the_images(n, flat, is_said, tmp_path):
    zoo = {"plain": tiny.linear(2), "odd": FlatOn((flat - 0.5) / n)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = tiny.transfer(tmp_path, zoo=zoo, images=numbered(n), attack=QUICK)
    assert made.images_without_gradient.values.tolist() == [0, flat]
    assert len(said_of(caught, "odd")) == is_said


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def test_network_that_the_attack_on_itself_does_not_fool_is_warned_of(measure):
    """Its gradients are there, but lead astray."""
    with pytest.warns(UserWarning, match=r"^model 'odd'.*\b\d+(\.\d+)? ?%") as caught:
        made = measure(Odd(Backwards.apply))
    assert len(said_of(caught, "odd")) == 1
    assert not said_of(caught, "plain")
    assert ms.white_box_success(made).sel(model="odd") < 0.1
    assert (made.images_without_gradient == 0).all()


def test_counts_survive_an_extended_run_and_go_by_name(tmp_path):
    images = tiny.image_set()
    with pytest.warns(UserWarning, match="model 'odd'"):
        made = tiny.transfer(
            tmp_path, zoo={"plain": tiny.linear(2), "odd": saturated()}, images=images, attack=QUICK
        )
    zoo = {"new": tiny.mlp(1), "odd": saturated(), "plain": tiny.linear(2)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model 'odd'", UserWarning)
        wider = tiny.transfer(tmp_path, zoo=zoo, images=images, attack=QUICK)
    expected = images_without_gradient(saturated(), images)
    assert made.images_without_gradient.values.tolist() == [0, expected]
    assert wider.images_without_gradient.values.tolist() == [0, expected, 0]
    assert ms.open_study(tmp_path).images_without_gradient.values.tolist() == [0, expected, 0]


def test_study_that_does_not_know_its_gradients_is_used_as_before(study):
    old = study.drop_vars("images_without_gradient")
    given = dict(images=tiny.image_set(40), zoo={"plain": tiny.linear(2)}, attack=QUICK, progress=False)
    found, expected = (ms.compare(tiny.mlp(3), which, **given) for which in (old, study))
    assert np.array_equal(found.adversarial_prediction, expected.adversarial_prediction)


@pytest.mark.parametrize("cut", ["detach", "no_grad", "inference_mode", "numpy"])
def test_network_that_cuts_the_gradient_is_refused_or_warned_of_by_name(cut, measure):
    inside = tiny.linear(1)

    class Cut(nn.Module):
        def forward(self, x):
            if cut == "detach":
                return inside(x.detach())
            if cut == "numpy":
                return inside(torch.from_numpy(x.detach().numpy()))
            with getattr(torch, cut)():
                return inside(x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = measure(Cut())
        except REFUSALS as error:
            said = str(error)
            assert said.startswith("model 'odd': ")
            assert "allow_unused" not in said, "this is no advice for our users"
        else:
            assert made.images_without_gradient.sel(source="odd") == 40
            assert len(said_of(caught, "odd")) == 1


def infinite(logits):
    return torch.cat([logits[:, :1] + torch.inf, logits[:, 1:]], 1)


def minus_infinite(logits):
    return torch.cat([logits[:, :1] - torch.inf, logits[:, 1:]], 1)


def infinite_sometimes(logits):
    return torch.where(torch.arange(len(logits))[:, None] == 0, torch.inf, logits)


@pytest.mark.parametrize("after", [infinite, minus_infinite, infinite_sometimes])
def test_infinite_logits_are_refused_as_nan_is(after, measure, tmp_path):
    with pytest.raises(ValueError, match=r"^model 'odd': .*(infinit|finite)"):
        measure(Odd(after=after))
    assert not list(tmp_path.rglob("*zarr*"))


@pytest.mark.parametrize("after", [infinite, minus_infinite])
@pytest.mark.parametrize("attack", [partial(ms.pgd, steps=2), ms.fgsm, partial(mi_fgsm, steps=2)])
def test_attack_refuses_infinite_logits(attack, after, images):
    with pytest.raises(ValueError, match="finite"):
        attack(Odd(after=after), images.images, images.labels)


@pytest.mark.parametrize("after", [infinite, lambda logits: logits * torch.nan])
@pytest.mark.parametrize("use", [ms.accuracy, distillation.teacher_logits], ids=["accuracy", "teacher"])
def test_logits_that_are_not_finite_are_refused_wherever_logits_are_read(use, after, images):
    with pytest.raises(ValueError, match=r"finite|NaN"):
        use(Odd(after=after), images)


# Gradients switched off around us


def switched_off(how):
    return {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "set_grad_enabled": partial(torch.set_grad_enabled, False),
    }[how]()


every_switch = pytest.mark.parametrize("how", ["no_grad", "inference_mode", "set_grad_enabled"])


@every_switch
@pytest.mark.parametrize("attack", [QUICK, one_step])
def test_study_made_without_gradients_around_it_is_the_same(how, attack, tmp_path):
    expected = tiny.transfer(tmp_path / "on", attack=attack)
    with switched_off(how):
        found = tiny.transfer(tmp_path / "off", attack=attack)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (how == "inference_mode")
    assert found.identical(expected)


def test_study_made_with_reduced_precision_around_it_is_the_same(tmp_path):
    given = dict(zoo={"a": tiny.convolutional(8), "b": tiny.linear(1)}, images=tiny.image_set(300))
    expected = tiny.transfer(tmp_path / "off", batch_size=100, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tiny.transfer(tmp_path / "on", batch_size=100, **given)
    assert found.identical(expected)


@every_switch
def test_comparison_without_gradients_around_it_is_the_same(how, study):
    given = dict(images=tiny.image_set(40), zoo={"plain": tiny.linear(2)}, attack=QUICK, progress=False)
    expected = ms.compare(tiny.mlp(3), study, **given)
    with switched_off(how):
        assert ms.compare(tiny.mlp(3), study, **given).identical(expected)


@every_switch
@pytest.mark.parametrize("attack", [partial(ms.pgd, steps=3), ms.fgsm, partial(mi_fgsm, steps=3)])
def test_attack_without_gradients_around_it_is_the_same(how, attack, images):
    expected = attack(tiny.mlp(3), images.images, images.labels)
    with switched_off(how):
        found = attack(tiny.mlp(3), images.images, images.labels)
    assert torch.equal(found, expected)
    assert (found != images.images).any()


@every_switch
def test_training_without_gradients_around_it_is_the_same(how, images):
    def trained():
        with torch.inference_mode(False):
            student = ms.Classifier(tiny.linear(1), input_size=8)
        teacher = ms.Teacher(distillation.teacher_logits(tiny.linear(2), images))
        recipe = ms.Recipe(epochs=2, batch_size=6)
        return ms.fit(student, images, teacher=teacher, recipe=recipe, progress=False)

    expected = trained()
    with switched_off(how):
        found = trained()
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(found.network[1].weight, tiny.linear(1)[1].weight)


@every_switch
def test_architecture_is_trained_without_gradients_around(how, images, monkeypatch):
    monkeypatch.setattr(training, "fashion_mnist", lambda part: images)
    options = dict(recipe=ms.Recipe(epochs=1, batch_size=12), progress=False)
    expected = ms.train("resmlp_24_224", **options)
    with switched_off(how):
        found = ms.train("resmlp_24_224", **options)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


@every_switch
def test_operations_are_counted_without_gradients_around(how):
    expected = count_flops(tiny.mlp(1), (1, 8, 8))
    with switched_off(how):
        assert count_flops(tiny.mlp(1), (1, 8, 8)) == expected


@pytest.mark.parametrize("attack", [QUICK, one_step, partial(mi_fgsm, eps=0.15, steps=3, step_size=0.1)])
def test_images_made_in_inference_mode_are_attacked(attack, tmp_path):
    with torch.inference_mode():
        made_there = tiny.image_set()
    found = tiny.transfer(tmp_path / "there", images=made_there, attack=attack)
    assert found.identical(tiny.transfer(tmp_path / "here", attack=attack))


@pytest.mark.parametrize("attack", [partial(ms.pgd, steps=3), ms.fgsm, partial(mi_fgsm, steps=3)])
def test_attack_by_itself_on_images_made_in_inference_mode(attack):
    with torch.inference_mode():
        there = tiny.image_set()
    here = tiny.image_set()
    found = attack(tiny.mlp(3), there.images, there.labels)
    assert torch.equal(found, attack(tiny.mlp(3), here.images, here.labels))


def test_training_on_images_made_in_inference_mode(images):
    with torch.inference_mode():
        there = tiny.image_set()
    recipe = ms.Recipe(epochs=2, batch_size=6)
    one, other = (
        ms.fit(ms.Classifier(tiny.linear(1), input_size=8), which, recipe=recipe, progress=False)
        for which in (there, images)
    )
    assert torch.equal(one.network[1].weight, other.network[1].weight)


@pytest.mark.parametrize("make", [tiny.linear, tiny.mlp, tiny.convolutional])
def test_networks_made_in_inference_mode_are_measured(make, tmp_path, study):
    with torch.inference_mode():
        there = make(3)
    found = tiny.transfer(tmp_path / "there", zoo={"a": there, "b": tiny.linear(1)})
    assert found.identical(tiny.transfer(tmp_path / "here", zoo={"a": make(3), "b": tiny.linear(1)}))
    given = dict(images=tiny.image_set(40), zoo={"plain": tiny.linear(2)}, attack=QUICK, progress=False)
    assert ms.compare(there, study, **given).identical(ms.compare(make(3), study, **given))


def test_network_made_in_inference_mode_is_attacked_by_itself(images):
    with torch.inference_mode():
        there = tiny.convolutional(3)
    found = ms.pgd(there, images.images, images.labels, steps=3)
    assert torch.equal(found, ms.pgd(tiny.convolutional(3), images.images, images.labels, steps=3))


def test_whole_programme_in_inference_mode(tmp_path):
    expected = tiny.transfer(tmp_path / "on")
    with torch.inference_mode():
        zoo, images = tiny.zoo(), tiny.image_set()
        found = tiny.transfer(tmp_path / "off", zoo=zoo, images=images)
        scores = ms.sat(found)
    assert found.identical(expected)
    assert scores.equals(ms.sat(expected))
