"""The command line: `python -m modelsim`, or `modelsim`."""

import importlib
import shlex
import sys
import warnings
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import timm
import torch
import typer
import xarray as xr
from torch import nn
from typer import Argument, Option
from typer.core import TyperGroup

import modelsim as ms
from modelsim import distillation
from modelsim.attacks import gradients_at_a_time
from modelsim.images import check_number
from modelsim.plan import side_by_side_seconds
from modelsim.pretrained import at_full_size, expected_accuracy
from modelsim.scores import Measure
from modelsim.training import Kind, train_zoo
from modelsim.transfer import Attack, Precision
from modelsim.zoo import naming, split_model_name, unknown_name_message

Strings = list[str] | None
Names = Annotated[Strings, Argument(help="`resnet50`, `resnet50-seed1` … Default: all architectures.")]
StudyFolder = Annotated[Path, Option(help="Folder for the study; a study begun there is finished.")]
Images = Annotated[int, Option("--images", help="Test images, the same number of every class.")]
ImageSeed = Annotated[int, Option(min=0, help="Seed of the draw of images.")]
Csv = Annotated[Path | None, Option(help="Write the table to this file.")]
Workers = Annotated[int, Option(min=1, help="Processes that work side by side.")]
Scheduler = Annotated[str | None, Option(help="Address of a Dask scheduler, whose workers do the work.")]
_CAVEAT = """

Foretold from components, not measured. Where whole families of the 69 were left out, the 90 % intervals held
90 % of all pairs, but of a single network's 21 % to 100 %: the errors of one network go together."""


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show what is warned of, without the line of code."""
    typer.secho(f"modelsim: {message}", err=True, fg="yellow")


class Program(TyperGroup):
    """Shows the text that a command returns, and what a user can mend as one line, not as a traceback."""

    def invoke(self, ctx: Any) -> None:
        """Run the command."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                text = super().invoke(ctx)
        except (ValueError, TypeError, OSError, FloatingPointError) as error:
            typer.secho(f"modelsim: {error}", err=True, fg="red")
            raise typer.Exit(2) from error
        typer.echo(text)


app = typer.Typer(
    cls=Program,
    help="How similar are two image classifiers? Measured by attack transferability.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def train(names: Names = None, workers: Workers = 1, scheduler: Scheduler = None) -> str:
    """Train classifiers on Fashion-MNIST, each in one thread; those already trained are kept.

    Example: `python -m modelsim train resnet50 resnet50-seed1 --workers 2`
    """
    table = train_zoo(names or list(ms.CATALOGUE), workers=workers, scheduler=scheduler)
    return table.drop(columns=["recipe", "torch", "timm"]).to_string()


@app.command()
def transfer(
    names: Names = None,
    out: StudyFolder = Path("runs/study"),
    zoo: Annotated[str, Option(help="`fashion69`, or `imagenet69`: any of timm's.")] = "fashion69",
    weights: Annotated[Path | None, Option(help="Folder of NAME.safetensors. Default: timm's hub.")] = None,
    images: Annotated[str, Option(help="How many test images, or `imagefolder:PATH`.")] = "1000",
    per_class: Annotated[int, Option(help="Pictures of every class in that folder.")] = 5,
    labels: Annotated[Path | None, Option(help="Table (CSV) of files in that folder and classes.")] = None,
    expect: Annotated[Path | None, Option(help="Table (CSV) of `model` and `top1`, as of timm.")] = None,
    image_seed: ImageSeed = 0,
    eps: Annotated[float | None, Option(help="Largest change of a pixel, in 1/255 (18, or 8).")] = None,
    steps: Annotated[int, Option(min=1, help="Gradient steps.")] = 50,
    step_size: Annotated[float, Option(help="Change of a pixel in one step, in 1/255.")] = 2,
    seed: Annotated[int, Option(min=0, help="Seed of the attack's random start.")] = 0,
    probabilities: Annotated[bool, Option(help="Keep those of all test images, for ensembles.")] = True,
    fold: Annotated[bool | None, Option(help="Make convolution and batch normalisation one: faster.")] = None,
    perturbations: Annotated[bool | None, Option(help="Keep adversarial images, for `compare`.")] = None,
    network_memory: Annotated[float, Option(min=0, help="GiB to keep networks in, a process.")] = 2,
    precision: Annotated[Precision, Option(help="In which networks compute.")] = "fp32",
    workers: Workers = 1,
    scheduler: Scheduler = None,
) -> str:
    """Attack every model by PGD and show the adversarial images to all.

    Example: `python -m modelsim transfer resnet50 convnext_tiny --images 100 --workers 2 --out runs/mine`

    On several machines that share a disk: run `dask scheduler` on one, on each
    `dask worker tcp://10.0.0.1:8786 --nthreads 1 --nworkers 4` with the first one's address, and then
    `python -m modelsim transfer --scheduler tcp://10.0.0.1:8786`.

    On photographs, by networks of timm, with the paper's epsilon of 8/255:
    `python -m modelsim transfer --zoo imagenet69 --images imagefolder:PATH --per-class 5 --out DIR`
    A network that is much less accurate than its peers, or than `--expect` says, stops the run.

    Without a word on `fold` or `perturbations` it is as in the study that is there, else yes.
    """
    attack = _pgd(zoo, eps, steps, step_size, seed)
    options: dict[str, Any] = dict(fold=fold, perturbations=perturbations, network_memory=network_memory)
    options |= dict(precision=precision, workers=workers, scheduler=scheduler)
    of_folder = dict(per_class=per_class, labels=labels, seed=image_seed)
    networks, shown, expected = _given(zoo, names, weights, expect, images, **of_folder)
    test = ms.fashion_mnist("test") if probabilities and zoo == "fashion69" else None
    ms.transfer(networks, shown, attack, out, test_images=test, expected_accuracy=expected, **options)
    return f"the study is in {out}; next: python -m modelsim score {shlex.quote(str(out))}"


def _pgd(zoo: str, eps: float | None, steps: int, step_size: float, seed: int) -> Attack:
    """Return the attack, whose sizes are given in 1/255."""
    eps = eps if eps is not None else 18 if zoo == "fashion69" else 8
    check_number(most=127, eps=eps)
    check_number(step_size=step_size)
    return partial(ms.pgd, eps=eps / 255, steps=steps, step_size=step_size / 255, seed=seed)


def _given(
    zoo: str, names: Strings, weights: Path | None, expect: Path | None, images: str, **draw: Any
) -> tuple[ms.Zoo, ms.ImageSet, dict[str, float] | None]:
    """Return the networks that are asked for, images that they know, and how accurate they should be."""
    path, in_folder = images.removeprefix("imagefolder:"), images.startswith("imagefolder:")
    if in_folder != (zoo == "imagenet69") or not (in_folder or images.isdecimal()):
        expected = "imagefolder:PATH with --zoo imagenet69, else a number"
        raise ValueError(f"--images must be {expected}, got {images!r} with --zoo {zoo}")
    networks = ms.pretrained(names or zoo, weights) if in_folder else ms.load_zoo(zoo, names=names or None)
    accuracy = expected_accuracy(expect, networks) if expect else {} if in_folder else None
    if in_folder:  # whose pictures may take minutes to read: last
        return networks, ms.image_folder(path, **draw), accuracy
    return networks, ms.fashion_mnist("test", n=int(images), seed=draw["seed"]), accuracy


@app.command()
def plan(
    names: Names = None,
    zoo: Annotated[str, Option(help="`fashion69`, or `imagenet69`: any of timm's.")] = "fashion69",
    n: Images = 1000,
    canvas: Annotated[int, Option(min=1, help="Side of a photograph, in pixels.")] = 224,
    steps: Annotated[int, Option(min=1, help="Gradient steps.")] = 50,
    test_images: Annotated[int, Option(min=0, help="Images of which probabilities are kept.")] = 0,
    device: Annotated[str, Option(help="`cpu` or `cuda`.")] = "cpu",
    csv: Csv = None,
) -> str:
    """Foretell what `transfer` will cost: time, storage and memory.

    Example: `python -m modelsim plan --zoo imagenet69 --images 5000 --device cuda`

    Networks are built with random weights, counted by tracing, and as many of them timed as 20 seconds allow;
    neither weights nor images are needed.
    """
    sides, build = ((3, canvas, canvas), at_full_size) if zoo == "imagenet69" else ((1, 28, 28), _of_the_zoo)
    names = names or list(ms.load_zoo(zoo) if zoo != "imagenet69" else ms.CATALOGUE)
    table = ms.plan(build, names, sides, images=n, steps=steps, test_images=test_images, device=device)
    if csv:
        table.assign(threads=torch.get_num_threads(), torch=torch.__version__).to_csv(csv)
    return _costs(table, n * prod(sides), device, gradients_at_a_time(device, prod(sides[1:])))


def _of_the_zoo(name: str) -> nn.Module:
    return ms.build(split_model_name(name)[0])


def _duration(seconds: float) -> str:
    return str(pd.Timedelta(seconds=seconds).ceil("s")).removeprefix("0 days ")


def _costs(table: pd.DataFrame, pixels: int, device: str, at_a_time: int) -> str:
    """Say what all networks cost together, and which cost most."""
    seconds = table[["attack", "evaluations"]].assign(together=table.attack + table.evaluations)
    times = pd.concat([seconds.sum().to_frame("all").T, seconds.nlargest(5, "together")])
    times = times.map(_duration)
    eight = _duration(side_by_side_seconds(table, 8))
    timed = f"{table.timed.sum()} of {len(table)} networks were timed on this {device}"
    stored, gradients = table.perturbation.sum() / 1e9, at_a_time * table.activations.max() / 1e9
    return f"""{times.to_string()}

{timed}, the others foretold from their operations
eight such devices: {eight}
storage: {stored:.1f} GB of perturbations, which --no-perturbations saves; then `compare` can't use the study
memory: images {pixels / 1e9:.2f} GB, a network at most {4 * table.parameters.max() / 1e9:.2f} GB, \
the gradients of {at_a_time} images at most {gradients:.1f} GB"""


@app.command()
def measure(
    names: Names = None,
    out: Annotated[Path, Option(help="Folder for the matrices, `measures.nc`.")] = Path("runs/measures"),
    n: Images = 1000,
    image_seed: ImageSeed = 0,
) -> str:
    """Compare models by penultimate features (linear CKA) and by input gradients; no attack is needed.

    Example: `python -m modelsim measure resnet50 convnext_tiny --images 100 --out runs/measured`
    """
    images = ms.fashion_mnist("test", n=n, seed=image_seed)
    found = ms.measure(ms.load_zoo(names=names or None), images, out=out)
    compared = {name: ms.pairs(found[name]) for name in ("linear_cka", "gradient_cosine")}
    return pd.DataFrame(compared).round(3).to_string()


@app.command()
def components(
    names: Annotated[Strings, Argument(help="Models of timm. Default: the catalogue's.")] = None,
    csv: Csv = None,
) -> str:
    """Read the 13 components off models of timm; no weights are needed.

    Example: `python -m modelsim components resnet50 maxvit_tiny_tf_224`
    """
    table = ms.read_components(names or list(ms.CATALOGUE))
    if csv:
        table.to_csv(csv)
    return table.T.to_string()


@app.command()
def forecast(
    names: Annotated[list[str], Argument(help="Models of timm.")],
    level: Annotated[float, Option(help="Of the intervals, 0 to 1.")] = 0.9,
    csv: Csv = None,
) -> str:
    """Foretell from components alone how similar models of timm are to the 69, on ImageNet.

    Example: `python -m modelsim forecast resnet18 mobilenetv4_conv_small --level 0.8`

    No weights are needed, only the paper's released scores, which are fetched once.
    """
    table, known = ms.read_components(names), ms.components_table()
    told = ms.forecast(table, level=level)
    if csv:
        told.to_csv(csv)
    return "\n\n".join(_row(table.loc[name], told.loc[name], known) for name in table.index) + _CAVEAT


def _row(read: pd.Series, told: pd.DataFrame, known: pd.DataFrame) -> str:
    new = [" (none of the 69)" if value not in known[name].values else "" for name, value in read.items()]
    told = told.assign(base=[ms.CATALOGUE[other].base for other in told.index])
    ends = {"most similar": told.nlargest(5, "SAT"), "least similar": told.nsmallest(5, "SAT")}
    tables = [f"{what}\n{rows.rename_axis(None).round(2).to_string()}" for what, rows in ends.items()]
    return "\n".join([str(read.name), (read + new).to_string(), *tables])


@app.command()
def score(
    study: Annotated[Path, Argument(help="Folder of a study.")],
    measure: Annotated[Measure, Option(help="Which score.")] = "sat",
    intervals: Annotated[bool, Option(help="Add 95 % intervals (bootstrap over images).")] = False,
    csv: Csv = None,
) -> str:
    """Show the scores of a study.

    Example: `python -m modelsim score data/fashion69 --measure sat --intervals --csv sat.csv`

    In the file there is one row a pair: `trials` are the images that both models classify correctly, `hits`
    those of them that, attacked on the first model, fool the second.
    """
    opened = ms.open_study(study)
    matrix = ms.sat(opened) if measure == "sat" else ms.transferability(opened)
    table = matrix.to_series().to_frame()
    if intervals:
        table = table.join(ms.interval(opened, measure).to_dataset("bound").to_dataframe())
    if csv:
        rate = ms.transferability(opened)
        table.assign(hits=rate.hits.values.ravel(), trials=rate.trials.values.ravel()).to_csv(csv)
    return (table if intervals else matrix.to_pandas()).round(3).to_string()


@app.command()
def compare(
    network: Annotated[str, Argument(help="A name of timm, or `module:function` that returns a module.")],
    weights: Annotated[Path | None, Option(help="Its weights, a safetensors file.")] = None,
    name: Annotated[str, Option(help="What to call it.")] = "mine",
    study: Annotated[Path, Option(help="Folder of the study to compare with.")] = Path("data/fashion69"),
    models: Annotated[Strings, Option(help="A model of the study; repeat for more. Default: all.")] = None,
    images: Annotated[int | None, Option(min=1, help="How many of its images. Default: all.")] = None,
    out: Annotated[Path | None, Option(help="Keep the study with the network in this folder.")] = None,
) -> str:
    """Attack one network, show it to all of a study and all to it, and tell whom it resembles.

    Example: `python -m modelsim compare mobilenetv3_small_050 --weights mine.safetensors --out runs/mine`

    For a first look, some of the networks (three or more, for relative SAT) and images:
    `… compare my_networks:small --images 200 --models resnet50 --models pit_b_224 --models mixnet_xl`
    """
    some = _part(ms.open_study(study), models, images)
    extended = ms.compare(_classifier(network, weights), some, name=name, out=out)
    kept = f"\n\nthe study is in {out}; next: python -m modelsim score {shlex.quote(str(out))}" if out else ""
    return _reading(extended, name, network) + kept


def _part(study: xr.Dataset, models: Strings, images: int | None) -> xr.Dataset:
    """Select models of a study, and some of its images, evenly."""
    names = study.target.values.tolist()
    if unknown := [model for model in models or [] if model not in names]:
        raise ValueError(unknown_name_message("model of the study", unknown[0], names))
    # The first images of every class, so that each has as many.
    place_in_class = study.label.to_series().groupby(study.label.values).cumcount().values
    places = np.sort(np.argsort(place_in_class, kind="stable")[:images])
    return study.sel(source=models or names, target=models or names).isel(image=places)


def _classifier(network: str, weights: Path | None) -> nn.Module:
    """Build a network, or have it built by a function of the user's, and fill it with weights."""
    module, _, function = network.partition(":")
    if not function and weights is None:
        raise ValueError(f"{network!r} needs --weights FILE; or give MODULE:FUNCTION that returns a network")
    if function:
        sys.path.insert(0, "")  # where the user is
        with naming(network):
            classifier = getattr(importlib.import_module(module), function)()
    else:
        classifier = ms.build(network)
    if weights is not None:
        ms.load_weights(classifier, weights)
    return classifier


def _reading(study: xr.Dataset, name: str, network: str) -> str:
    """Say whom a classifier resembles most and least, with whom it falls into a group, and votes best."""
    table, components = ms.neighbours(study, name), ms.components_table()
    known = [split_model_name(model)[0] for model in table.index]
    table["base"] = [getattr(ms.CATALOGUE.get(model), "base", "") for model in known]
    if timm.is_model(network):
        same = components.reindex(known) == ms.read_components([network]).iloc[0]
        table["components in common"] = [f"{count} of {same.shape[1]}" for count in same.sum(axis=1)]
    right = (study.clean_prediction.sel(target=name) == study.label).mean().item()
    told = f"{name} is right on {right:.1%} of {study.sizes['image']} images, the others on"
    lines = [f"{told} {table.accuracy.median():.1%} (median)"]
    ends = {"most similar": table.head(), "least similar": table.tail().iloc[::-1]}
    for title, part in (ends if len(table) > 10 else {"most similar first": table}).items():
        lines += ["", part.round(2).rename_axis(title).to_string()]
    if len(table) >= 8:
        group = ms.spectral_clusters(ms.relative_sat(ms.transferability(study)), 4).to_series()
        mates = [model for model in table.index if group[model] == group[name]]
        lines += ["", f"of four groups it falls into that of {', '.join(mates) or 'none other'}"]
    if "clean_probability" in study:
        votes = ms.vote(study, [(name, other) for other in table.index]).droplevel(0).nlargest(3)
        partners = ", ".join(f"{other} ({share:.1%} right together)" for other, share in votes.items())
        lines += ["", f"best partners in a vote of two: {partners}"]
    return "\n".join(lines)


@app.command()
def distill(
    student: Annotated[Strings, Option(help=f"{' or '.join(distillation.STUDENTS)}. Default: both.")] = None,
    teacher: Annotated[Strings, Option(help="A model, `self` or `none`. Default: the book's.")] = None,
    seed: Annotated[list[int] | None, Option(min=0, help="Of the student. Default: the book's.")] = None,
    kind: Annotated[Kind, Option(help="What of the teacher is imitated.")] = "soft",
    images: Annotated[int, Option(min=1, help="Training images.")] = distillation.Setting.images,
    epochs: Annotated[int, Option(min=1, help="Passes over them.")] = 20,
    temperature: Annotated[float, Option(help="Of soft labels.")] = distillation.Setting.temperature,
    weight: Annotated[float, Option(help="Of the teacher's loss, 0 to 1.")] = distillation.Setting.weight,
    similarity: Annotated[bool, Option(help="Attack the students, for their SAT.")] = True,
    out: Annotated[Path | None, Option(help="Folder of the tables. Default: data/fashion69.")] = None,
    workers: Workers = 1,
    scheduler: Scheduler = None,
) -> str:
    """Train students with and without teachers; those that the tables hold already are kept.

    Without `--teacher` and `--seed`, these are the students of the book, in half an hour on two cores:
    `python -m modelsim distill --workers 2`

    Some of your own, with one seed unless said otherwise; every option with a name can be repeated:
    `python -m modelsim distill --student resnet10t --teacher none --teacher convnext_tiny --out runs/mine`
    """
    setting = distillation.Setting(images, ms.Recipe(epochs), temperature, weight)
    runs = distillation.plan(students=student, teachers=teacher, seeds=seed, kind=kind)
    work = partial(distillation.distill_all, similarity=similarity, workers=workers, scheduler=scheduler)
    return work(runs, out, setting=setting).to_string(index=False)


if __name__ == "__main__":
    app(prog_name="modelsim")
