import gzip
import math
import os
import re
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from distributed import LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import modelsim as ms
from modelsim import distillation
from modelsim.__main__ import app
from modelsim.distillation import NONE, SELF, Run, Setting
from modelsim.training import Teacher, fit
from modelsim.workers import sole_writer
from modelsim.zoo import assemble, count_flops, fingerprint

DEIT, RESNET = distillation.STUDENTS
TEACHERS = ["deit_small_patch16_224", "nf_resnet50"]
QUICK = ms.Recipe(epochs=1, batch_size=4)
pytestmark = pytest.mark.filterwarnings("ignore:model '(resnet10t|mine).* its scores say little")
"""Students of a hundred images have learned too little for a score."""

SETTING = Setting(images=100, recipe=ms.Recipe(epochs=6, batch_size=32))
BASES = ["CNN", "Transformer", "Hybrid", "NAS", "MLP-Mixer"]


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


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# The losses


def test_hard_loss_is_that_computed_by_hand():
    teacher = Teacher(torch.zeros(2, 1, 2), kind="hard", weight=0.25)
    student, told = logits([0, math.log(3)]), logits([5, 9])  # probabilities 1/4 and 3/4
    loss = teacher.loss(student, torch.tensor([0]), told)
    assert float(loss) == pytest.approx(0.75 * math.log(4) + 0.25 * math.log(4 / 3))


def test_soft_loss_is_that_computed_by_hand():
    teacher = Teacher(torch.zeros(2, 1, 2), temperature=2, weight=0.4)
    student, told = logits([0, 0]), logits([0, 2 * math.log(3)])  # at temperature 2: 1/4 and 3/4
    divergence = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    loss = teacher.loss(student, torch.tensor([1]), told)
    assert float(loss) == pytest.approx(0.6 * math.log(2) + 0.4 * 4 * divergence)


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
def test_student_that_is_its_teacher_has_the_least_loss(kind):
    teacher, told = Teacher(torch.zeros(2, 1, 3), kind=kind, weight=1.0), 9 * torch.eye(3)
    labels = torch.tensor([0, 1, 2])
    assert float(teacher.loss(told, labels, told)) < 1e-3
    assert float(teacher.loss(told.roll(1, 0), labels, told)) > 1


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_class_token_learns_the_label_and_distillation_token_the_teacher(kind):
    teacher, told = Teacher(torch.zeros(2, 1, 3), kind=kind), torch.tensor([[0.0, 4.0, 0.0]])
    heads = torch.zeros(1, 3, requires_grad=True), torch.zeros(1, 3, requires_grad=True)
    teacher.loss(heads, torch.tensor([2]), told).backward()
    assert heads[0].grad.argmin() == 2
    assert heads[1].grad.argmin() == 1
    assert float(heads[0].grad[0, 1]) == float(heads[0].grad[0, 0])


# Training with a teacher


@pytest.mark.parametrize("name", [DEIT, RESNET])
def test_teacher_without_weight_changes_no_bit(name, images):
    def trained(teacher):
        student = build(name)
        return fingerprint(fit(student, images, teacher=teacher, recipe=QUICK, progress=False))

    none, weightless, taught = (
        trained(t) for t in (None, random_teacher(images, weight=0), random_teacher(images))
    )
    assert none == weightless != taught


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_teacher_with_all_the_weight_leaves_nothing_to_the_labels(kind, images):
    relabelled = ms.ImageSet(images.images, images.labels.roll(1), images.ids, images.classes, "relabelled")
    teacher, prints = random_teacher(images, kind=kind, weight=1), []
    for given_images in (images, relabelled):
        student = build(RESNET)
        prints.append(fingerprint(fit(student, given_images, teacher=teacher, recipe=QUICK, progress=False)))
    assert prints[0] == prints[1]


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


def toy(n, *, noise, seed):
    """One of three bars is bright; some of the labels are drawn at random."""
    random = torch.Generator().manual_seed(seed)
    pixels, truth = 0.4 * torch.rand(n, 1, 8, 8, generator=random), torch.arange(n) % 3
    for image, label in zip(pixels, truth.tolist(), strict=True):
        image[0, 3 * label : 3 * label + 2] += 0.6
    wrong = torch.rand(n, generator=random) < noise
    labels = torch.where(wrong, torch.randint(3, (n,), generator=random), truth)
    return ms.ImageSet(pixels, labels, tuple(map(str, range(n))), tiny.CLASSES, "toy")


class Oracle(nn.Module):
    """Sees the bar."""

    def forward(self, canvas):
        bars = [canvas[:, 0, row : row + 2].mean((1, 2)) for row in (0, 3, 6)]
        return 20 * torch.stack(bars, dim=1)


@pytest.mark.parametrize("name", [DEIT, RESNET])
def test_teacher_that_knows_lifts_a_student_whose_labels_are_noisy(name):
    noisy, clean = toy(96, noise=0.8, seed=0), toy(90, noise=0, seed=1)
    assert ms.accuracy(Oracle(), clean) == 1
    told = distillation.teacher_logits(Oracle(), noisy)
    alone, soft, hard = (
        ms.accuracy(
            fit(build(name), noisy, teacher=teacher, recipe=ms.Recipe(epochs=10, batch_size=16)), clean
        )
        for teacher in (None, Teacher(told, weight=0.8), Teacher(told, kind="hard", weight=0.8))
    )
    assert min(soft, hard) > 0.9
    assert alone < 0.6


# Students and teachers


@pytest.mark.parametrize("name", [DEIT, RESNET])
def test_students_are_small_depend_on_their_seed_and_are_not_in_the_zoo(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (distillation.build_student(name, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert count_flops(one) <= 4e6
    assert name not in ms.CATALOGUE


def test_any_architecture_of_the_catalogue_can_be_a_student(home):
    setting, teacher = Setting(images=20, recipe=QUICK), tiny.linear(1, n_classes=10, pixels=784)
    alone, taught = (distillation.distill("pit_s_224", t, setting=setting) for t in (None, teacher))
    assert fingerprint(alone) != fingerprint(taught)
    assert taught(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_the_books_plan_is_what_the_page_says():
    runs = distillation.plan()
    assert {run.student for run in runs} == set(distillation.STUDENTS)
    everyone = product(distillation.STUDENTS, (NONE, SELF, *distillation.TEACHERS), range(3))
    assert sorted(run[:3] for run in runs) == sorted(everyone)
    bases = pd.Series([ms.CATALOGUE[name].base for name in distillation.TEACHERS])
    assert bases.value_counts().to_dict() == dict(zip(BASES, (6, 6, 6, 6, 3), strict=True))
    assert {ms.CATALOGUE[name].base for name in distillation.REPEATED} == set(BASES)


def test_shipped_table_holds_every_run_of_the_books_plan_once():
    shipped = distillation.distillation_table(Path(__file__).parents[1] / "data" / "fashion69")
    columns = ["student", "teacher", "seed", "kind"]
    assert sorted(shipped[columns].itertuples(index=False, name=None)) == sorted(distillation.plan())


def test_plan_of_ones_own_has_every_combination_and_no_kind_without_a_teacher():
    runs = distillation.plan(students=[RESNET], teachers=[NONE, "resnet50"], seeds=[3, 4], kind="hard")
    expected = {(RESNET, NONE, s, NONE) for s in (3, 4)} | {(RESNET, "resnet50", s, "hard") for s in (3, 4)}
    assert set(runs) == expected


# What teachers say


def test_logits_are_those_of_the_images_and_of_their_mirror_images(images):
    classifier = tiny.mlp(2)  # with dropout: evaluation mode matters
    told = distillation.teacher_logits(classifier, images)
    classifier.eval()
    torch.testing.assert_close(told[0], classifier(images.images).detach())
    torch.testing.assert_close(told[1], classifier(images.images.flip(3)).detach())


# Tables


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data folder of 100 training and 50 test images, two teachers, and their study."""
    folder, shipped = tmp_path_factory.mktemp("data"), ms.data_directory() / "fashion69" / "weights"
    (folder / "fashion-mnist").mkdir()
    (folder / "fashion69" / "weights").mkdir(parents=True)
    for stem, n, seed in (("train", 100, 0), ("t10k", 50, 1)):
        images = ms.fashion_mnist("test", n=n, seed=seed)
        pixels = (images.images[:, 0] * 255).round().numpy()
        write_idx(folder / "fashion-mnist" / f"{stem}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / "fashion-mnist" / f"{stem}-labels-idx1-ubyte.gz", images.labels.numpy())
    for name in TEACHERS:
        (folder / "fashion69" / "weights" / f"{name}.safetensors").symlink_to(shipped / f"{name}.safetensors")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MODELSIM_DATA", str(folder))
        attack = partial(ms.pgd, eps=0.1, steps=2, step_size=0.05)
        ms.transfer(
            ms.load_zoo(names=TEACHERS),
            ms.fashion_mnist("test"),
            attack,
            folder / "fashion69",
            progress=False,
        )
        yield folder


RUNS = distillation.plan(students=[RESNET], teachers=[NONE, SELF, *TEACHERS], seeds=[0, 1])


def distill_all(folder, runs=RUNS, **changed):
    return distillation.distill_all(runs, folder, **(dict(setting=SETTING) | changed))


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    distill_all(folder)
    return folder


def test_every_run_is_a_row(made):
    table = distillation.distillation_table(made)
    rows = {Run(*row) for row in table[["student", "teacher", "seed", "kind"]].itertuples(index=False)}
    assert rows == set(RUNS)
    assert table.accuracy.between(0, 1).all()


def test_similarities_are_those_of_compare(made):
    study = ms.open_study(ms.data_directory() / "fashion69")
    table = distillation.distillation_similarities(made).set_index(["teacher", "seed", "model"]).sat
    assert len(table) == len(RUNS) * len(TEACHERS)
    assert table.index.is_unique
    student = partial(distillation.distill, RESNET, setting=SETTING, seed=1, progress=False)
    teacher = ms.load_zoo(names=TEACHERS)[TEACHERS[0]]
    for classifier, name in ((student(), NONE), (student(teacher), TEACHERS[0])):
        score = ms.sat(ms.compare(classifier, study, progress=False)).sel(model="mine")
        for model in TEACHERS:
            assert table[name, 1, model] == pytest.approx(float(score.sel(other=model)), abs=1e-4)


def test_students_may_be_attacked_on_some_of_the_images(home, tmp_path):
    distill_all(tmp_path, [Run(RESNET, NONE, 1, NONE)], setting=Setting(100, SETTING.recipe, attacked=20))
    part = ms.open_study(home / "fashion69").isel(image=slice(0, 50, 3))
    student = distillation.distill(RESNET, setting=SETTING, seed=1, progress=False)
    expected = ms.sat(ms.compare(student, part, name="resnet10t", progress=False)).sel(model="resnet10t")
    table = distillation.distillation_similarities(tmp_path).set_index("model").sat
    for name in TEACHERS:
        assert table[name] == pytest.approx(float(expected.sel(other=name)), abs=1e-4)


def test_self_distillation_is_by_the_same_student_without_a_teacher(made):
    row = distillation.distillation_table(made).set_index(["teacher", "seed"]).loc[(SELF, 1)]
    student = partial(distillation.distill, RESNET, setting=SETTING, seed=1, progress=False)
    twice = student(student())
    assert fingerprint(twice) != fingerprint(student())
    assert row.accuracy == pytest.approx(ms.accuracy(twice, ms.fashion_mnist("test")))


def test_order_of_runs_and_number_of_calls_change_no_number(made, tmp_path):
    runs = [run for run in RUNS if run.teacher != SELF]
    for run in runs[::-1]:
        distill_all(tmp_path, [run])
    whole = distillation.distillation_table(made)
    expected = whole[whole.teacher != SELF].reset_index(drop=True)
    pd.testing.assert_frame_equal(distillation.distillation_table(tmp_path), expected)


@pytest.mark.parametrize("afar", [False, True])
def test_two_workers_and_a_cluster_make_the_same_tables(made, tmp_path, afar):
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, memory_limit=None, dashboard_address="127.0.0.1:0")
        if afar
        else nullcontext()
    ) as cluster:
        where = dict(scheduler=cluster.scheduler_address) if afar else dict(workers=2)
        distill_all(tmp_path, [run for run in RUNS if run.teacher in (NONE, TEACHERS[1])], **where)
    for read in (distillation.distillation_table, distillation.distillation_similarities):
        whole = read(made)
        expected = whole[whole.teacher.isin([NONE, TEACHERS[1]])].reset_index(drop=True)
        pd.testing.assert_frame_equal(read(tmp_path), expected)
    assert (tmp_path / "distillation.json").read_bytes() == (made / "distillation.json").read_bytes()


def test_run_asked_for_twice_is_done_once(home, tmp_path):
    run = Run(RESNET, NONE, 0, NONE)
    assert len(distill_all(tmp_path, [run, run], similarity=False)) == 1


def test_folder_that_another_run_writes_into_is_refused(home, tmp_path):
    with sole_writer(tmp_path), pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
        distill_all(tmp_path, RUNS[:1], similarity=False)
    assert not list(tmp_path.glob("distillation*"))


@pytest.mark.parametrize("error", [FloatingPointError, ValueError])
def test_student_that_fails_is_named_after_the_others_are_finished(home, tmp_path, monkeypatch, error):
    train = distillation.distill

    def diverging(student, teacher=None, *, seed, **options):
        if seed == 1:
            raise error("loss is nan")
        return train(student, teacher, seed=seed, **options)

    monkeypatch.setattr(distillation, "distill", diverging)
    runs = [Run(RESNET, NONE, seed, NONE) for seed in (1, 0, 2)]
    message = "resnet10t, teacher none, seed 1: loss is nan. The 2 others are trained"
    with pytest.raises(FloatingPointError, match=message):
        distill_all(tmp_path, runs, similarity=False)
    assert set(distillation.distillation_table(tmp_path).seed) == {0, 2}
    monkeypatch.setattr(distillation, "distill", train)
    assert len(distill_all(tmp_path, runs, similarity=False)) == 3


def test_interrupted_command_keeps_what_is_finished_and_does_only_the_rest(home, tmp_path, monkeypatch):
    finish, asked = distillation._finish, []

    def interrupted(setting, study, run):
        if asked:
            raise KeyboardInterrupt
        asked.append(run)
        return finish(setting, study, run)

    with monkeypatch.context() as patched:
        patched.setattr(distillation, "_finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill_all(tmp_path, RUNS[:3], similarity=False)
    assert len(distillation.distillation_table(tmp_path)) == 1
    again = []
    monkeypatch.setattr(distillation, "_finish", lambda *given: again.append(given[2]) or finish(*given))
    assert len(distill_all(tmp_path, RUNS[:3], similarity=False)) == 3
    assert again == RUNS[1:3]


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (dict(setting=Setting(90, SETTING.recipe)), "images: 100 there, 90 now"),
        (dict(setting=Setting(100, ms.Recipe(epochs=2, batch_size=32))), "recipe.epochs: 6 there, 2 now"),
        (dict(setting=Setting(100, SETTING.recipe, weight=1)), "weight: 0.5 there, 1 now"),
        (dict(similarity=False), "attack: modelsim.attacks.pgd there, absent now"),
    ],
)
def test_other_settings_are_refused_naming_the_difference(made, changed, difference, monkeypatch):
    monkeypatch.setattr(distillation, "_finish", None)
    before = (made / "distillation.csv").read_bytes()
    with pytest.raises(ValueError, match=re.escape(difference)):
        distill_all(made, [Run(RESNET, NONE, 7, NONE)], **changed)
    assert (made / "distillation.csv").read_bytes() == before


def test_other_versions_are_refused_naming_them(made, monkeypatch):
    real = distillation.version
    monkeypatch.setattr(distillation, "version", lambda p: "9.9" if p == "timm" else real(p))
    with pytest.raises(ValueError, match=r"version of timm: \S+ there, 9\.9 now"):
        distill_all(made)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="warm"), "kind must be 'soft' or 'hard', got 'warm'"),
        (dict(temperature=0), "temperature must be greater than 0, got 0"),
        (dict(temperature=math.nan), "temperature must be greater than 0, got nan"),
        (dict(weight=-0.1), "weight must be at least 0, got -0.1"),
        (dict(weight=1.1), "weight must be at most 1, got 1.1"),
        (dict(logits=torch.zeros(12, 3)), "got (12, 3)"),
        (dict(logits=torch.zeros(3, 12, 3)), "got (3, 12, 3)"),
        (dict(logits=torch.full((2, 12, 3), math.nan)), "must be finite"),
    ],
)
def test_impossible_teacher_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Teacher(**(dict(logits=torch.zeros(2, 12, 3)) | options))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 12, 4), "are for (images, classes) (12, 4), the images are (12, 3)"),
        ((2, 11, 3), "are for (images, classes) (11, 3), the images are (12, 3)"),
    ],
)
def test_teacher_of_other_classes_or_images_is_refused(shape, message, images):
    student = build(RESNET)
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(student, images, teacher=Teacher(torch.zeros(shape)), recipe=QUICK, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(images=0), "images must be at least 1, got 0"),
        (dict(images=100.0), "images must be a whole number, got 100.0"),
        (dict(attacked=-1), "attacked must be at least 1, got -1"),
        (dict(temperature=-1), "temperature must be greater than 0, got -1"),
        (dict(weight=2), "weight must be at most 1, got 2"),
        (dict(images=60), "60 images are fewer than one batch of 64"),
    ],
)
def test_impossible_setting_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        Setting(**options)


def test_student_or_teacher_that_cannot_be_is_refused(home):
    with pytest.raises(ValueError, match="unknown student 'resnet10': did you mean 'resnet10t'"):
        distillation.distill("resnet10", setting=SETTING)
    with pytest.raises(ValueError, match=re.escape("(100, 4), the images are (100, 10)")):
        distillation.distill(RESNET, tiny.linear(1, n_classes=4, pixels=784), setting=SETTING)


@pytest.mark.parametrize(
    ("runs", "changed", "error", "message"),
    [
        ([Run("resnet50", NONE, 0, NONE)], {}, ValueError, "unknown student 'resnet50'"),
        ([Run(RESNET, "nf_resnet5O", 0, "soft")], {}, ValueError, "did you mean 'nf_resnet50'"),
        ([Run(RESNET, "resnet50", 0, "soft")], {}, ValueError, "'resnet50' is not in the study"),
        ([Run(RESNET, "resnet50", 0, "soft")], dict(similarity=False), FileNotFoundError, "train resnet50"),
        ([Run(RESNET, SELF, 0, "warm")], {}, ValueError, "got 'warm'"),
        ([Run(RESNET, SELF, 0, "soft")], dict(setting=Setting(95)), ValueError, "multiple of the 10 classes"),
    ],
)
def test_run_that_cannot_be_is_refused_before_anything_is_trained(
    runs, changed, error, message, home, tmp_path, monkeypatch
):
    monkeypatch.setattr(distillation, "_finish", None)
    folder = tmp_path / "new"
    with pytest.raises(error, match=message):
        distill_all(folder, [Run(RESNET, NONE, 0, NONE), *runs], **changed)
    assert not folder.exists()


def test_missing_and_foreign_tables_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="make it by `python -m modelsim distill`"):
        distillation.distillation_table(tmp_path)
    (tmp_path / "distillation.csv").write_text("student,gain\n")
    with pytest.raises(ValueError, match=r"distillation\.csv must have the columns student, teacher, seed"):
        distillation.distillation_table(tmp_path)


# The command


def test_command_trains_what_its_options_say(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given_options = ["--student", RESNET, "--teacher", NONE, "--teacher", TEACHERS[1], "--seed", "3"]
    small = ["--images", "100", "--epochs", "1", "--kind", "hard", "--no-similarity", "--out", "mine"]
    result = CliRunner().invoke(app, ["distill", *given_options, *small])
    assert result.exit_code == 0, result.output
    table = distillation.distillation_table(tmp_path / "mine")
    expected = [(RESNET, TEACHERS[1], 3, "hard"), (RESNET, NONE, 3, NONE)]
    assert sorted(table.iloc[:, :4].itertuples(index=False, name=None)) == sorted(expected)


def test_help_of_the_command_shows_its_examples():
    result = CliRunner().invoke(app, ["distill", "--help"], env={"COLUMNS": "200"})
    assert "python -m modelsim distill --workers 2" in result.output
    assert "--student resnet10t --teacher none --teacher convnext_tiny --out runs/mine" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student", "resnet10"], "unknown student 'resnet10': did you mean 'resnet10t'"),
        (["--teacher", "resnet5O"], "unknown teacher 'resnet5O': did you mean 'resnet50'"),
        (["--temperature", "0"], "temperature must be greater than 0, got 0.0"),
        (["--images", "7"], "7 images are fewer than one batch of 64"),
    ],
)
def test_mistake_ends_with_code_2_and_one_plain_line(options, message, home):
    result = CliRunner().invoke(app, ["distill", *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
