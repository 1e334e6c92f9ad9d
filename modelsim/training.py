"""One recipe for every architecture, and the weights that it makes."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import timm
import torch
from timm.optim import create_optimizer_v2, muon
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm, trange

from modelsim.images import ImageSet, data_directory, fashion_mnist
from modelsim.zoo import (
    Classifier,
    build,
    count_flops,
    count_parameters,
    load_weights,
    read_metadata,
    save_weights,
    split_model_name,
)
from modelsim.zoo import architecture as catalogue_entry


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; the pilot behind each choice is in data/README.md.

    Muon for weight matrices and AdamW for the rest (timm's implementation), on a one-cycle schedule
    (warm-up, then cosine decay to zero); cross-entropy on images mirrored left to right half of the
    time; gradients clipped at norm 1.

    Attributes
    ----------
    epochs : int
        Passes over the training images.
    batch_size : int
        Images a step.
    learning_rate : float
        At the top of the cycle.
    weight_decay : float
        On weights, not on biases and normalisation.
    warm_up : float
        Fraction of the steps on which the learning rate rises.
    """

    epochs: int = 3
    batch_size: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 0.05
    warm_up: float = 0.15


@contextmanager
def _single_precision_muon() -> Iterator[None]:
    """Let Muon orthogonalise in single precision.

    timm does it in bfloat16, which a CPU without bfloat16 units emulates, five to eight times slower.
    """
    in_single_precision = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    with patch.object(muon, "zeropower_via_newtonschulz", in_single_precision):
        yield


def _batches(images: ImageSet, recipe: Recipe, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches, each image mirrored with probability one half."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        for positions in order.split(recipe.batch_size):
            if len(positions) < recipe.batch_size:
                continue
            batch = images.images[positions]
            mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
            yield torch.where(mirrored, batch.flip(3), batch), images.labels[positions]


def train(
    architecture: str,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    images: ImageSet | None = None,
    optimiser: str = "muon",
    progress: bool = True,
) -> Classifier:
    """Train one architecture from scratch.

    Examples
    --------
    >>> classifier = train("resnet50", seed=0)

    Parameters
    ----------
    architecture : str
        A name of the catalogue.
    seed : int
        Of the initial weights, the order of the images and the mirroring, after the architecture's
        `seed_offset`.
    recipe : Recipe, optional
        The recipe of the book by default.
    images : ImageSet, optional
        Training images, on the canvas; Fashion-MNIST's 60,000 by default.
    optimiser : str
        timm's name of it; `"muon"` is the recipe's, others are there to be compared.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Classifier
        In evaluation mode, in single precision.

    Raises
    ------
    ValueError
        If the architecture is unknown, or there are fewer images than one batch.
    FloatingPointError
        If the loss stops being finite.
    """
    recipe = recipe or Recipe()
    images = images or fashion_mnist("train")
    steps = recipe.epochs * (len(images) // recipe.batch_size)
    if steps == 0:
        raise ValueError(f"{len(images)} images are fewer than one batch of {recipe.batch_size}")
    seed += catalogue_entry(architecture).seed_offset
    classifier = build(architecture, seed=seed, n_classes=len(images.classes)).train()
    updates = create_optimizer_v2(
        classifier.network,
        opt=optimiser,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fallback_no_weight_decay=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        updates, recipe.learning_rate, total_steps=steps, pct_start=recipe.warm_up, cycle_momentum=False
    )
    batches = _batches(images, recipe, seed=seed)
    with (
        torch.random.fork_rng(devices=[]),
        _single_precision_muon(),
        trange(steps, desc=architecture, disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        for step in bar:
            batch, labels = next(batches)
            loss = cross_entropy(classifier(batch), labels)
            updates.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            updates.step()
            schedule.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{_finite(loss, architecture, step):.3f}")
    return classifier.eval()


def _finite(loss: Tensor, architecture: str, step: int) -> float:
    if not torch.isfinite(loss):
        raise FloatingPointError(f"training {architecture}: loss is {loss.item()} at step {step}")
    return loss.item()


def accuracy(classifier: nn.Module, images: ImageSet, *, batch_size: int = 500) -> float:
    """Share of `images` classified correctly, 0 … 1, in evaluation mode."""
    classifier.eval()
    with torch.inference_mode():
        batches = zip(images.images.split(batch_size), images.labels.split(batch_size), strict=True)
        return sum(int((classifier(x).argmax(1) == y).sum()) for x, y in batches) / len(images)


def train_to_file(
    name: str,
    folder: Path,
    *,
    recipe: Recipe | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Path:
    """Train one model and store its half-precision weights, with what is known of them as metadata.

    The test accuracy noted is that of the stored, rounded weights.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    recipe = recipe or Recipe()
    architecture_name, seed = split_model_name(name)
    start = time.perf_counter()
    classifier = train(architecture_name, seed=seed, recipe=recipe, progress=progress)
    seconds = time.perf_counter() - start
    rounded = build(architecture_name)
    rounded.load_state_dict({key: value.half() for key, value in classifier.state_dict().items()})
    path = folder / f"{name}.safetensors"
    metadata = {
        "architecture": architecture_name,
        "seed": str(seed),
        "test_accuracy": f"{accuracy(rounded, fashion_mnist('test')):.4f}",
        "seconds": f"{seconds:.0f}",
        "parameters": str(count_parameters(rounded)),
        "flops": str(count_flops(rounded)),
        "recipe": json.dumps(asdict(recipe)),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    save_weights(classifier, path, metadata)
    return path


def is_trained(name: str, folder: Path, *, recipe: Recipe) -> bool:
    """Tell whether `folder` holds `name`, trained by `recipe`.

    Raises
    ------
    ValueError
        If the file is damaged, or was trained by another recipe; the message names the difference.
    """
    path = folder / f"{name}.safetensors"
    if not path.exists():
        return False
    load_weights(build(split_model_name(name)[0]), path)
    stored, wanted = json.loads(read_metadata(path)["recipe"]), asdict(recipe)
    if stored != wanted:
        differences = [
            f"{k}: {stored.get(k)} stored, {v} asked" for k, v in wanted.items() if stored.get(k) != v
        ]
        raise ValueError(
            f"{path} was trained by another recipe ({'; '.join(differences)}): delete it to train it again"
        )
    return True


def train_zoo(
    names: Sequence[str], folder: Path | None = None, *, recipe: Recipe | None = None, workers: int = 1
) -> pd.DataFrame:
    """Train the models that `folder` doesn't hold yet, and write `training.csv` anew.

    A run that is killed and started again loses at most the models in progress.

    Parameters
    ----------
    names : sequence of str
        Models, such as `"resnet50"` or its second seed `"resnet50-seed1"`.
    folder : Path, optional
        Where the weights go; `data/fashion69/weights` by default.
    workers : int
        Processes that train side by side, sharing torch's threads.

    Returns
    -------
    DataFrame
        See `training_table`.

    Raises
    ------
    ValueError
        If an architecture is unknown, or a stored model is damaged or was trained by another recipe;
        nothing has been trained then.
    """
    recipe = recipe or Recipe()
    folder = folder or data_directory() / "fashion69" / "weights"
    for name in names:
        catalogue_entry(split_model_name(name)[0])
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in dict.fromkeys(names) if not is_trained(name, folder, recipe=recipe)]
    if workers == 1:
        for name in missing:
            train_to_file(name, folder, recipe=recipe)
    else:
        _train_side_by_side(missing, folder, recipe=recipe, workers=workers)
    table = training_table(folder)
    table.to_csv(folder / "training.csv")
    return table


def _train_side_by_side(names: Sequence[str], folder: Path, *, recipe: Recipe, workers: int) -> None:
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        work = partial(train_to_file, folder=folder, recipe=recipe, threads=threads, progress=False)
        jobs = [pool.submit(work, name) for name in names]
        for job in (bar := tqdm(as_completed(jobs), total=len(jobs), desc="trained")):
            bar.set_postfix_str(job.result().stem)


def training_table(folder: Path | None = None) -> pd.DataFrame:
    """Tabulate the weight files of `folder`: one row a model, read from the files' own metadata.

    Returns
    -------
    DataFrame
        Index `model`; columns `architecture`, `seed`, `test_accuracy` (0 … 1, of the stored
        half-precision weights on all 10,000 test images), `seconds` (wall time of the training on
        one thread unless said otherwise), `parameters`, `flops` (of one image), `recipe` (JSON),
        `torch`, `timm` (versions).
    """
    folder = folder or data_directory() / "fashion69" / "weights"
    rows = {
        path.stem: read_metadata(path)
        for path in sorted(folder.glob("*.safetensors"), key=lambda path: path.stem)
    }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    numbers = {"seed": int, "test_accuracy": float, "seconds": int, "parameters": int, "flops": int}
    columns = ["architecture", *numbers, "recipe", "torch", "timm"]
    return table.reindex(columns=columns).astype(numbers)
