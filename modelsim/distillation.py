"""Students with teachers: whether a similar one teaches better, and whether students come to resemble them.

A *run* trains one student, with or without a teacher. A table of runs has a row for each, and columns

- `student`: a name of `STUDENTS`;
- `teacher`: a model of the zoo, `"none"`, or `"self"` for the same student, trained without a teacher;
- `seed`; `kind`: `"soft"` or `"hard"`, see `Teacher`, or `"none"` where there is no teacher;
- `accuracy`: on all test images, 0 … 1.

A table of similarities has a row for each run and each model that its student was compared with, and columns
`student`, `teacher`, `seed`, `kind`, `model`, `sat`: a student without a teacher is compared with all models
of the study, any other with its teacher and with those of `REPEATED`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pandas as pd
import torch
from torch import Tensor, nn

from modelsim import __version__
from modelsim.attacks import logits
from modelsim.catalogue import CATALOGUE, Architecture
from modelsim.compare import compare
from modelsim.images import ImageSet, check_whole, data_directory, fashion_mnist
from modelsim.scores import sat
from modelsim.study import open_study, setting_differences, versions
from modelsim.training import Kind, Recipe, Teacher, accuracy, fit, train_side_by_side
from modelsim.workers import check_workers, sole_writer
from modelsim.zoo import Classifier, assemble, load_zoo, unknown_name_message

NONE, SELF = "none", "self"

_STUDENTS = (
    Architecture(
        "deit_tiny_distilled_patch16_224", "Transformer", dict(patch_size=8, embed_dim=36, depth=3), 48
    ),
    Architecture("resnet10t", "CNN", dict(channels=(8, 16, 32, 64), stem_width=8), 48),
)

STUDENTS = {student.name: student for student in _STUDENTS}
"""Students by the name of the ImageNet model that each scales down, to less than 4 MFLOP an image."""

# A column for each base: CNN, Transformer, Hybrid, NAS, MLP-Mixer.
TEACHERS = (
    "nf_resnet50", "deit_small_patch16_224", "visformer_small", "efficientnet_b2", "resmlp_24_224",
    "resnest50d", "nest_tiny_jx", "vit_small_r26_s32_224", "swin_s3_tiny_224", "resmlp_big_24_224",
    "seresnext50_32x4d", "vit_base_patch32_224", "xcit_medium_24_p16_224", "regnety_032", "gmlp_s16_224",
    "convmixer_1536_20", "swin_tiny_patch4_window7_224", "xcit_tiny_12_p8_224", "regnetx_320",
    "ese_vovnet39b", "pit_s_224", "pit_b_224", "rexnet_150",
    "resnet101", "tnt_s_patch16_224", "twins_svt_small", "haloregnetz_b",
)  # fmt: skip
"""Six of every base, or all of it, that span it in the paper's released scores."""

REPEATED = TEACHERS[:8]
"""All students are compared with these, as a control."""

_Some = Sequence[str] | None
_KEY = ["student", "teacher", "seed", "kind"]
_RUNS, _SAT = "distillation.csv", "distillation_sat.csv"
_COLUMNS = {_RUNS: [*_KEY, "accuracy"], _SAT: [*_KEY, "model", "sat"]}


def teacher_logits(classifier: nn.Module, images: ImageSet) -> Tensor:
    """Return a classifier's logits (2, image, class) of the images and of their mirror images.

    Raises
    ------
    TypeError, ValueError
        If the classifier misbehaves (wrong shape, NaN).
    """
    canvases = images.pixels, images.pixels.flip(3)
    return torch.stack([logits(classifier, canvas, batch_size=500) for canvas in canvases])


@dataclass(frozen=True)
class Setting:
    """What all runs of one table have in common.

    Attributes
    ----------
    images : int
        Training images, evenly of all classes: few, so that there is something to learn from a teacher, which
        has seen all 60,000. The same for every run.
    recipe : Recipe
        That of the zoo, but for the number of epochs.
    temperature, weight : float
        See `Teacher`.
    attacked : int
        How many of the study's images, evenly spaced among them, students are attacked on at the most.

    Raises
    ------
    TypeError, ValueError
        If an attribute is out of range or no number, or there are fewer images than one batch.
    """

    images: int = 1000
    recipe: Recipe = field(default_factory=partial(Recipe, epochs=20))
    temperature: float = 3.0
    weight: float = 0.5
    attacked: int = 500

    def __post_init__(self) -> None:
        check_whole(images=self.images, attacked=self.attacked)
        self.recipe.steps(self.images)
        Teacher(torch.zeros(2, 1, 1), temperature=self.temperature, weight=self.weight)


@torch.inference_mode(mode=False)
def distill(
    student: str,
    teacher: nn.Module | None = None,
    *,
    kind: Kind = "soft",
    seed: int = 0,
    setting: Setting | None = None,
    progress: bool = True,
) -> Classifier:
    """Train one student.

    Examples
    --------
    >>> distill("resnet10t", load_zoo()["convnext_tiny"], seed=1)

    Parameters
    ----------
    student : str
        One of `STUDENTS`, or any architecture of the catalogue.
    teacher : nn.Module, optional
        Canvas to logits; without one, the student learns from the labels alone.
    kind : {"soft", "hard"}
        What it imitates; see `Teacher`.
    seed : int
        Of the initial weights, the order of the images and the mirroring.
    setting : Setting, optional
        The book's by default.
    progress : bool
        Show a progress bar.

    Raises
    ------
    TypeError, ValueError
        If the student is unknown, or the teacher has other classes than the images, or misbehaves.
    FloatingPointError
        If the loss or its gradient stops being finite.
    """
    known, setting, told = {**STUDENTS, **CATALOGUE}, setting or Setting(), None
    if student not in known:
        raise ValueError(unknown_name_message("student", student, known))
    classifier, images = assemble(known[student], seed=seed), fashion_mnist("train", n=setting.images)
    if teacher is not None:
        said = teacher_logits(teacher, images)
        told = Teacher(said, kind=kind, temperature=setting.temperature, weight=setting.weight)
    return fit(classifier, images, teacher=told, seed=seed, recipe=setting.recipe, progress=progress)


class Run(NamedTuple):
    """One student to train; see the head of this module."""

    student: str
    teacher: str
    seed: int
    kind: Kind | Literal["none"]

    def __str__(self) -> str:
        """Name the run in a message."""
        return f"{self.student}, teacher {self.teacher}, seed {self.seed}"


def plan(
    *, students: _Some = None, teachers: _Some = None, seeds: Sequence[int] | None = None, kind: Kind = "soft"
) -> list[Run]:
    """List runs, of all combinations; by default those of the book: `TEACHERS`, `"self"` and `"none"`.

    If neither teachers nor seeds are given, there are three seeds, else one.

    Examples
    --------
    >>> plan(students=["resnet10t"], teachers=["none", "convnext_tiny"])
    """
    seeds = seeds or ([0, 1, 2] if teachers is None else [0])
    pairs = product(seeds, teachers or (NONE, SELF, *TEACHERS), students or STUDENTS)
    runs = [Run(student, name, seed, "none" if name == NONE else kind) for seed, name, student in pairs]
    return list(dict.fromkeys(runs))


def distill_all(
    runs: Sequence[Run],
    folder: Path | None = None,
    *,
    setting: Setting | None = None,
    similarity: bool = True,
    workers: int = 1,
    scheduler: str | None = None,
) -> pd.DataFrame:
    """Do the runs that `folder` doesn't hold yet; each is on disk as soon as it is finished.

    A run that is killed and started again loses at most the students in progress. It writes
    `distillation.csv`, a table of runs, `distillation_sat.csv`, a table of similarities, and
    `distillation.json`, the settings and versions that all of them share.

    Parameters
    ----------
    runs : sequence of Run
        From `plan`.
    folder : Path, optional
        `data/fashion69` by default.
    setting : Setting, optional
        The book's by default.
    similarity : bool
        Attack every student as the study in `data/fashion69` was made, for its SAT; without, training is all.
    workers : int
        Processes that work side by side, each in one thread.
    scheduler : str, optional
        Address of a Dask scheduler whose workers are used instead; see `transfer`.

    Returns
    -------
    DataFrame
        The whole table of runs.

    Raises
    ------
    ValueError
        If a student or teacher is unknown or not in the study, a setting is out of range, or the folder's
        runs were made with other settings or versions, which are named. Nothing has been trained then.
    FileNotFoundError
        If a teacher has no weights, or there is no study.
    FloatingPointError
        If a student diverged, after all others have been finished.
    BlockingIOError
        If another run writes into the folder.
    """
    check_workers(workers, scheduler)
    folder, setting = folder or _home(), setting or Setting()
    study = _home() if similarity else None
    references = _check_runs(runs, setting, study)
    with sole_writer(folder):
        _check_same_settings(folder / "distillation.json", _settings(setting, study, references))
        table = _read(folder / _RUNS) if (folder / _RUNS).exists() else pd.DataFrame(columns=_KEY)
        there = set(table[_KEY].itertuples(index=False, name=None))
        missing = [run for run in dict.fromkeys(runs) if run not in there]
        work, store = partial(_finish, setting, study), partial(_store, folder)
        train_side_by_side(work, missing, store, workers=workers, scheduler=scheduler)
    return distillation_table(folder)


def _home() -> Path:
    return data_directory() / "fashion69"


def _check_runs(runs: Sequence[Run], setting: Setting, study: Path | None) -> list[str]:
    """Raise if a run can't be done; return the models with which students are compared."""
    known: Sequence[str] = [] if study is None else open_study(study).source.values.tolist()
    for student in {run.student for run in runs} - STUDENTS.keys():
        raise ValueError(unknown_name_message("student", student, STUDENTS))
    for kind in {run.kind for run in runs} - {NONE}:
        Teacher(torch.zeros(2, 1, 1), kind=cast("Kind", kind))
    for teacher in {run.teacher for run in runs} - {NONE, SELF}:
        load_zoo(names=[teacher])[teacher]
        if study is not None and teacher not in known:
            raise ValueError(f"{teacher!r} is not in the study {study}: add it, or leave the similarity out")
    fashion_mnist("train", n=setting.images)
    return [name for name in REPEATED if name in known]


def _settings(setting: Setting, study: Path | None, references: Sequence[str]) -> dict[str, Any]:
    """Everything that all runs of a table have in common, as it goes into `distillation.json`."""
    settings = asdict(setting)
    settings |= {f"recipe.{key}": value for key, value in settings.pop("recipe").items()}
    if study is not None:
        of_study = open_study(study).attrs
        attack = json.loads(of_study["attack_settings"])
        settings |= {f"attack.{key}": value for key, value in attack.items()}
        settings |= {"attack": of_study["attack"], "attacked images": of_study["images_sha256"]}
    settings["compared with"] = ", ".join(references)
    numbers = versions() | {"modelsim": __version__}
    return settings | {f"version of {name}": number for name, number in numbers.items()}


def _check_same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or refuse to go on with runs of others, naming each difference."""
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1, default=float) + "\n")
    if differences := setting_differences(json.loads(path.read_text()), settings):
        raise ValueError(
            f"the students in {path.parent} were made with other settings ({'; '.join(differences)}): choose "
            f"another folder, or delete {path.parent / 'distillation*'} to start anew"
        )


def _finish(setting: Setting, study: Path | None, run: Run) -> tuple[float, dict[str, float]]:
    """Train and measure one student: its accuracy, and its SAT with each model it is compared with."""
    student = _train(run, setting)
    scores = {} if study is None else _compare(student, run, study, setting.attacked)
    return accuracy(student, fashion_mnist("test")), scores


def _train(run: Run, setting: Setting) -> Classifier:
    alone = partial(distill, run.student, seed=run.seed, setting=setting, progress=False)
    if run.teacher == NONE:
        return alone()
    teacher = alone() if run.teacher == SELF else load_zoo(names=[run.teacher])[run.teacher]
    return alone(teacher, kind=cast("Kind", run.kind))


def _compare(student: Classifier, run: Run, study: Path, attacked: int) -> dict[str, float]:
    opened = open_study(study)
    wanted = {run.teacher, *(CATALOGUE if run.teacher == NONE else REPEATED)}
    names = [name for name in opened.source.values.tolist() if name in wanted]
    every = -(-opened.sizes["image"] // attacked)
    few = opened.sel(source=names, target=names).isel(image=slice(None, None, every))
    with_student = compare(student, few, name=str(run), progress=False)
    return sat(with_student).sel(model=str(run), other=names).to_series().to_dict()


def _store(folder: Path, run: Run, finished: tuple[float, dict[str, float]]) -> None:
    """Add a run to both tables, the one that says that it is finished last."""
    right, scores = finished
    if scores:
        _add(folder / _SAT, [(*run, model, round(score, 4)) for model, score in scores.items()])
    _add(folder / _RUNS, [(*run, right)])


def _add(path: Path, rows: Sequence[tuple[Any, ...]]) -> None:
    """Add rows to a table, in place of those that an interrupted run left."""
    new, key = pd.DataFrame(rows, columns=_COLUMNS[path.name]), _COLUMNS[path.name][:-1]
    table = pd.concat([_read(path), new]) if path.exists() else new
    unfinished = path.with_suffix(".partial")
    table.drop_duplicates(key, keep="last").sort_values(key).to_csv(unfinished, index=False)
    unfinished.replace(path)


def _read(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"no {path}: make it by `python -m modelsim distill`")
    table = pd.read_csv(path)
    if list(table) != _COLUMNS[path.name]:
        names = ", ".join(_COLUMNS[path.name])
        raise ValueError(f"{path} must have the columns {names}: restore it, or delete it")
    return table


def distillation_table(folder: Path | None = None) -> pd.DataFrame:
    """Read the table of runs in `folder`, by default the one that ships with the book.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it has other columns.
    """
    return _read((folder or _home()) / _RUNS)


def distillation_similarities(folder: Path | None = None) -> pd.DataFrame:
    """Read the table of similarities that goes with `distillation_table`."""
    return _read((folder or _home()) / _SAT)
