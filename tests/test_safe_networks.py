"""What networks of one's own do to a measurement: it is right, or they are refused or warned of by name."""

import re
from functools import partial
from itertools import count

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import QUICK, Odd, compare, said_of, same_predictions
from torch import nn
from torch.nn.utils import prune

import modelsim as ms
from modelsim import distillation
from modelsim.transfer import concerns
from modelsim.zoo import count_flops, fingerprint

N = 70


def transfer(out, odd, **changed):
    given = dict(zoo={"plain": tiny.linear(2), "odd": odd}, images=tiny.image_set(N))
    return tiny.transfer(out, attack=QUICK, batch_size=35, **(given | changed))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The study of one plain network."""
    return transfer(tmp_path_factory.mktemp("plain"), None, zoo={"plain": tiny.linear(2)})


@pytest.fixture(params=["transfer", "compare"])
def measure(request, plain, tmp_path):
    """Measure an odd network beside a plain one, in one of the two ways."""
    here, there = partial(transfer, tmp_path / "out"), partial(compare, plain, images=tiny.image_set(N))
    return here if request.param == "transfer" else there


def test_student_that_writes_into_its_input_or_trains_oddly_is_trained(images):
    class Student(ms.Classifier):
        def forward(self, canvas):
            return super().forward(canvas.sub_(0.1))

        def train(self, mode=True):
            super().train(mode)  # and returns nothing

    student = Student(tiny.linear(1), input_size=8)
    trained = ms.fit(student, images, recipe=ms.Recipe(epochs=1, batch_size=6), progress=False)
    assert images.fingerprint() == tiny.image_set().fingerprint()
    assert trained is student
    assert not any(module.training for module in student.modules())


def test_network_that_answers_always_with_the_same_tensor(measure):
    class Reusing(Odd):
        answer = torch.zeros(N, 3)

        def forward(self, x):
            logits = super().forward(x)
            return logits if torch.is_grad_enabled() else self.answer[: len(x)].copy_(logits)

    assert measure(Reusing()).identical(measure(Odd()))


# Networks that are random, or see their batch


UNSTEADY = {
    "dropout that stays on": lambda: Odd(lambda x: F.dropout(x, 0.8, training=True)),
    "noise": lambda: Odd(lambda x: x + 0.5 * torch.randn_like(x)),
    "statistics of the batch": lambda: Odd(lambda x: (x - x.mean(0)) / (x.std(0, unbiased=False) + 0.01)),
    "mean of the batch": lambda: Odd(after=lambda z: z + z.mean(0).roll(1) * 9),
    "place in the batch": lambda: Odd(after=lambda z: torch.cat([z[:1], z[1:].roll(1, 1)])),
    "size of the batch": lambda: Odd(after=lambda z: z.roll(len(z), 1)),
    "neighbours in the batch": lambda: Odd(after=lambda z: z.roll(1, 0)),
    "number of calls": lambda: Odd(after=partial(lambda calls, z: z.roll(next(calls), 1), count())),
}


@pytest.mark.parametrize("n", [12, N])
@pytest.mark.parametrize("make", UNSTEADY.values(), ids=UNSTEADY)
def test_network_that_is_random_or_sees_its_batch_is_refused_with_the_share(make, n, tmp_path):
    with pytest.raises(ValueError, match=r"model 'odd': it tells \d+% of \d+ images otherwise"):
        transfer(tmp_path / "out", make(), images=tiny.image_set(n))


def test_noise_too_small_to_tip_a_prediction_is_let_pass(measure):
    measure(Odd(lambda x: x + 1e-6 * torch.randn_like(x)))


@pytest.mark.filterwarnings("ignore:model .* the attack on itself")
@pytest.mark.parametrize("n", [1, 2, 6])
def test_few_images_are_enough_and_the_global_random_state_is_left_alone(n, tmp_path):
    before = torch.manual_seed(5).get_state()
    zoo = {"first": tiny.linear(1), "second": tiny.linear(2)}
    assert tiny.transfer(tmp_path, zoo=zoo, images=tiny.image_set(n)).sizes["image"] == n
    assert torch.equal(torch.get_rng_state(), before)


def test_zoo_that_loads_another_network_every_time_is_asked_once_or_refused(tmp_path):
    """As `lambda name: timm.create_model(name)` does, whose weights are random."""
    loaded = []
    zoo = ms.Zoo(["odd"], lambda name: loaded.append(tiny.linear(len(loaded) + 1)) or loaded[-1])
    made = tiny.transfer(tmp_path / "kept", zoo=zoo, attack=QUICK)
    assert len(loaded) == 1
    assert made.clean_prediction.values.tolist() == [loaded[0](tiny.image_set().images).argmax(1).tolist()]
    pair = ms.Zoo(["other", "odd"], lambda name: zoo["odd"] if name == "odd" else tiny.linear(0))
    with pytest.raises(ValueError, match="model 'odd': the zoo gives another network each time"):
        tiny.transfer(tmp_path / "not kept", zoo=pair, attack=QUICK, network_memory=0)


# Networks that have learned other classes, or none, and those that can't be attacked


ALL, LAST, HALF = range(20), range(5, 20), range(10)


@pytest.mark.parametrize(
    ("clean", "said"),
    [
        ([ALL, ALL, HALF], {}),
        ([ALL, ALL, range(9)], {"c": "it is right on 45% of the clean images, its peers on 100%"}),
        ([ALL, range(8), range(2)], {"b": "few of the images .40%", "c": "10%.* 70%.* and 1 more.* .10%"}),
        ([range(15), LAST], {}),
        ([range(14), LAST], {"a": "it and 'b' are both right on few of the images .45%"}),
        ([LAST, range(14)], {"b": "it and 'a' are both right on few of the images .45%"}),
        ([range(14), range(6, 20)], {"a": "it and 'b' are both right on few of the images .40%"}),
    ],
)
def test_model_that_knows_little_of_what_its_peers_know_is_named_once(clean, said):
    wrong = [[image not in right for image in ALL] for right in clean]
    study = tiny.study([0] * 20, wrong, np.ones((len(clean), len(clean), 20)))
    found = list(concerns(study, study.source.values.tolist()))
    assert len(found) == len(said)
    for sentence, (name, message) in zip(found, said.items(), strict=True):
        assert re.match(f"model '{name}': .*{message}", sentence)


@pytest.mark.parametrize(
    ("blind", "fooled", "said"),
    [
        (1, 2, []),
        (2, 20, ["model 'a': on 2 of 20 clean images its gradient is zero or not finite"]),
        (0, 1, ["model 'a': the attack on itself succeeds on 5% of 20 images"]),
        (20, 0, ["model 'a': on 20 of 20 .*; the attack on itself succeeds on 0%"]),
    ],
)
def test_model_that_can_hardly_be_attacked_is_named_once(blind, fooled, said):
    study = tiny.study([0] * 20, [[0] * 20], [[[1] * fooled + [0] * (20 - fooled)]])
    study.images_without_gradient[0] = blind
    found = list(concerns(study, ["a"]))
    assert len(found) == len(said)
    assert all(map(re.match, said, found))


DOUBTFUL = {
    "classes in another order": (lambda: Odd(after=lambda z: z[:, [1, 0, 2]]), "it is right on"),
    "always one class": (lambda: Odd(after=lambda z: z + torch.tensor([100.0, 0, 0])), "it is right on"),
    "gradient astray": (lambda: Odd(lambda x: 2 * x.detach() - x), "the attack on itself succeeds on 0%"),
    "saturated": (lambda: Odd(after=lambda z: z * 1000), "its gradient is zero"),
    "quantised": (lambda: Odd(lambda x: (x * 255).round() / 255), "its gradient is zero"),
    "constant": (lambda: Odd(after=lambda z: z.detach() + 0 * z), "its gradient is zero"),
    "NaN where a pixel is 0": (lambda: Odd(lambda x: x.sqrt() ** 2), "its gradient is zero or not finite"),
}


@pytest.mark.parametrize(("make", "message"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_doubtful_network_is_warned_of_once_and_its_images_without_gradient_are_counted(
    make, message, measure
):
    x, labels = tiny.image_set(N).images.requires_grad_(), tiny.image_set(N).labels
    gradient = torch.autograd.grad(F.cross_entropy(make()(x), labels, reduction="sum"), x)[0].flatten(1)
    expected = int(((gradient == 0).all(1) | ~gradient.isfinite().all(1)).sum())
    with pytest.warns(UserWarning, match="model") as caught:
        made = measure(make())
    (said,) = said_of(caught, "odd")
    assert message in said
    assert (f"on {expected} of {N} clean images its gradient" in said) == (expected > N / 20)
    assert ("its gradient" in message) == (expected > N / 20)
    assert not said_of(caught, "plain")
    count = made.images_without_gradient
    assert (count.dims, count.dtype.kind) == (("source",), "i")
    assert count.sel(source=["plain", "odd"]).values.tolist() == [0, expected]
    own = ms.white_box_success(made)
    assert own.images_without_gradient.sel(model=["plain", "odd"]).values.tolist() == [0, expected]


@pytest.mark.filterwarnings("ignore:model 'odd'")
def test_counts_survive_an_extended_run_go_by_name_and_may_be_unknown(tmp_path):
    made = transfer(tmp_path, DOUBTFUL["constant"][0]())
    zoo = {"new": tiny.mlp(1), "odd": DOUBTFUL["constant"][0](), "plain": tiny.linear(2)}
    wider = transfer(tmp_path, None, zoo=zoo)
    assert made.images_without_gradient.values.tolist() == [0, N]
    assert wider.images_without_gradient.values.tolist() == [0, N, 0]
    assert ms.open_study(tmp_path).identical(wider)
    old, given = wider.drop_vars("images_without_gradient"), dict(images=tiny.image_set(N), name="mine")
    assert same_predictions(*(compare(study, tiny.mlp(3), zoo=zoo, **given) for study in (old, wider)))


# Fingerprints, and tensors that aren't plain


class Holding(Odd):
    """Holds a tensor that it doesn't use."""

    def __init__(self, tensor, *, persistent=True):
        super().__init__()
        self.register_buffer("held", tensor, persistent=persistent)


class WithExtraState(Odd):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def filled(value, dtype=torch.float32):
    return torch.full((2, 3), value).to(dtype)


HELD = {
    "bfloat16": lambda value: filled(value, torch.bfloat16),
    "float8": lambda value: filled(float(value), torch.float8_e4m3fn),
    "complex": lambda value: filled(value, torch.complex64),
    "conjugate": lambda value: torch.full((2, 3), value + 1j).conj(),
    "negative": lambda value: torch.full((2, 3), value + 1j).conj().imag * value,
    "boolean": lambda value: filled(value - 1, torch.bool),
    "uint16": lambda value: filled(value, torch.uint16),
    "sparse": lambda value: filled(value).to_sparse(),
    "sparse, not coalesced": lambda value: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, value], (2, 3)),
    "sparse, elsewhere": lambda value: torch.sparse_coo_tensor([[0], [value]], [1.0], (2, 3)),
    "sparse by rows": lambda value: filled(float(value)).to_sparse_csr(),
    "transposed": lambda value: filled(value).T,
    "of no dimension": lambda value: torch.tensor(float(value)),
    "empty": lambda value: torch.empty(0, value),
    "taking a gradient": lambda value: filled(value, torch.float32).requires_grad_() * 1,
}
EXTRA = {
    "dictionary": lambda value: {"scale": torch.full((2,), float(value)), "names": ["a", str(value)]},
    "bytes": lambda value: bytes([value]),
    "number": lambda value: value,
    "tensor": lambda value: torch.full((2,), value, dtype=torch.bfloat16),
}


SEEN = {
    **{kind: lambda value, of=of: Holding(of(value)) for kind, of in HELD.items()},
    **{f"extra {kind}": lambda value, of=of: WithExtraState(of(value)) for kind, of in EXTRA.items()},
    "not saved": lambda value: Holding(filled(value), persistent=False),
    "order": lambda value: nn.ModuleList([tiny.linear(1), tiny.linear(2)][:: 2 * value - 3]),
    "shape": lambda value: Holding(torch.ones([(2, 3), (3, 2)][value - 1])),
    "a little": lambda value: Holding(torch.tensor([1 + value * 1e-7])),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("make", SEEN.values(), ids=SEEN)
def test_fingerprint_reads_tensors_of_every_dtype_and_layout(make):
    same, again, other = (fingerprint(make(value)) for value in (1, 1, 2))
    assert same == again != other


# Modules off the beaten path


class TrainReturnsNothing(Odd):
    def train(self, mode=True):
        super().train(mode)


class EvalReturnsNothing(Odd):
    def eval(self):
        self.train(False)


class WithoutWeights(nn.Module):
    def forward(self, x):
        return 10 * x.flatten(1) @ tiny.pattern(3).T


def changed(network, **attributes):
    for name, value in attributes.items():
        setattr(network, name, value)
    return network


def with_layer(change, *given, **settings):
    """Change the layer of a linear network."""
    network = tiny.linear(1)
    change(network[1], *given, **settings)
    return network


def exported(network):
    batch = torch.export.Dim("batch", min=1, max=4096)
    return torch.export.export(
        network.eval(), (torch.rand(2, 1, 8, 8),), dynamic_shapes=({0: batch},)
    ).module()


LIKE_LINEAR = {
    "an address in its repr": lambda: changed(Odd(), extra_repr=lambda: hex(id(object()))),
    "two wrappers": lambda: Odd(inside=Odd()),
    "sequence": lambda: nn.Sequential(tiny.linear(1), nn.Identity()),
    "data parallel": lambda: nn.DataParallel(tiny.linear(1)),
    "compiled": lambda: torch.compile(tiny.linear(1), backend="eager"),
    "frozen": lambda: tiny.linear(1).requires_grad_(False),
    "in training mode": lambda: tiny.linear(1).train(),
    "train returns nothing": TrainReturnsNothing,
    "eval returns nothing": lambda: EvalReturnsNothing().train(),
    "scripted": lambda: torch.jit.script(tiny.linear(1)),
    "traced": lambda: torch.jit.trace(tiny.linear(1), torch.rand(2, 1, 8, 8)),
    "symbolically traced": lambda: torch.fx.symbolic_trace(tiny.linear(1)),
    "exported": lambda: exported(tiny.linear(1)),
    "with a hook": lambda: with_layer(
        nn.Module.register_forward_hook, lambda module, given, logits: logits * 1
    ),
}
"""What is `linear(1)` by another form."""

UNUSUAL = {
    "partly frozen": lambda: Odd(nn.BatchNorm2d(1).eval()),
    "exported convolution": lambda: exported(tiny.convolutional(3)),
    "old weight norm": lambda: with_layer(nn.utils.weight_norm),
    "pruned": lambda: with_layer(prune.l1_unstructured, "weight", amount=0.1),
    "without weights": WithoutWeights,
    "bfloat16": lambda: Odd(torch.Tensor.bfloat16, torch.Tensor.float, tiny.linear(1).bfloat16()),
    "bfloat16 logits": lambda: Odd(torch.Tensor.bfloat16, inside=tiny.linear(1).bfloat16()),
    "double": lambda: Odd(torch.Tensor.double, inside=tiny.linear(1).double()),
    "sparse": lambda: Holding(HELD["sparse"](1)),
    "float8": lambda: Holding(HELD["float8"](1)),
    "extra state": lambda: WithExtraState({"scale": torch.ones(2)}),
}


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """The study of `linear(1)` beside a plain network."""
    folder = tmp_path_factory.mktemp("linear")
    return folder, transfer(folder, tiny.linear(1), test_images=tiny.image_set())


@pytest.mark.filterwarnings(
    # What torch says of the tensor that takes the gradient when it compiles a network.
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore::FutureWarning",
)
@pytest.mark.parametrize("kind", [*LIKE_LINEAR, *UNUSUAL])
def test_module_off_the_beaten_path_is_measured_as_what_it_computes_and_recognised(
    kind, plain, linear, tmp_path
):
    make, images = (LIKE_LINEAR | UNUSUAL)[kind], tiny.image_set(N)
    folder, expected = linear
    if kind in UNUSUAL:
        folder, expected = tmp_path, transfer(tmp_path, make(), test_images=tiny.image_set())
        assert ms.white_box_success(expected).sel(model="odd") > 0.1
    odd = make()
    modes = [module.training for module in odd.modules()]
    assert transfer(folder, odd, test_images=tiny.image_set()).identical(expected)
    assert same_predictions(compare(plain, odd, images=images), expected)
    told = distillation.teacher_logits(odd, images)[0].float().argmax(1).tolist()
    assert told == expected.clean_prediction.sel(target="odd").values.tolist()
    assert ms.accuracy(odd, images) == pytest.approx(np.mean(np.array(told) == images.labels.numpy()))
    if kind not in ("compiled", "exported", "exported convolution", "sparse"):
        assert count_flops(odd, (1, 8, 8)) >= 0
    assert [module.training for module in odd.modules()] == modes


# What can't be measured


class TooDeepError(Exception):
    """An exception of somebody's own, which wants more than a message."""

    def __init__(self, depth, limit):
        super().__init__(f"depth {depth} over {limit}")


def raising(error, *, under_attack=False):
    def forward(x):
        if not under_attack or torch.is_grad_enabled():
            raise error
        return x

    return Odd(forward)


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (RuntimeError("no such operator"), ValueError, "model 'odd': RuntimeError: no such operator"),
        (KeyError("stem"), ValueError, "model 'odd': KeyError: 'stem'"),
        (StopIteration("at the end"), ValueError, "model 'odd': StopIteration: at the end"),
        (TooDeepError(3, 2), ValueError, "model 'odd': TooDeepError: depth 3 over 2"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad byte"), ValueError, "model 'odd': UnicodeDecodeError"),
        (ValueError("got 1 channel"), ValueError, "model 'odd': ValueError: got 1 channel"),
        (TypeError("must be a list"), TypeError, "model 'odd': TypeError: must be a list"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("under_attack", [False, True])
def test_exception_of_a_network_is_raised_with_its_name_in_front(error, raised, said, under_attack, measure):
    with pytest.raises(raised, match=f"^{said}") as caught:
        measure(raising(error, under_attack=under_attack))
    assert caught.type is raised
    assert error in (caught.value, caught.value.__cause__)


def test_exception_of_a_model_of_the_study_bears_that_models_name(plain):
    zoo = {"plain": raising(RuntimeError("too late"))}
    with pytest.raises(ValueError, match=r"^model 'plain': RuntimeError: too late"):
        compare(plain, tiny.mlp(3), images=tiny.image_set(N), zoo=zoo)


def answering(after):
    return lambda: Odd(after=after)


def infinite_at_first(logits):
    return torch.where(torch.arange(len(logits))[:, None] == 0, torch.inf, logits)


NO_MODULE = r"got \w+: wrap it in one"
MEASURED_NOT = {
    "function": (lambda: lambda x: 10 * x.flatten(1)[:, :3], NO_MODULE),
    "class": (lambda: nn.Linear, NO_MODULE),
    "half": (lambda: tiny.linear(1).half(), r"float32 of shape .*: let its forward cast"),
    "channels": (lambda: nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), "repeat channels"),
    "other canvas": (lambda: tiny.linear(1, pixels=784), "float32 of shape"),
    "one batch size": (lambda: torch.export.export(tiny.linear(1), (torch.rand(2, 1, 8, 8),)).module(), ""),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), ""),
    "meta": (lambda: tiny.linear(1).to("meta"), ""),
    "dictionary": (answering(lambda z: {"logits": z}), r"logits of shape \(8, class\), got dict"),
    "numpy": (answering(lambda z: z.detach().numpy()), r"logits of shape \(8, class\), got float32"),
    "predictions": (answering(lambda z: z.argmax(1)), r"logits of shape \(8, class\), got torch.int64"),
    "complex": (answering(lambda z: z * (1 + 0j)), "got torch.complex64"),
    "one row": (answering(lambda z: z.mean(0, keepdim=True)), r"\(8, class\), got \(1, 3\)"),
    "maps": (answering(lambda z: z[:, :, None, None]), r"\(8, class\), got \(8, 3, 1, 1\)"),
    "more classes": (lambda: tiny.linear(1, n_classes=4), "it has 4 classes, the image set and its peers 3"),
    "probabilities": (answering(lambda z: z.softmax(1)), "probabilities instead of logits"),
    "NaN": (answering(lambda z: z * torch.nan), "NaN logits for 8 of 8 images"),
    "minus infinity": (answering(lambda z: z - torch.inf), "infinite logits for 8 of 8 images"),
    "infinity at first": (answering(infinite_at_first), "infinite logits for 1 of 8 images"),
    "random": (UNSTEADY["noise"], r"it tells \d+% of 60 images otherwise"),
}


@pytest.mark.parametrize(("make", "message"), MEASURED_NOT.values(), ids=MEASURED_NOT)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_cannot_be_measured_is_refused_by_name_and_nothing_written(make, message, measure, tmp_path):
    with pytest.raises((ValueError, TypeError), match=rf"^model 'odd': .*{message}"):
        measure(make())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use", [ms.accuracy, distillation.teacher_logits])
def test_logits_that_are_not_finite_are_refused_wherever_logits_are_read(use, images):
    with pytest.raises(ValueError, match="infinite logits for 12 of 12 images"):
        use(Odd(after=lambda z: z + torch.inf), images)


@pytest.mark.parametrize("cut", [torch.no_grad, torch.inference_mode, None])
def test_network_that_cuts_the_gradient_is_refused_by_name(cut, measure):
    odd = Odd(lambda x: torch.from_numpy(x.detach().numpy()))
    if cut:
        changed(odd, before=torch.clone, forward=cut()(odd.forward))
    with pytest.raises(ValueError, match=r"^model 'odd': its logits can't be differentiated by its images"):
        measure(odd)
