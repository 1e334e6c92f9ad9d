"""Students with teachers: whether a similar one teaches better, and whether students come to resemble them.

A *run* trains one student, with or without a teacher. A table of runs has a row for each, and columns

- `student`: a name of `STUDENTS`;
- `teacher`: a model of the zoo, `"none"`, or `"self"` for the same student, trained without a teacher;
- `seed`; `kind`: `"soft"` or `"hard"`, see `Teacher`, or `"none"` where there is no teacher;
- `accuracy`: on all test images, 0 … 1; `gain`: accuracy less the mean of this student without a teacher;
- `sat_before`, `sat_after`: SAT with the teacher, log of per cent, of the student of the same seed without a
  teacher, and of this student; empty where there is nothing to compare;
- `seconds`: wall time of the run, training, test and attack included.

A table of similarities has a row for each run and each model that its student was compared with, and columns
`student`, `teacher`, `seed`, `kind`, `model`, `sat`: a student without a teacher is compared with all models
of the study, any other with its teacher and with those of `REPEATED`.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import bootstrap, false_discovery_control
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from modelsim import __version__
from modelsim.agreement import cosine, residual_ranks
from modelsim.attacks import logits
from modelsim.catalogue import CATALOGUE, Architecture
from modelsim.clustering import distance
from modelsim.compare import compare
from modelsim.images import ImageSet, check_whole, data_directory, fashion_mnist
from modelsim.scores import sat
from modelsim.study import open_study, setting_differences
from modelsim.training import Kind, Recipe, Teacher, accuracy, fit, train_side_by_side
from modelsim.workers import check_workers, sole_writer
from modelsim.zoo import Classifier, assemble, load_zoo, split_model_name, unknown_name_message

Floats = NDArray[np.floating]

NONE, SELF = "none", "self"

STUDENTS: dict[str, Architecture] = {
    student.name: student
    for student in (
        Architecture(
            "deit_tiny_distilled_patch16_224", "Transformer", dict(patch_size=8, embed_dim=36, depth=3), 48
        ),
        Architecture("resnet10t", "CNN", dict(channels=(8, 16, 32, 64), stem_width=8), 48),
    )
}
"""Students by the name of the ImageNet model that each scales down, to less than 4 MFLOP an image."""

TEACHERS = (
    "nf_resnet50",
    "deit_small_patch16_224",
    "visformer_small",
    "efficientnet_b2",
    "resmlp_24_224",
    "resnest50d",
    "nest_tiny_jx",
    "vit_small_r26_s32_224",
    "swin_s3_tiny_224",
    "resmlp_big_24_224",
    "seresnext50_32x4d",
    "vit_base_patch32_224",
    "xcit_medium_24_p16_224",
    "regnety_032",
    "gmlp_s16_224",
    "convmixer_1536_20",
    "swin_tiny_patch4_window7_224",
    "xcit_tiny_12_p8_224",
    "regnetx_320",
    "ese_vovnet39b",
    "pit_s_224",
    "pit_b_224",
    "rexnet_150",
    "resnet101",
    "tnt_s_patch16_224",
    "twins_svt_small",
    "haloregnetz_b",
)
"""Six of every base, or all of it: what `choose_teachers` makes of the paper's released scores."""

REPEATED = TEACHERS[:8]
"""All students are compared with these, as a control."""

_KEY = ["student", "teacher", "seed", "kind"]
_COLUMNS = [*_KEY, "accuracy", "gain", "sat_before", "sat_after", "seconds"]
_ACROSS = ("CNN", "Transformer", "MLP-Mixer", "Hybrid", "NAS")


def choose_teachers(
    similarity: xr.DataArray, bases: Mapping[str, str], counts: Mapping[str, int]
) -> tuple[str, ...]:
    """Choose models of every base that span it, in turn from each base.

    The first of a base is the one nearest to all others of it; each further one is the one whose nearest
    among those chosen is farthest away.

    Examples
    --------
    >>> counts = {"CNN": 8, "Transformer": 8, "Hybrid": 8, "NAS": 8, "MLP-Mixer": 3}
    >>> choose_teachers(published_sat(), {name: a.base for name, a in CATALOGUE.items()}, counts)

    Parameters
    ----------
    similarity : DataArray
        Symmetric (model, other), such as SAT; see `distance`.
    bases : mapping
        Base of every model.
    counts : mapping
        How many to choose of each base.

    Raises
    ------
    ValueError
        If a base has fewer models than that.
    """
    apart = distance(similarity).to_pandas()
    spans = []
    for base, count in counts.items():
        members = [name for name in apart.index if bases[name] == base]
        if len(members) < count:
            raise ValueError(f"{count} models of base {base} are asked for, there are {len(members)}")
        within = apart.loc[members, members]
        chosen = [within.mean().idxmin()]
        while len(chosen) < count:
            chosen.append(within[chosen].min(axis=1).idxmax())
        spans.append(chosen)
    turns = range(max(counts.values()))
    return tuple(str(span[turn]) for turn in turns for span in spans if turn < len(span))


def build_student(name: str, *, seed: int = 0) -> Classifier:
    """Build an untrained student: one of `STUDENTS`, or any architecture of the catalogue.

    Raises
    ------
    ValueError
        If the name is neither; the message suggests the nearest names.
    """
    known = {**STUDENTS, **CATALOGUE}
    if name not in known:
        raise ValueError(unknown_name_message("student", name, known))
    return assemble(known[name], seed=seed)


def teacher_logits(classifier: nn.Module, images: ImageSet) -> Tensor:
    """Return a classifier's logits (2, image, class) of the images and of their mirror images.

    Raises
    ------
    TypeError, ValueError
        If the classifier misbehaves (wrong shape, NaN).
    """
    canvases = images.images, images.images.flip(3)
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
    setting = setting or Setting()
    images = fashion_mnist("train", n=setting.images)
    classifier, told = build_student(student, seed=seed), None
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
    *,
    students: Sequence[str] | None = None,
    teachers: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    kind: Kind = "soft",
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
        finished = _read(folder / "distillation.csv", _COLUMNS)
        there = set(finished[_KEY].itertuples(index=False, name=None))
        missing = [run for run in dict.fromkeys(runs) if tuple(run) not in there]
        work, store = partial(_finish, setting, study), partial(_store, folder)
        train_side_by_side(work, missing, store, workers=workers, scheduler=scheduler)
    return distillation_table(folder)


def _home() -> Path:
    return data_directory() / "fashion69"


def _check_runs(runs: Sequence[Run], setting: Setting, study: Path | None) -> list[str]:
    """Raise if a run can't be done; return the models with which students are compared."""
    known: Sequence[str] = [] if study is None else open_study(study).source.values.tolist()
    for run in runs:
        if run.student not in STUDENTS:
            raise ValueError(unknown_name_message("student", run.student, STUDENTS))
        if run.teacher != NONE:
            Teacher(torch.zeros(2, 1, 1), kind=cast("Kind", run.kind))
    for teacher in dict.fromkeys(run.teacher for run in runs if run.teacher not in (NONE, SELF)):
        if split_model_name(teacher)[0] not in CATALOGUE:
            raise ValueError(unknown_name_message("teacher", teacher, [NONE, SELF, *CATALOGUE]))
        if study is not None and teacher not in known:
            raise ValueError(
                f"teacher {teacher!r} is not in the study {study}: choose another one, finish the "
                "study by `python -m modelsim transfer`, or leave the similarity out"
            )
        load_zoo(names=[teacher])[teacher]
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
    versions = {name: version(name) for name in ("torch", "timm", "numpy")} | {"modelsim": __version__}
    return settings | {f"version of {name}": number for name, number in versions.items()}


def _check_same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or refuse to go on with runs of others, naming each difference."""
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1, default=float) + "\n")
        return
    before = json.loads(path.read_text())
    if differences := setting_differences(before, settings):
        raise ValueError(
            f"the students in {path.parent} were made with other settings ({'; '.join(differences)}): choose "
            f"another folder, or delete {path.parent / 'distillation*'} to start anew"
        )


def _finish(setting: Setting, study: Path | None, run: Run) -> tuple[dict[str, Any], dict[str, float]]:
    """Train and measure one student: its row, and its SAT with each model it is compared with."""
    start = time.perf_counter()
    student = _train(run, setting)
    right = accuracy(student, fashion_mnist("test"))
    scores = {} if study is None else _compare(student, run, study, setting.attacked)
    seconds = round(time.perf_counter() - start)
    return {**run._asdict(), "accuracy": right, "seconds": seconds}, scores


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


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """Read a table, empty if there is no file."""
    if not path.exists():
        return pd.DataFrame(columns=columns)
    table = pd.read_csv(path)
    if list(table) != columns:
        raise ValueError(f"{path} must have the columns {', '.join(columns)}: restore it, or delete it")
    return table


def _write(table: pd.DataFrame, path: Path) -> None:
    unfinished = path.with_suffix(".partial")
    table.to_csv(unfinished, index=False)
    unfinished.replace(path)


def _store(folder: Path, run: Run, finished: tuple[dict[str, Any], dict[str, float]]) -> None:
    """Add a run to both tables, the one that says that it is finished last."""
    row, scores = finished
    place, columns = folder / "distillation_sat.csv", [*_KEY, "model", "sat"]
    new = pd.DataFrame([(*run, model, round(score, 4)) for model, score in scores.items()], columns=columns)
    similarities = _joined(_read(place, columns), new).drop_duplicates(columns[:-1], keep="last")
    _write(similarities.sort_values(columns[:-1]), place)
    runs = _joined(_read(folder / "distillation.csv", _COLUMNS), pd.DataFrame([row]))
    _write(_derived(runs, similarities).sort_values(_KEY), folder / "distillation.csv")


def _joined(table: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([part for part in (table, new) if len(part)]) if len(table) or len(new) else new


def _derived(runs: pd.DataFrame, similarities: pd.DataFrame) -> pd.DataFrame:
    """Fill in what depends on several runs."""
    alone = runs[runs.teacher == NONE].groupby("student").accuracy.mean()
    after = similarities.set_index([*_KEY, "model"]).sat
    of_same_seed = runs.assign(kind=NONE, none=NONE)[["student", "none", "seed", "kind", "teacher"]]
    columns = {
        "gain": (runs.accuracy - runs.student.map(alone)).round(6),
        "sat_before": after.reindex(pd.MultiIndex.from_frame(of_same_seed)).to_numpy(),
        "sat_after": after.reindex(pd.MultiIndex.from_frame(runs[[*_KEY, "teacher"]])).to_numpy(),
    }
    return runs.assign(**columns)[_COLUMNS]


def distillation_table(folder: Path | None = None) -> pd.DataFrame:
    """Read the table of runs in `folder`, by default the one that ships with the book.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it has other columns.
    """
    return _shipped("distillation.csv", _COLUMNS, folder)


def distillation_similarities(folder: Path | None = None) -> pd.DataFrame:
    """Read the table of similarities that goes with `distillation_table`."""
    return _shipped("distillation_sat.csv", [*_KEY, "model", "sat"], folder)


def _shipped(name: str, columns: list[str], folder: Path | None) -> pd.DataFrame:
    path = (folder or _home()) / name
    if not path.exists():
        raise FileNotFoundError(f"no {path}: make it by `python -m modelsim distill`")
    return _read(path, columns)


def seed_noise(runs: pd.DataFrame) -> pd.DataFrame:
    """Tell how much accuracy varies with the seed alone, and how much the gain with the teacher.

    Examples
    --------
    >>> seed_noise(distillation_table())

    Returns
    -------
    DataFrame
        A row for each student: `noise`, the standard deviation of accuracy over seeds, pooled over teachers
        (and no teacher) with several; `freedom`, its degrees of freedom; `spread`, the standard deviation
        over teachers of the mean gain; `teachers`, how many. A spread no greater than the noise says nothing
        of teachers.
    """
    groups = runs.groupby(["student", "teacher", "kind"])
    squares = ((runs.accuracy - groups.accuracy.transform("mean")) ** 2).groupby(runs.student).sum()
    freedom = (groups.size() - 1).groupby("student").sum()
    mean = runs[~runs.teacher.isin([NONE, SELF])].groupby(["student", "teacher"]).gain.mean()
    by_student = mean.groupby("student")
    columns = {
        "noise": np.sqrt(squares / freedom.where(freedom > 0)),
        "freedom": freedom,
        "spread": by_student.std(),
        "teachers": by_student.size(),
    }
    return pd.DataFrame(columns)


def by_teacher(
    runs: pd.DataFrame, similarities: pd.DataFrame, teacher_accuracy: Mapping[str, float]
) -> pd.DataFrame:
    """Average runs over seeds, beside what is known of student and teacher.

    Examples
    --------
    >>> accuracies = training_table().test_accuracy
    >>> by_teacher(distillation_table(), distillation_similarities(), accuracies)

    Parameters
    ----------
    runs, similarities : DataFrame
        Tables of runs of one kind, and of similarities; see the head of this module.
    teacher_accuracy : mapping
        Test accuracy of every teacher, 0 … 1.

    Returns
    -------
    DataFrame
        A row for each student and teacher of the zoo: `gain`, and `seeds`, over how many it is the mean;
        `similarity`, the SAT of the student's architecture, that is the mean over its seeds without a
        teacher, with the teacher; `teacher_accuracy`; `student_base`, `teacher_base`, and `same_base`,
        whether they are one.

    Raises
    ------
    ValueError
        If the runs are of several kinds, or an accuracy or similarity is missing.
    """
    taught = runs[~runs.teacher.isin([NONE, SELF])]
    if taught.kind.nunique() > 1:
        raise ValueError(f"runs must be of one kind, got {', '.join(sorted(taught.kind.unique()))}")
    table = taught.groupby(["student", "teacher"]).gain.agg(gain="mean", seeds="size").reset_index()
    alone = similarities[similarities.teacher == NONE].groupby(["student", "model"]).sat.mean()
    table["similarity"] = alone.reindex(pd.MultiIndex.from_frame(table[["student", "teacher"]])).to_numpy()
    table["teacher_accuracy"] = table.teacher.map(dict(teacher_accuracy))
    for column in ("similarity", "teacher_accuracy", "gain"):
        for teacher in table.teacher[table[column].isna()]:
            raise ValueError(f"{column.replace('_', ' ')} of {teacher} is missing")
    bases = {name: _base(name) for name in {*table.student, *table.teacher}}
    table["student_base"], table["teacher_base"] = table.student.map(bases), table.teacher.map(bases)
    return table.assign(same_base=table.student_base == table.teacher_base)


def _base(name: str) -> str:
    if name in STUDENTS:
        return STUDENTS[name].base
    return CATALOGUE[split_model_name(name)[0]].base


def gain_and_similarity(
    table: pd.DataFrame,
    *,
    given: Sequence[str] = ("teacher_accuracy",),
    least: int = 6,
    level: float = 0.95,
    resamples: int = 1000,
    permutations: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlate gain with similarity over teachers, for each base of student and teacher.

    Examples
    --------
    >>> gain_and_similarity(by_teacher(distillation_table(), distillation_similarities(), accuracies))

    Parameters
    ----------
    table : DataFrame
        From `by_teacher`, perhaps with further columns.
    given : sequence of str
        Columns to control for: ranks are compared after a linear fit on the controls' ranks.
    least : int
        Groups with fewer teachers are left out, and those in which nothing varies beyond the controls.
    level : float
        Coverage of the interval, 0 … 1.
    resamples, permutations, seed : int
        Of the interval, by bootstrap over teachers, and of the test, which shuffles gains between teachers.

    Returns
    -------
    DataFrame
        A row for each student and group of `teachers`, `"all"`, `"same base"`, `"other base"`, or one base:
        `n` teachers; `correlation`, Spearman's, -1 … 1; `partial`, given the controls, with `low` and `high`;
        `p_value` of a partial one at least as far from 0 by chance, and `q_value`, corrected for the number
        of rows (Benjamini and Hochberg).

    Raises
    ------
    ValueError
        If a control is no column, or a value of it is missing.
    """
    random, rows = np.random.default_rng(seed), []
    for student, group, part in _groups(table):
        values = _values(part, given)
        found = _partial_correlation(values) if len(values) >= least else np.nan
        if np.isnan(found):
            continue
        low, high = _bounds(_drawn(values, resamples, random), level)
        p_value = _chance(values, found, permutations, random)
        plain = _partial_correlation(values[:, :2])
        rows.append([student, group, len(part), plain, found, low, high, p_value])
    names = ["student", "teachers", "n", "correlation", "partial", "low", "high", "p_value"]
    result = pd.DataFrame(rows, columns=names)
    return result.assign(q_value=false_discovery_control(result.p_value) if len(result) else [])


def base_difference(
    table: pd.DataFrame,
    *,
    given: Sequence[str] = ("teacher_accuracy",),
    level: float = 0.95,
    resamples: int = 1000,
    permutations: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Tell whether the relation of gain and similarity depends on teacher and student being of one base.

    Examples
    --------
    >>> base_difference(by_teacher(distillation_table(), distillation_similarities(), accuracies))

    Parameters, and what is raised, are those of `gain_and_similarity`; the test shuffles which teachers count
    as of the same base.

    Returns
    -------
    DataFrame
        A row for each student: the partial correlations among teachers of the `same` base and of any `other`,
        their `difference`, same less other, -2 … 2, its interval, `low` and `high`, and the `p_value` of one
        at least as far from 0 by chance; NaN where a correlation is.
    """
    random, rows = np.random.default_rng(seed), {}
    for student, part in table.groupby("student"):
        values, same = _values(part, given), part.same_base.to_numpy(bool)
        sides = _two_correlations(values, same)
        row = {"same": sides[0], "other": sides[1], "difference": sides[0] - sides[1]}
        if not np.isnan(row["difference"]):
            drawn = [_drawn(values[which], resamples, random) for which in (same, ~same)]
            row["low"], row["high"] = _bounds(drawn[0] - drawn[1], level)
            shuffled = (_two_correlations(values, random.permutation(same)) for _ in range(permutations))
            row["p_value"] = _p_value([one - other for one, other in shuffled], row["difference"])
        rows[student] = row
    columns = ["same", "other", "difference", "low", "high", "p_value"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("student")


def _two_correlations(values: Floats, first: NDArray[np.bool_]) -> tuple[float, float]:
    one, other = (_partial_correlation(values[which]) if which.any() else np.nan for which in (first, ~first))
    return one, other


def _values(table: pd.DataFrame, given: Sequence[str]) -> Floats:
    for column in given:
        if column not in table:
            raise ValueError(unknown_name_message("column", column, table.columns))
        for teacher in table.teacher[table[column].isna()]:
            raise ValueError(f"{column!r} of {teacher} is missing: give it, or leave this teacher out")
    return table[["gain", "similarity", *given]].to_numpy(float)


def _drawn(values: Floats, resamples: int, random: np.random.Generator) -> Floats:
    """Return partial correlations of teachers drawn with replacement."""
    n = len(values)
    return np.array([_partial_correlation(values[random.integers(n, size=n)]) for _ in range(resamples)])


def _bounds(drawn: Floats, level: float) -> tuple[float, float]:
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _groups(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    for student, part in table.groupby("student"):
        yield str(student), "all", part
        yield str(student), "same base", part[part.same_base]
        yield str(student), "other base", part[~part.same_base]
        for base in _ACROSS:
            # The student's own base is the group "same base" already.
            if base != part.student_base.iloc[0]:
                yield str(student), base, part[part.teacher_base == base]


def _partial_correlation(values: Floats) -> float:
    return cosine(*residual_ranks(list(values.T)))


def _chance(values: Floats, observed: float, permutations: int, random: np.random.Generator) -> float:
    one, other = residual_ranks(list(values.T))
    return _p_value([cosine(random.permutation(one), other) for _ in range(permutations)], observed)


def _p_value(by_chance: Sequence[float], observed: float) -> float:
    """Two-sided; what chance leaves undefined doesn't count as more extreme."""
    return float((1 + (np.abs(by_chance) >= abs(observed) - 1e-12).sum()) / (1 + len(by_chance)))


def similarity_shift(
    runs: pd.DataFrame,
    similarities: pd.DataFrame,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Tell whether students come to resemble their teachers.

    A student that is taught may come nearer to every model, its teacher included. So each is compared with
    the models of `REPEATED` too; what is beyond these is due to its own teacher.

    Examples
    --------
    >>> similarity_shift(distillation_table(), distillation_similarities())

    Parameters
    ----------
    runs, similarities : DataFrame
        As for `by_teacher`.
    level, resamples, seed
        Of the interval, by bootstrap over teachers.

    Returns
    -------
    DataFrame
        A row for each student and `shift`: `"own teacher"`, the mean of SAT after less SAT before, in log
        of per cent; `"other models"`, the same with models that aren't the teacher; `"difference"`, the first
        less the second. Columns `mean`, `low`, `high`, `teachers`.

    Raises
    ------
    ValueError
        If a student has fewer than two teachers with both similarities.
    """
    shifts = _shifts(runs, similarities).groupby(["student", "teacher"]).mean()
    rows = []
    for (student, name), values in shifts.melt(ignore_index=False).groupby(["student", "variable"]).value:
        sample = values.dropna().to_numpy()
        if len(sample) < 2:
            raise ValueError(f"{student} has {len(sample)} teachers with similarities, two are needed")
        options: Any = dict(confidence_level=level, n_resamples=resamples, method="percentile")
        found = bootstrap((sample,), np.mean, rng=np.random.default_rng(seed), **options)
        rows.append([student, name, sample.mean(), *found.confidence_interval, len(sample)])
    return pd.DataFrame(rows, columns=["student", "shift", "mean", "low", "high", "teachers"])


def _shifts(runs: pd.DataFrame, similarities: pd.DataFrame) -> pd.DataFrame:
    """Shift of every run with the zoo's teachers: with its own, and the mean with other models."""
    same_seed = ["student", "seed", "model"]
    before = similarities[similarities.teacher == NONE].set_index(same_seed).sat.rename("before")
    table = similarities[~similarities.teacher.isin([NONE, SELF])].join(before, on=same_seed)
    table["shift"] = table.sat - table.before
    is_own = table.model == table.teacher
    of_run = ["student", "teacher", "seed"]
    own = table[is_own].groupby(of_run)["shift"].mean()
    others = table[~is_own].groupby(of_run)["shift"].mean()
    known = runs.set_index(of_run).index
    shifts = pd.DataFrame({"own teacher": own, "other models": others})
    return shifts[shifts.index.isin(known)].eval("difference = `own teacher` - `other models`")


def rank_teachers(
    table: pd.DataFrame,
    similarity: Mapping[str, float],
    teacher_accuracy: Mapping[str, float],
    base: str,
) -> pd.DataFrame:
    """Rank teachers for a student of any architecture, by what the measured students tell.

    A ridge regression predicts how much better a teacher is than the student's average one, from its
    accuracy, its similarity with the student, whether both are of one base, and the product of the last two.

    Examples
    --------
    >>> row = sat(study).sel(model="resnet50").drop_sel(other="resnet50").to_series()
    >>> rank_teachers(table, row, training_table().test_accuracy, "CNN").head()

    Parameters
    ----------
    table : DataFrame
        From `by_teacher`.
    similarity : mapping
        SAT of the student with each candidate.
    teacher_accuracy : mapping
        Test accuracy of each candidate, 0 … 1.
    base : str
        Of the student.

    Returns
    -------
    DataFrame
        Index `teacher`, best first: `advantage`, the predicted gain beyond that of the student's average
        candidate; `similarity`, `teacher_accuracy`, `same_base`. Attribute `r2`: share of the variance of the
        measured advantages that is predicted when both students of a teacher are left out; 0 or less means
        that this ranking is no better than none.
    """
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
    advantage = table.gain - table.groupby("student").gain.transform("mean")
    x = _features(table)
    left_out = cross_val_predict(model, x, advantage, groups=table.teacher, cv=LeaveOneGroupOut())
    names = pd.Index(sorted({*similarity.keys()} & {*teacher_accuracy.keys()}), name="teacher")
    candidates = pd.DataFrame({"student": "new", "similarity": pd.Series(similarity)[names]}, names)
    candidates["teacher_accuracy"] = pd.Series(teacher_accuracy)[names]
    candidates["same_base"] = [_base(name) == base for name in names]
    predicted = model.fit(x, advantage).predict(_features(candidates))
    ranking = candidates.drop(columns="student").assign(advantage=predicted - predicted.mean())
    ranking = ranking.sort_values("advantage", ascending=False)
    ranking.attrs["r2"] = float(r2_score(advantage, left_out))
    return ranking[["advantage", "similarity", "teacher_accuracy", "same_base"]]


def _features(table: pd.DataFrame) -> Floats:
    """Describe teachers; similarities count from each student's mean, which is the student's own."""
    similarity = table.similarity - table.groupby("student").similarity.transform("mean")
    same = table.same_base.astype(float)
    return np.column_stack([table.teacher_accuracy, similarity, same, similarity * same])
