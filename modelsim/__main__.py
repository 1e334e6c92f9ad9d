"""The command line: `python -m modelsim`, or `modelsim`."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import modelsim as ms
from modelsim import distillation
from modelsim.catalogue import CATALOGUE
from modelsim.images import check_number
from modelsim.scores import Measure
from modelsim.training import Kind, train_zoo

app = typer.Typer(
    help="How similar are two image classifiers? Measured by attack transferability.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Names = Annotated[
    list[str] | None,
    typer.Argument(
        help="Models: an architecture, or `resnet50-seed1` for another seed. Default: all architectures."
    ),
]
StudyFolder = Annotated[Path, typer.Option(help="Folder for the study; a study begun there is finished.")]
StudentSeeds = Annotated[
    list[int] | None, typer.Option(min=0, help="Seed of the student. Default: the book's.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes that work side by side.")]
Scheduler = Annotated[
    str | None, typer.Option(help="Address of a Dask scheduler, whose workers work side by side.")
]

_AS_THERE = "Default: as in the study that is there, else yes."
Fold = Annotated[
    bool | None,
    typer.Option(
        help="Make one convolution of each that a batch normalisation follows: the same but for rounding, "
        f"and faster. {_AS_THERE}"
    ),
]
Perturbations = Annotated[
    bool | None,
    typer.Option(help=f"Keep adversarial images, most of a study's size; `compare` needs them. {_AS_THERE}"),
]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Show what a user can mend as one line, not as a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        typer.secho(f"modelsim: {error}", err=True, fg="red")
        raise typer.Exit(2) from error


@app.command()
def train(names: Names = None, workers: Workers = 1, scheduler: Scheduler = None) -> None:
    """Train classifiers on Fashion-MNIST, each in one thread; those already trained are kept.

    Example: `python -m modelsim train resnet50 resnet50-seed1 --workers 2`
    """
    with _plain_errors():
        table = train_zoo(names or list(CATALOGUE), workers=workers, scheduler=scheduler)
    typer.echo(table.drop(columns=["recipe", "torch", "timm"]).to_string())


@app.command()
def transfer(
    names: Names = None,
    out: StudyFolder = Path("runs/study"),
    n: Annotated[int, typer.Option("--images", help="Test images, the same number of every class.")] = 1000,
    image_seed: Annotated[int, typer.Option(min=0, help="Seed of the draw of images.")] = 0,
    eps: Annotated[float, typer.Option(help="Largest change of a pixel, in 1/255.")] = 18,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 50,
    step_size: Annotated[float, typer.Option(help="Change of a pixel in one step, in 1/255.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attack's random start.")] = 0,
    probabilities: Annotated[
        bool, typer.Option(help="Keep every model's probabilities on all 10,000 test images, for ensembles.")
    ] = True,
    fold: Fold = None,
    perturbations: Perturbations = None,
    workers: Workers = 1,
    scheduler: Scheduler = None,
) -> None:
    """Attack every model by PGD and show the adversarial images to all.

    Example: `python -m modelsim transfer resnet50 convnext_tiny --images 100 --workers 2 --out runs/mine`

    On several machines that share a disk: run `dask scheduler` on one, on each
    `dask worker tcp://10.0.0.1:8786 --nthreads 1 --nworkers 4` with the first one's address, and then
    `python -m modelsim transfer --scheduler tcp://10.0.0.1:8786`.
    """
    attack = partial(ms.pgd, eps=eps / 255, steps=steps, step_size=step_size / 255, seed=seed)
    run = partial(ms.transfer, fold=fold, perturbations=perturbations, workers=workers, scheduler=scheduler)
    with _plain_errors():
        check_number(most=127, eps=eps)
        check_number(step_size=step_size)
        images = ms.fashion_mnist("test", n=n, seed=image_seed)
        zoo = ms.load_zoo("fashion69", names=names or None)
        run(zoo, images, attack, out, test_images=ms.fashion_mnist("test") if probabilities else None)
    typer.echo(f"the study is in {out}; next: python -m modelsim score {shlex.quote(str(out))}")


@app.command()
def components(
    names: Annotated[
        list[str] | None, typer.Argument(help="Models of timm. Default: the catalogue's.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
) -> None:
    """Read the 13 components off models of timm; no weights are needed.

    Example: `python -m modelsim components resnet50 maxvit_tiny_tf_224`
    """
    with _plain_errors():
        table = ms.read_components(names or list(CATALOGUE))
        if csv:
            table.to_csv(csv)
    typer.echo(table.T.to_string())


@app.command()
def score(
    study: Annotated[Path, typer.Argument(help="Folder of a study.")],
    measure: Annotated[Measure, typer.Option(help="Which score.")] = "sat",
    intervals: Annotated[bool, typer.Option(help="Add 95 % intervals (bootstrap over images).")] = False,
    csv: Annotated[
        Path | None, typer.Option(help="Write one row a pair, and its counts, to this file.")
    ] = None,
) -> None:
    """Show the scores of a study.

    Example: `python -m modelsim score data/fashion69 --measure sat --intervals --csv sat.csv`

    In the file, `trials` are the images that both models classify correctly, `hits` those of them that,
    attacked on the first model, fool the second.
    """
    with _plain_errors():
        opened = ms.open_study(study)
        matrix = ms.sat(opened) if measure == "sat" else ms.transferability(opened)
        table = matrix.to_series().to_frame()
        if intervals:
            table = table.join(ms.interval(opened, measure).to_dataset("bound").to_dataframe())
        if csv:
            rate = ms.transferability(opened)
            table.assign(hits=rate.hits.values.ravel(), trials=rate.trials.values.ravel()).to_csv(csv)
    if intervals:
        typer.echo(table.round(3).to_string())
    else:
        typer.echo(matrix.to_pandas().round(3).to_string())


@app.command()
def distill(
    student: Annotated[
        list[str] | None, typer.Option(help=f"{' or '.join(distillation.STUDENTS)}. Default: both.")
    ] = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="A model of the zoo, `self` or `none`. Default: the book's.")
    ] = None,
    seed: StudentSeeds = None,
    kind: Annotated[Kind, typer.Option(help="What of the teacher is imitated.")] = "soft",
    images: Annotated[int, typer.Option(min=1, help="Training images.")] = distillation.Setting.images,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them.")] = 20,
    temperature: Annotated[float, typer.Option(help="Of soft labels.")] = distillation.Setting.temperature,
    weight: Annotated[
        float, typer.Option(help="Of the teacher against the label, 0 to 1.")
    ] = distillation.Setting.weight,
    similarity: Annotated[bool, typer.Option(help="Attack the students, for their SAT.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder of the tables. Default: data/fashion69.")] = None,
    workers: Workers = 1,
    scheduler: Scheduler = None,
) -> None:
    """Train students with and without teachers; those that the tables hold already are kept.

    Without `--teacher` and `--seed`, these are the students of the book, in half an hour on two cores:
    `python -m modelsim distill --workers 2`

    Some of your own, with one seed unless said otherwise; every option with a name can be repeated:
    `python -m modelsim distill --student resnet10t --teacher none --teacher convnext_tiny --out runs/mine`
    """
    with _plain_errors():
        table = distillation.distill_all(
            distillation.plan(students=student, teachers=teacher, seeds=seed, kind=kind),
            out,
            setting=distillation.Setting(images, ms.Recipe(epochs), temperature, weight),
            similarity=similarity,
            workers=workers,
            scheduler=scheduler,
        )
    typer.echo(table.to_string(index=False))


if __name__ == "__main__":
    app(prog_name="modelsim")
