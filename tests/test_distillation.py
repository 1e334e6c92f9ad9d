import math
import re
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import modelsim as ms
from modelsim import distillation
from modelsim.distillation import NONE, SELF, Run, Setting
from modelsim.training import Teacher, fit
from modelsim.zoo import assemble, count_flops, fingerprint

DEIT, RESNET = distillation.STUDENTS
TEACHERS = ["deit_small_patch16_224", "nf_resnet50"]
BASES = ["CNN", "Transformer", "Hybrid", "NAS", "MLP-Mixer"]
QUICK = ms.Recipe(epochs=1, batch_size=4)
SETTING = Setting(images=100, recipe=ms.Recipe(epochs=6, batch_size=32))
pytestmark = pytest.mark.filterwarnings("ignore:model '(resnet10t|mine).* its scores say little")
"""Students of a hundred images have learned too little for a score."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Students are too small to share out: several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_teacher(images, *, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return Teacher(torch.randn(2, len(images), len(images.classes), generator=generator), **options)


def build(name):
    return assemble(distillation.STUDENTS[name], n_classes=3)


def test_hard_loss_is_that_computed_by_hand():
    teacher = Teacher(torch.zeros(2, 1, 2), kind="hard", weight=0.25)
    student, told = torch.tensor([[0, math.log(3)]]), torch.tensor([[5, 9]])  # probabilities 1/4 and 3/4
    loss = teacher.loss(student, torch.tensor([0]), told)
    assert float(loss) == pytest.approx(0.75 * math.log(4) + 0.25 * math.log(4 / 3))


@given(seed=st.integers(0, 999), temperature=st.floats(0.5, 20), weight=st.floats(0, 1))
def test_soft_loss_agrees_with_torchs_divergence_of_probabilities(seed, temperature, weight):
    random = torch.Generator().manual_seed(seed)
    student, told = torch.randn(2, 7, 5, generator=random, dtype=torch.float64) * 3
    labels = torch.randint(5, (7,), generator=random)
    divergence = nn.KLDivLoss(reduction="none")(
        torch.log(torch.softmax(student / temperature, 1)), torch.softmax(told / temperature, 1)
    )
    own = -torch.softmax(student, 1).log()[range(7), labels].mean()
    expected = (1 - weight) * own + weight * temperature**2 * divergence.sum() / 7
    loss = Teacher(torch.zeros(2, 1, 5), temperature=temperature, weight=weight).loss(student, labels, told)
    assert float(loss) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_class_token_learns_the_label_and_distillation_token_the_teacher(kind):
    teacher, told = Teacher(torch.zeros(2, 1, 3), kind=kind), torch.tensor([[0.0, 4.0, 0.0]])
    heads = torch.zeros(2, 1, 3, requires_grad=True)
    teacher.loss((heads[0], heads[1]), torch.tensor([2]), told).backward()
    assert heads.grad.argmin(dim=2).flatten().tolist() == [2, 1]
    assert float(heads.grad[0, 0, 1]) == float(heads.grad[0, 0, 0])


@pytest.mark.parametrize(("name", "kind"), [(DEIT, "soft"), (RESNET, "hard")])
def test_teacher_of_no_weight_changes_no_bit_and_one_of_all_leaves_nothing_to_the_labels(name, kind, images):
    relabelled = ms.ImageSet(images.images, images.labels.roll(1), images.ids, images.classes, "relabelled")

    def trained(weight=None, of=images):
        teacher = None if weight is None else random_teacher(images, kind=kind, weight=weight)
        return fit(build(name), of, teacher=teacher, recipe=QUICK, progress=False)

    assert fingerprint(trained()) == fingerprint(trained(0)) != fingerprint(trained(0.5))
    if name == RESNET:  # the other's class token learns the label alone
        assert fingerprint(trained(1)) == fingerprint(trained(1, relabelled))


def test_student_is_told_of_the_very_image_that_it_sees_mirrored_or_not(images):
    seen, heard = [], []

    class Recorded(Teacher):
        def loss(self, student, labels, told):
            heard.append(told)
            return super().loss(student, labels, told)

    side, position = torch.meshgrid(torch.arange(2.0), torch.arange(12.0), indexing="ij")
    teacher = Recorded(torch.stack([side, position, side], dim=2))
    student = build(RESNET)
    student.register_forward_pre_hook(lambda _, canvas: seen.append(canvas[0]))
    fit(student, images, teacher=teacher, recipe=ms.Recipe(epochs=3, batch_size=4), progress=False)
    told = torch.cat(heard)
    for image, (mirrored, place, _) in zip(torch.cat(seen), told.tolist(), strict=True):
        original = images.images[int(place)]
        assert torch.equal(image, original.flip(2) if mirrored else original)
    assert set(told[:, 0].tolist()) == {0, 1}


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("name", [DEIT, RESNET])
def test_teacher_that_knows_lifts_a_student_whose_labels_are_noisy(name, kind):
    """One of three bars is bright; most of the labels are drawn at random."""
    random, truth = torch.Generator().manual_seed(0), torch.arange(96) % 3
    pixels = 0.4 * torch.rand(96, 1, 8, 8, generator=random)
    for image, label in zip(pixels, truth.tolist(), strict=True):
        image[0, 3 * label : 3 * label + 2] += 0.6
    noisy = torch.where(
        torch.rand(96, generator=random) < 0.8, truth[torch.randperm(96, generator=random)], truth
    )
    noisy, clean = (
        ms.ImageSet(pixels, y, tuple(map(str, range(96))), tiny.CLASSES, "toy") for y in (noisy, truth)
    )
    told = Teacher(20 * torch.eye(3)[truth].expand(2, 96, 3), kind=kind, weight=0.8)
    recipe = ms.Recipe(epochs=10, batch_size=16)
    alone, taught = (
        ms.accuracy(fit(build(name), noisy, teacher=t, recipe=recipe), clean) for t in (None, told)
    )
    assert alone < 0.6 < 0.9 < taught


@pytest.mark.parametrize("name", [DEIT, RESNET])
def test_students_are_small_depend_on_their_seed_and_are_not_in_the_zoo(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (assemble(distillation.STUDENTS[name], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert count_flops(one) <= 4e6
    assert name not in ms.CATALOGUE


def test_any_architecture_of_the_catalogue_can_be_a_student(home):
    setting, teacher = Setting(images=20, recipe=QUICK), tiny.linear(1, n_classes=10, pixels=784)
    alone, taught = (distillation.distill("pit_s_224", t, setting=setting) for t in (None, teacher))
    assert fingerprint(alone) != fingerprint(taught)
    with pytest.raises(ValueError, match="unknown student 'resnet10': did you mean 'resnet10t'"):
        distillation.distill("resnet10", setting=setting)


def test_shipped_table_holds_each_student_teacher_and_seed_once():
    runs = distillation.plan()
    everyone = product(distillation.STUDENTS, (NONE, SELF, *distillation.TEACHERS), range(3))
    assert sorted(run[:3] for run in runs) == sorted(everyone)
    bases = [ms.CATALOGUE[name].base for name in distillation.TEACHERS]
    assert [bases.count(base) for base in BASES] == [6, 6, 6, 6, 3]
    shipped = distillation.distillation_table(Path(__file__).parents[1] / "data" / "fashion69")
    assert sorted(shipped.iloc[:, :4].itertuples(index=False, name=None)) == sorted(runs)


def test_logits_are_those_of_the_images_and_of_their_mirror_images(images):
    classifier = tiny.mlp(2)  # with dropout: evaluation mode matters
    told = distillation.teacher_logits(classifier, images)
    classifier.eval()
    torch.testing.assert_close(told[0], classifier(images.images).detach())
    torch.testing.assert_close(told[1], classifier(images.images.flip(3)).detach())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A study of two teachers on 50 images; students see a hundred others."""
    folder = tmp_path_factory.mktemp("home")
    images = {"train": ms.fashion_mnist("test", n=100), "test": ms.fashion_mnist("test", n=50, seed=1)}
    attack = partial(ms.pgd, eps=0.1, steps=2, step_size=0.05)
    ms.transfer(ms.load_zoo(names=TEACHERS), images["test"], attack, folder, progress=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distillation, "_home", lambda: folder)
        patched.setattr(distillation, "fashion_mnist", lambda split, n=None: images[split])
        yield folder


RUNS = distillation.plan(students=[RESNET], teachers=[NONE, SELF, *TEACHERS], seeds=[0, 1])
READ = distillation.distillation_table, distillation.distillation_similarities


def distill_all(folder, runs=RUNS, **changed):
    return distillation.distill_all(runs, folder, **(dict(setting=SETTING) | changed))


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    distill_all(folder)
    return folder


@pytest.mark.parametrize("attacked", [500, 20])
def test_accuracies_and_similarities_are_those_of_accuracy_and_compare(home, made, attacked, tmp_path):
    folder = made if attacked == 500 else tmp_path
    runs = [Run(RESNET, NONE, 1, NONE), Run(RESNET, TEACHERS[0], 1, "soft"), Run(RESNET, SELF, 1, "soft")]
    distill_all(folder, runs, setting=Setting(100, SETTING.recipe, attacked=attacked))
    runs, sats = (read(folder).set_index(["teacher", "seed"]) for read in READ)
    few = ms.open_study(home).isel(image=slice(None, None, 1 if attacked == 500 else 3))
    student = partial(distillation.distill, RESNET, setting=SETTING, seed=1, progress=False)
    teacher = ms.load_zoo(names=TEACHERS)[TEACHERS[0]]
    for classifier, name in ((student(), NONE), (student(teacher), TEACHERS[0]), (student(student()), SELF)):
        assert runs.accuracy[name, 1] == ms.accuracy(classifier, distillation.fashion_mnist("test"))
        score = ms.sat(ms.compare(classifier, few, progress=False)).sel(model="mine", other=TEACHERS)
        assert sats.loc[(name, 1)].set_index("model").sat[TEACHERS].tolist() == pytest.approx(
            score.values.tolist(), abs=1e-4
        )


def test_failed_and_interrupted_runs_leave_the_others_and_are_done_again(home, made, tmp_path, monkeypatch):
    finish, asked = distillation._finish, []

    def failing(setting, study, run):
        asked.append(run)
        if len(asked) == 1:
            raise FloatingPointError("loss is nan")
        if len(asked) == 4:
            raise KeyboardInterrupt
        return finish(setting, study, run)

    monkeypatch.setattr(distillation, "_finish", failing)
    with pytest.raises(FloatingPointError, match=f"{RUNS[0]}: loss is nan. The 1 others"):
        distill_all(tmp_path, [*RUNS[:2], RUNS[1]])
    with pytest.raises(KeyboardInterrupt):
        distill_all(tmp_path, RUNS[:4][::-1])
    distill_all(tmp_path)
    assert asked == [*RUNS[:2], RUNS[3], RUNS[2], RUNS[0], RUNS[2], *RUNS[4:]]
    for read in READ:
        pd.testing.assert_frame_equal(read(tmp_path), read(made))


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (dict(setting=Setting(90, SETTING.recipe)), "images: 100 there, 90 now"),
        (dict(setting=Setting(100, ms.Recipe(2, 32))), "recipe.epochs: 6 there, 2 now"),
        (dict(similarity=False), "attack: modelsim.attacks.pgd there, absent now"),
    ],
)
def test_other_settings_are_refused_naming_the_difference(made, changed, difference):
    before = (made / "distillation.csv").read_bytes()
    with pytest.raises(ValueError, match=re.escape(difference)):
        distill_all(made, [Run(RESNET, NONE, 7, NONE)], **changed)
    assert (made / "distillation.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="warm"), "kind must be 'soft' or 'hard', got 'warm'"),
        (dict(temperature=0), "temperature must be greater than 0, got 0"),
        (dict(weight=1.1), "weight must be at most 1, got 1.1"),
        (dict(logits=torch.zeros(3, 12, 3)), "got (3, 12, 3)"),
        (dict(logits=torch.full((2, 12, 3), math.nan)), "must be finite"),
        (dict(logits=torch.zeros(2, 11, 4)), "are for (images, classes) (11, 4), the images are (12, 3)"),
    ],
)
def test_impossible_teacher_is_refused(options, message, images):
    given_logits = dict(logits=torch.zeros(2, 12, 3)) | options
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(build(RESNET), images, teacher=Teacher(**given_logits), recipe=QUICK)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (Run("resnet50", NONE, 0, NONE), ValueError, "unknown student 'resnet50'"),
        (Run(RESNET, "nf_resnet5O", 0, "soft"), ValueError, "did you mean 'nf_resnet50'"),
        (Run(RESNET, "resnet50", 0, "soft"), ValueError, "'resnet50' is not in the study"),
        (Run(RESNET, "resnet50-seed7", 0, "soft"), FileNotFoundError, "train resnet50-seed7"),
        (Run(RESNET, SELF, 0, "warm"), ValueError, "got 'warm'"),
    ],
)
def test_run_that_cannot_be_is_refused_before_anything_is_trained(run, error, message, home, tmp_path):
    with pytest.raises(error, match=message):
        distill_all(tmp_path / "new", [Run(RESNET, NONE, 0, NONE), run])
    assert not (tmp_path / "new").exists()


def test_missing_and_foreign_tables_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="make it by `python -m modelsim distill`"):
        distillation.distillation_table(tmp_path)
    (tmp_path / "distillation.csv").write_text("student,gain\n")
    with pytest.raises(ValueError, match=r"distillation\.csv must have the columns student, teacher, seed"):
        distillation.distillation_table(tmp_path)
