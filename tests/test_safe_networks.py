"""What networks of one's own do to a measurement: it is right, or they are refused or warned of by name."""

import re
import warnings
from functools import partial

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import modelsim as ms
from modelsim import distillation
from modelsim.attacks import mi_fgsm
from modelsim.zoo import count_flops, fingerprint, fold

REFUSALS = (ValueError, TypeError)
QUICK = partial(ms.pgd, eps=0.15, steps=3, step_size=0.1)


class Odd(nn.Module):
    """A network that knows its classes, with something of one's own before it and after it."""

    def __init__(self, before=None, after=None, inside=None):
        super().__init__()
        self.inside = tiny.linear(1) if inside is None else inside
        self.before, self.after = before or (lambda x: x), after or (lambda logits: logits)

    def forward(self, x):
        return self.after(self.inside(self.before(x)))


def transfer(out, odd, **changed):
    return tiny.transfer(out, zoo={"plain": tiny.linear(2), "odd": odd}, attack=QUICK, **changed)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study of one plain network."""
    return tiny.transfer(tmp_path_factory.mktemp("plain"), zoo={"plain": tiny.linear(2)}, attack=QUICK)


def compare(study, odd, **changed):
    given = dict(
        name="odd",
        images=tiny.image_set(),
        zoo={"plain": tiny.linear(2)},
        attack=QUICK,
        device="cpu",
        progress=False,
    )
    return ms.compare(odd, study, **(given | changed))


@pytest.fixture(params=["transfer", "compare"])
def measure(request, study, tmp_path):
    """Measure an odd network beside a plain one, in one of the two ways."""
    return partial(transfer, tmp_path / "out") if request.param == "transfer" else partial(compare, study)


def said_of(caught, name):
    return [str(w.message) for w in caught if str(w.message).startswith(f"model {name!r}")]


def same_predictions(one, other):
    names = ("clean_prediction", "adversarial_prediction")
    return all(np.array_equal(one[name], other[name]) for name in names)


# Networks and attacks that write into what they are given


def subtract(x):
    return x.sub(0.1).clamp(0, 1)


def subtract_in_place(x):
    return x.sub_(0.1).clamp_(0, 1)


def rectify_in_place(x):
    return F.relu(x.mul_(2).sub_(0.3), inplace=True)


def rectify(x):
    return F.relu(x * 2 - 0.3)


WRITERS = [
    pytest.param(subtract_in_place, subtract, id="subtracts"),
    pytest.param(rectify_in_place, rectify, id="rectifies"),
]
writers = pytest.mark.parametrize(("writes", "pure"), WRITERS)


@writers
def test_network_that_writes_into_its_input_has_the_study_of_one_that_does_not(writes, pure, tmp_path):
    images, test_images = tiny.image_set(), tiny.image_set(30, seed=1)
    found = transfer(tmp_path / "writes", Odd(writes), images=images, test_images=test_images)
    assert images.fingerprint() == tiny.image_set().fingerprint()
    assert test_images.fingerprint() == tiny.image_set(30, seed=1).fingerprint()
    expected = transfer(tmp_path / "pure", Odd(pure), test_images=tiny.image_set(30, seed=1))
    assert same_predictions(found, expected)
    assert np.array_equal(found.perturbation, expected.perturbation)
    assert np.array_equal(found.clean_probability, expected.clean_probability)


@writers
def test_network_that_writes_into_its_input_is_compared_as_one_that_does_not(writes, pure, study):
    images = tiny.image_set()
    found = compare(study, Odd(writes), images=images)
    assert images.fingerprint() == tiny.image_set().fingerprint()
    assert same_predictions(found, compare(study, Odd(pure)))


@writers
def test_model_of_a_study_that_writes_into_its_input_can_be_compared_with(writes, pure, tmp_path):
    images, mine = tiny.image_set(), tiny.mlp(3)
    results = []
    for name, before in (("writes", writes), ("pure", pure)):
        of_one = tiny.transfer(tmp_path / name, zoo={"plain": Odd(before)}, attack=QUICK)
        results.append(compare(of_one, mine, zoo={"plain": Odd(before)}, images=images))
        assert images.fingerprint() == tiny.image_set().fingerprint()
    assert same_predictions(*results)


@writers
@pytest.mark.parametrize("attack", [partial(ms.pgd, steps=3), ms.fgsm, partial(mi_fgsm, steps=3)])
def test_attack_on_a_network_that_writes_into_its_input(attack, writes, pure, images):
    found = attack(Odd(writes), images.images, images.labels)
    assert images.fingerprint() == tiny.image_set().fingerprint()
    assert torch.equal(found, attack(Odd(pure), images.images, images.labels))


@writers
def test_accuracy_of_a_network_that_writes_into_its_input(writes, pure):
    images = tiny.image_set(90, seed=4)
    found = ms.accuracy(Odd(writes), images)
    assert images.fingerprint() == tiny.image_set(90, seed=4).fingerprint()
    assert found == ms.accuracy(Odd(pure), tiny.image_set(90, seed=4))


@writers
def test_teacher_that_writes_into_its_input(writes, pure, images):
    found = distillation.teacher_logits(Odd(writes), images)
    assert images.fingerprint() == tiny.image_set().fingerprint()
    assert torch.equal(found, distillation.teacher_logits(Odd(pure), images))


def test_student_that_writes_into_its_input_leaves_the_images_alone(images):
    class Writing(ms.Classifier):
        def forward(self, canvas):
            return super().forward(subtract_in_place(canvas))

    student = Writing(tiny.linear(1), input_size=8)
    ms.fit(student, images, recipe=ms.Recipe(epochs=1, batch_size=6), progress=False)
    assert images.fingerprint() == tiny.image_set().fingerprint()


def test_a_part_of_an_image_set_shares_nothing_that_a_network_could_ruin(tmp_path):
    images = tiny.image_set()
    transfer(tmp_path, Odd(subtract_in_place), images=images[range(6)])
    assert images.fingerprint() == tiny.image_set().fingerprint()


def test_network_that_answers_always_with_the_same_tensor(tmp_path):
    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.answer = tiny.linear(1), torch.zeros(200, 3)

        def forward(self, x):
            if torch.is_grad_enabled():
                return self.inside(x)
            return self.answer[: len(x)].copy_(self.inside(x))

    images = tiny.image_set(250)
    made = partial(tiny.transfer, images=images, attack=QUICK, batch_size=50)
    expected = made(tmp_path / "plain", zoo={"odd": tiny.linear(1)})
    try:
        found = made(tmp_path / "reusing", zoo={"odd": Reusing()})
    except REFUSALS as error:
        assert str(error).startswith("model 'odd'")  # noqa: PT017
    else:
        assert same_predictions(found, expected)


class FailsAtFirst(nn.Module):
    """Can be hashed, but answers nothing."""

    def forward(self, x):
        raise LookupError("where am I?")


@pytest.mark.parametrize("place", range(3))
def test_there_is_no_store_before_all_models_have_answered(place, tmp_path):
    names = ["first", "second"]
    names.insert(place, "failing")
    zoo = {name: FailsAtFirst() if name == "failing" else tiny.zoo()[name] for name in names}
    with pytest.raises(ValueError, match=r"model 'failing': LookupError: .*where am I\?"):
        tiny.transfer(tmp_path / "out", zoo=zoo)
    assert not list(tmp_path.rglob("*zarr*"))
    with pytest.raises(FileNotFoundError, match="no study at"):
        ms.open_study(tmp_path / "out")


def test_extension_by_a_network_that_does_not_answer_leaves_the_store_as_it_was(tmp_path):
    tiny.transfer(tmp_path, zoo={"first": tiny.linear(1)})
    before = {p: p.read_bytes() for p in (tmp_path / "study.zarr").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="model 'failing'"):
        tiny.transfer(tmp_path, zoo={"first": tiny.linear(1), "failing": FailsAtFirst()})
    assert {p: p.read_bytes() for p in (tmp_path / "study.zarr").rglob("*") if p.is_file()} == before


# Networks that are random, or see their batch


class NoisyNow(nn.Module):
    """Adds to its input something that depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.inside, self.calls = tiny.linear(1), 0

    def forward(self, x):
        self.calls += 1
        return self.inside(x).roll(self.calls, 1)


def own_statistics(x):
    return (x - x.mean(0)) / (x.std(0, unbiased=False) + 0.01)


def place_in_batch(logits):
    return torch.where(torch.arange(len(logits))[:, None] % 2 == 0, logits, logits.roll(1, 1))


def size_of_batch(logits):
    return logits.roll(len(logits), 1)


def neighbours(logits):
    return logits.roll(1, 0)


UNSTEADY = [
    pytest.param(lambda: Odd(lambda x: F.dropout(x, 0.8, training=True)), id="dropout that stays on"),
    pytest.param(lambda: Odd(lambda x: x + 0.5 * torch.randn_like(x)), id="noise"),
    pytest.param(lambda: Odd(after=lambda z: z[:, torch.randperm(3)]), id="shuffled classes"),
    pytest.param(lambda: Odd(own_statistics), id="statistics of the batch"),
    pytest.param(
        lambda: Odd(
            nn.BatchNorm2d(1, track_running_stats=False, affine=False), lambda z: z + z.mean(0).roll(1) * 9
        ),
        id="batch norm without running statistics",
    ),
    pytest.param(lambda: Odd(after=place_in_batch), id="place in the batch"),
    pytest.param(lambda: Odd(after=size_of_batch), id="size of the batch"),
    pytest.param(lambda: Odd(after=neighbours), id="neighbours in the batch"),
    pytest.param(NoisyNow, id="number of calls"),
]


@pytest.mark.parametrize("make", UNSTEADY)
@pytest.mark.parametrize("n", [12, 90])
def test_network_that_is_random_or_sees_its_batch_is_refused_with_the_share(make, n, study, tmp_path):
    with pytest.raises(REFUSALS, match=r"model 'odd': .*?\d+(\.\d+)? ?%"):
        transfer(tmp_path / "out", make(), images=tiny.image_set(n))
    assert not list(tmp_path.rglob("*zarr*"))
    if n == 12:
        with pytest.raises(REFUSALS, match=r"model 'odd': .*?\d+(\.\d+)? ?%"):
            compare(study, make())


def test_noise_too_small_to_tip_a_prediction_is_let_pass(measure):
    measure(Odd(lambda x: x + 1e-6 * torch.randn_like(x)))


def test_what_the_check_draws_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    transfer(tmp_path, tiny.linear(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:model .* the attack on itself")
@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_few_images_are_enough_for_the_check(n, tmp_path):
    zoo = {"first": tiny.linear(1), "second": tiny.linear(2)}
    assert tiny.transfer(tmp_path, zoo=zoo, images=tiny.image_set(n)).sizes["image"] == n


def test_zoo_that_loads_another_network_every_time_is_refused_or_asked_once(tmp_path):
    """As `lambda name: timm.create_model(name)` does, whose weights are random."""
    loaded = []

    def load(name):
        loaded.append(tiny.linear(len(loaded) + 1))
        return loaded[-1]

    zoo = ms.Zoo(["odd"], load)
    try:
        made = tiny.transfer(tmp_path, zoo=zoo, images=tiny.image_set(60), attack=QUICK, batch_size=30)
    except REFUSALS as error:
        assert re.search("'odd'", str(error))  # noqa: PT017
    else:
        assert len(loaded) == 1
        assert accuracy_of(made, "odd") == pytest.approx(ms.accuracy(loaded[0], tiny.image_set(60)))


# Networks that have learned other classes, or none


def accuracy_of(study, name):
    right = study.clean_prediction.sel(target=name) == study.label
    return float(right.mean())


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(lambda: Odd(after=lambda z: z[:, [1, 2, 0]]), id="classes in another order"),
        pytest.param(lambda: Odd(after=lambda z: -z), id="the wrong way round"),
        pytest.param(lambda: Odd(lambda x: 1 - x), id="other images"),
        pytest.param(lambda: Odd(after=lambda z: z + torch.tensor([100.0, 0, 0])), id="always one class"),
    ],
)
@pytest.mark.parametrize("way", ["transfer", "compare"])
def test_network_that_has_not_learned_the_classes_is_warned_of_once_by_name(odd, way, tmp_path):
    peers = {"first": tiny.linear(1), "second": tiny.linear(2), "third": tiny.mlp(1)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "transfer":
            result = tiny.transfer(tmp_path, zoo=peers | {"odd": odd()}, attack=QUICK)
        else:
            of_peers = tiny.transfer(tmp_path, zoo=peers, attack=QUICK)
            assert not caught
            result = compare(of_peers, odd(), zoo=peers)
    (message,) = said_of(caught, "odd")
    right = accuracy_of(result, "odd")
    assert re.search(rf"\b{100 * right:.0f}(\.\d+)? ?%|\b{right:.2g}", message), (right, message)
    assert not [name for name in peers if said_of(caught, name)]


def one_third_wrong(which):
    """A network that is wrong on every image of one class."""
    return Odd(after=lambda logits: logits - 1000 * F.one_hot(torch.tensor(which), 3))


def test_networks_that_are_right_on_different_images_are_warned_of(tmp_path):
    """Each is right on two thirds, as its peers; both of a pair on one third."""
    zoo = {"a": one_third_wrong(0), "b": one_third_wrong(1)}
    with pytest.warns(UserWarning, match="model '[ab]'") as caught:
        study = tiny.transfer(tmp_path, zoo=zoo, attack=QUICK)
    assert accuracy_of(study, "a") == pytest.approx(2 / 3)
    assert max(len(said_of(caught, name)) for name in zoo) == 1


def test_networks_that_are_right_on_half_of_the_images_together_pass(tmp_path):
    tiny.transfer(
        tmp_path, zoo={"a": one_third_wrong(0), "b": tiny.linear(1), "c": tiny.linear(2)}, attack=QUICK
    )


def test_accuracy_and_trials_stand_in_every_result():
    study = tiny.study([0, 1, 2, 0], [[0, 1, 2, 1], [0, 1, 0, 0], [0, 0, 0, 0]], np.ones((3, 3, 4)))
    right = [0.75, 0.75, 0.5]
    trials = [[3, 2, 1], [2, 3, 2], [1, 2, 2]]
    score, rate = ms.sat(study), ms.transferability(study)
    assert score.trials.dims == ("model", "other")
    assert score.accuracy.dims == ("model",)
    assert score.trials.values.tolist() == rate.trials.values.tolist() == trials
    assert score.accuracy.values.tolist() == rate.accuracy.values.tolist() == right
    assert rate.accuracy.dims == ("target",)
    few = score.sel(model=["c", "a"], other="b")
    assert few.accuracy.values.tolist() == [0.5, 0.75]
    assert few.trials.values.tolist() == [2, 2]


def test_accuracy_and_trials_stand_beside_a_compared_network(study):
    score = ms.sat(compare(study, tiny.mlp(3)))
    right = [ms.accuracy(network, tiny.image_set()) for network in (tiny.linear(2), tiny.mlp(3))]
    assert score.accuracy.sel(model=["plain", "odd"]).values.tolist() == pytest.approx(right)


# Tensors that aren't plain


class Holding(nn.Module):
    """Holds a tensor that it doesn't use."""

    def __init__(self, tensor, persistent=True):
        super().__init__()
        self.inside = tiny.linear(1)
        self.register_buffer("held", tensor, persistent=persistent)

    def forward(self, x):
        return self.inside(x)


def filled(value, dtype):
    return torch.full((2, 3), value).to(dtype)


TENSORS = {
    "bfloat16": lambda value: filled(value, torch.bfloat16),
    "half": lambda value: filled(value, torch.half),
    "float8": lambda value: filled(float(value), torch.float8_e4m3fn),
    "complex": lambda value: filled(value, torch.complex64),
    "conjugate": lambda value: torch.full((2, 3), value + 1j).conj(),
    "negative": lambda value: torch.full((2, 3), value + 1j).conj().imag * value,
    "boolean": lambda value: filled(value - 1, torch.bool),
    "int8": lambda value: filled(value, torch.int8),
    "uint16": lambda value: filled(value, torch.uint16),
    "sparse": lambda value: filled(value, torch.float32).to_sparse(),
    "sparse, not coalesced": lambda value: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, value], (2, 3)),
    "transposed": lambda value: filled(value, torch.float32).T,
    "expanded": lambda value: torch.tensor([float(value)]).expand(2, 3),
    "of no dimension": lambda value: torch.tensor(float(value)),
    "taking a gradient": lambda value: filled(value, torch.float32).requires_grad_() * 1,
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("kind", TENSORS)
def test_fingerprint_reads_tensors_of_every_dtype_and_layout(kind, persistent):
    same, again, other = (fingerprint(Holding(TENSORS[kind](value), persistent)) for value in (1, 1, 2))
    assert same == again != other


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["to_sparse_csr", "to_sparse_csc"])
def test_fingerprint_reads_compressed_sparse_tensors(layout):
    same, again, other = (
        fingerprint(Holding(getattr(filled(float(value), torch.float32), layout)())) for value in (1, 1, 2)
    )
    assert same == again != other


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_fingerprint_of_sparse_tensors_sees_where_their_values_are():
    places = ([[0], [1]], [[1], [0]])
    one, other = (fingerprint(Holding(torch.sparse_coo_tensor(p, [1.0], (2, 2)))) for p in places)
    assert one != other


def test_fingerprint_reads_an_empty_tensor():
    assert fingerprint(Holding(torch.empty(0, 3))) == fingerprint(Holding(torch.empty(0, 3)))


class WithExtraState(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.inside, self.state = tiny.linear(1), state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state

    def forward(self, x):
        return self.inside(x)


@pytest.mark.parametrize(
    "state",
    [
        lambda value: {"scale": torch.full((2,), float(value)), "names": ["a", str(value)]},
        lambda value: bytes([value]),
        lambda value: value,
        lambda value: torch.full((2,), value, dtype=torch.bfloat16),
    ],
    ids=["dictionary", "bytes", "number", "tensor"],
)
def test_fingerprint_reads_extra_state(state):
    same, again, other = (fingerprint(WithExtraState(state(value))) for value in (1, 1, 2))
    assert same == again != other


def in_bfloat16():
    return Odd(lambda x: x.bfloat16(), lambda logits: logits.float(), tiny.linear(1).bfloat16())


@pytest.mark.parametrize(
    "make",
    [
        in_bfloat16,
        lambda: Odd(lambda x: x.bfloat16(), inside=tiny.linear(1).bfloat16()),
        lambda: Odd(lambda x: x.double(), inside=tiny.linear(1).double()),
        *(
            partial(lambda kind: Holding(TENSORS[kind](1)), kind)
            for kind in ("sparse", "float8", "complex", "negative")
        ),
        lambda: WithExtraState({"scale": torch.ones(2)}),
    ],
    ids=["bfloat16", "bfloat16 logits", "double", "sparse", "float8", "complex", "negative", "extra state"],
)
def test_network_with_tensors_that_are_not_plain_is_measured_and_recognised(make, study, tmp_path):
    made = transfer(tmp_path, make(), test_images=tiny.image_set(30, seed=1))
    assert transfer(tmp_path, make(), test_images=tiny.image_set(30, seed=1)).identical(made)
    compared = compare(study, make())
    assert np.array_equal(compared.adversarial_prediction, made.adversarial_prediction)


# Modules off the beaten path


class TrainReturnsNothing(Odd):
    def train(self, mode=True):
        super().train(mode)


class EvalReturnsNothing(Odd):
    def eval(self):
        self.train(False)


class StaysFrozen(Odd):
    """Batch normalisation is never put in training mode."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d(1))

    def train(self, mode=True):
        super().train(mode)
        self.before.eval()
        return self


def dynamic_export(network):
    batch = torch.export.Dim("batch", min=1, max=4096)
    given = (torch.rand(2, 1, 8, 8),)
    return torch.export.export(network.eval(), given, dynamic_shapes=({0: batch},)).module()


def weight_normed(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(network[1])
    return network


def pruned(network):
    prune.l1_unstructured(network[1], "weight", amount=0.1)
    return network


def hooked(network):
    network[1].register_forward_hook(lambda module, given, logits: logits * 1)
    return network


MODULES = {
    "train returns nothing": lambda: TrainReturnsNothing(),
    "eval returns nothing": lambda: EvalReturnsNothing(),
    "partly frozen": lambda: StaysFrozen().train(),
    "scripted": lambda: torch.jit.script(tiny.linear(1)),
    "scripted convolution": lambda: torch.jit.script(tiny.convolutional(3).eval()),
    "traced": lambda: torch.jit.trace(tiny.linear(1), torch.rand(2, 1, 8, 8)),
    "compiled": lambda: torch.compile(tiny.linear(1), backend="eager"),
    "data parallel": lambda: nn.DataParallel(tiny.linear(1)),
    "symbolically traced": lambda: torch.fx.symbolic_trace(tiny.linear(1)),
    "old weight norm": lambda: weight_normed(tiny.linear(1)),
    "weight norm": lambda: Odd(
        inside=nn.Sequential(nn.Flatten(), parametrizations.weight_norm(tiny.linear(1)[1]))
    ),
    "pruned": lambda: pruned(tiny.linear(1)),
    "with a hook": lambda: hooked(tiny.linear(1)),
    "without weights": lambda: Odd(inside=WithoutWeights()),
    "frozen": lambda: tiny.linear(1).requires_grad_(False),
}


class WithoutWeights(nn.Module):
    def forward(self, x):
        return 10 * x.flatten(1) @ tiny.pattern(3).T


# What torch says of the tensor that takes the gradient when it compiles a network.
of_compiling = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
of_scripting = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


@of_compiling
@of_scripting
@pytest.mark.parametrize("kind", MODULES)
def test_module_off_the_beaten_path_is_measured_as_what_it_computes(kind, study, tmp_path):
    odd = MODULES[kind]()
    with torch.no_grad():
        expected = Odd(inside=odd)(tiny.image_set().images).argmax(1)
    made = transfer(tmp_path, odd)
    assert made.clean_prediction.sel(target="odd").values.tolist() == expected.tolist()
    assert ms.white_box_success(made).sel(model="odd") > 0.1
    assert transfer(tmp_path, MODULES[kind]()).identical(made)
    compared = compare(study, odd)
    assert np.array_equal(compared.adversarial_prediction, made.adversarial_prediction)
    assert ms.accuracy(odd, tiny.image_set()) == pytest.approx(accuracy_of(made, "odd"))
    assert distillation.teacher_logits(odd, tiny.image_set()).shape == (2, 12, 3)


@pytest.mark.parametrize("make", [tiny.linear, tiny.convolutional])
def test_exported_network_is_measured_or_refused_with_what_to_do(make, measure):
    expected = measure(make(3))
    try:
        found = measure(dynamic_export(make(3)))
    except REFUSALS as error:
        assert re.match("model 'odd': .*export", str(error))  # noqa: PT017
    else:
        assert same_predictions(found, expected)


@of_compiling
@pytest.mark.parametrize(
    "make",
    [
        TrainReturnsNothing,
        EvalReturnsNothing,
        StaysFrozen,
        lambda: torch.compile(tiny.mlp(1), backend="eager"),
    ],
)
@pytest.mark.parametrize("attack", [partial(ms.pgd, steps=2), ms.fgsm, partial(mi_fgsm, steps=2)])
def test_attack_by_itself_on_a_module_off_the_beaten_path(attack, make, images):
    odd = make()
    odd.train()
    modes = [module.training for module in odd.modules()]
    changed = attack(odd, images.images, images.labels)
    assert (changed != images.images).any()
    assert [module.training for module in odd.modules()] == modes


def test_network_whose_train_returns_nothing_can_be_trained_and_counted(images):
    network = TrainReturnsNothing()
    assert count_flops(network, (1, 8, 8)) == count_flops(tiny.linear(1), (1, 8, 8)) > 0

    class Student(ms.Classifier):
        def train(self, mode=True):
            super().train(mode)

    student = Student(network, input_size=8)
    trained = ms.fit(student, images, recipe=ms.Recipe(epochs=1, batch_size=6), progress=False)
    assert trained is student
    assert not any(module.training for module in student.modules())


@pytest.mark.parametrize(
    "use", [lambda net, images: count_flops(net, (1, 8, 8)), ms.accuracy], ids=["flops", "accuracy"]
)
def test_counting_leaves_the_mode_of_every_module_as_it_was(use, images):
    network = tiny.mlp(1)
    network.train()
    network[3].eval()
    modes = [module.training for module in network.modules()]
    use(network, images)
    assert [module.training for module in network.modules()] == modes


def broken_by(error):
    def forward(x):
        raise error

    return Odd(forward)


class TooDeepError(Exception):
    """An exception of somebody's own, which wants more than a message."""

    def __init__(self, depth, limit):
        super().__init__(f"depth {depth} over {limit}")


def causes(error):
    while error:
        yield error
        error = error.__cause__


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("no such operator"), ValueError),
        (KeyError("stem"), ValueError),
        (IndexError("out of range"), ValueError),
        (AssertionError("must be RGB"), ValueError),
        (NotImplementedError("only on CUDA"), ValueError),
        (ZeroDivisionError("division by zero"), ValueError),
        (AttributeError("no attribute 'stem'"), ValueError),
        (OSError("no such file"), ValueError),
        (StopIteration("at the end"), ValueError),
        (TooDeepError(3, 2), ValueError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad byte"), ValueError),
        (ValueError("got 1 channel"), ValueError),
        (TypeError("must be a list"), TypeError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_exception_of_a_network_is_raised_with_its_name_in_front(error, raised, measure):
    said = str(error.args[-1]) if not isinstance(error, TooDeepError) else "depth 3 over 2"
    kind = "" if isinstance(error, REFUSALS) else f"{type(error).__name__}: "
    with pytest.raises(raised, match=rf"^model 'odd': {kind}(?!model).*{re.escape(said)}") as caught:
        measure(broken_by(error))
    assert caught.type is raised
    assert error in causes(caught.value)


def test_exception_under_attack_is_raised_with_the_name_in_front(measure):
    def only_clean(x):
        if torch.is_grad_enabled():
            raise RuntimeError("no backward here")
        return x

    with pytest.raises(ValueError, match=r"^model 'odd': RuntimeError: .*no backward here"):
        measure(Odd(only_clean))


def test_exception_of_a_model_of_the_study_bears_that_models_name(study):
    class Later(nn.Module):
        """Has the weights of the study's model, and fails."""

        def __init__(self):
            super().__init__()
            self.inside = tiny.linear(2)

        def forward(self, x):
            raise RuntimeError("too late")

    with pytest.raises(ValueError, match=r"^model 'plain': RuntimeError: .*too late"):
        compare(study, tiny.mlp(3), zoo={"plain": Later()})


def test_interruption_of_a_network_stays_an_interruption(measure):
    with pytest.raises(KeyboardInterrupt):
        measure(broken_by(KeyboardInterrupt()))


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        pytest.param(lambda: lambda x: 10 * x.flatten(1)[:, :3], r"nn\.Module|torch\.nn", id="function"),
        pytest.param(lambda: tiny.linear(1).half(), r"float32|\.float\(\)|cast", id="half"),
        pytest.param(lambda: nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), r"channel", id="channels"),
        pytest.param(lambda: "resnet50", r"nn\.Module|torch\.nn", id="name"),
        pytest.param(lambda: tiny.linear, r"nn\.Module|torch\.nn", id="not called"),
        pytest.param(lambda: tiny.linear(1).state_dict(), r"nn\.Module|torch\.nn", id="weights"),
        pytest.param(lambda: nn.Linear, r"nn\.Module|torch\.nn", id="class"),
        pytest.param(lambda: None, r"nn\.Module|torch\.nn", id="nothing"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name_with_what_to_do(make, advice, measure, tmp_path):
    with pytest.raises(REFUSALS, match=rf"model 'odd'.*({advice})"):
        measure(make())
    assert not list(tmp_path.rglob("*zarr*"))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda: torch.export.export(tiny.linear(1), (torch.rand(2, 1, 8, 8),)).module(),
            id="one batch size",
        ),
        pytest.param(
            lambda: torch.jit.trace(lambda x: x.reshape(2, 64)[:, :3], torch.rand(2, 1, 8, 8)), id="traced"
        ),
        pytest.param(lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), id="lazy"),
        pytest.param(lambda: tiny.linear(1, pixels=784), id="other canvas"),
        pytest.param(lambda: tiny.linear(1).to("meta"), id="meta"),
        pytest.param(lambda: Odd(after=lambda z: {"logits": z}), id="dictionary"),
        pytest.param(lambda: Odd(after=lambda z: (z, z)), id="tuple"),
        pytest.param(lambda: Odd(after=lambda z: z.argmax(1)), id="predictions"),
        pytest.param(lambda: Odd(after=lambda z: z.argmax(1, keepdim=True)), id="one column"),
        pytest.param(lambda: Odd(after=lambda z: z.squeeze(0).numpy()), id="numpy"),
        pytest.param(lambda: Odd(after=lambda z: z.mean(0, keepdim=True)), id="one row"),
        pytest.param(lambda: Odd(after=lambda z: z[:, :, None, None]), id="maps"),
        pytest.param(
            lambda: Odd(after=lambda z: z * (1 + 0j)),
            id="complex",
            # Torch says it only once in a process.
            marks=pytest.mark.filterwarnings("ignore:Casting complex values to real"),
        ),
        pytest.param(lambda: Odd(after=lambda z: z.sort(1).values.long()), id="whole numbers"),
    ],
)
@of_scripting
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_network_that_cannot_answer_is_refused_by_name(make, measure, tmp_path):
    with pytest.raises(REFUSALS, match=r"^model 'odd': "):
        measure(make())
    assert not list(tmp_path.rglob("*zarr*"))


# No false alarms


@pytest.fixture(scope="module")
def ordinary():
    return tiny.ordinary()


def test_nothing_is_said_against_twelve_ordinary_networks(ordinary, tmp_path):
    assert len(ordinary) == 12
    images, test_images = tiny.image_set(60), tiny.image_set(60, seed=1)
    made = tiny.transfer(
        tmp_path, zoo=ordinary, images=images, attack=QUICK, batch_size=30, test_images=test_images
    )
    assert ms.white_box_success(made).min() > 0.1
    assert (made.images_without_gradient == 0).all()
    again = tiny.transfer(
        tmp_path, zoo=ordinary, images=images, attack=QUICK, batch_size=30, test_images=test_images
    )
    assert again.identical(made)


def test_nothing_is_said_against_ordinary_networks_that_are_compared(ordinary, tmp_path):
    images, zoo = tiny.image_set(60), {"linear": ordinary["linear"], "mlp": ordinary["mlp"]}
    made = tiny.transfer(tmp_path, zoo=zoo, images=images, attack=QUICK, batch_size=30)
    for name in set(ordinary) - set(zoo):
        compare(made, ordinary[name], name=name, images=images, zoo=zoo)


def test_folded_network_computes_what_it_did(ordinary):
    images = tiny.image_set(60).images
    for name, network in ordinary.items():
        before = {key: value.clone() for key, value in network.state_dict().items()}
        folded = fold(network, images[:2])
        with torch.no_grad():
            torch.testing.assert_close(folded(images), network(images), rtol=1e-3, atol=1e-4, msg=name)
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_nothing_is_said_against_shipped_models(tmp_path):
    names, images = (
        ["resnet50", "deit_small_patch16_224", "efficientnet_b2"],
        ms.fashion_mnist("test", n=20, seed=3),
    )
    zoo = ms.load_zoo(names=names)
    attack = partial(ms.pgd, steps=2)
    made = ms.transfer({name: zoo[name] for name in names[:2]}, images, attack, tmp_path, progress=False)
    ms.compare(zoo[names[2]], made, name=names[2], progress=False)
