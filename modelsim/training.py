"""One recipe for every architecture, with or without a teacher, and the weights that it makes."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, cast, get_args
from unittest.mock import patch

import pandas as pd
import timm
import torch
from timm.optim import create_optimizer_v2, muon
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from tqdm import tqdm, trange

from modelsim.images import ImageSet, check_number, check_whole, data_directory, fashion_mnist
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

Kind = Literal["soft", "hard"]


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
        Fraction of the steps on which the learning rate rises, 0 … 1.

    Raises
    ------
    TypeError, ValueError
        If an attribute is out of range or no number.
    """

    epochs: int = 3
    batch_size: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 0.05
    warm_up: float = 0.15

    def __post_init__(self) -> None:
        check_whole(epochs=self.epochs, batch_size=self.batch_size)
        check_number(learning_rate=self.learning_rate)
        check_number(least=0, weight_decay=self.weight_decay)
        check_number(least=0, most=1, warm_up=self.warm_up)


@dataclass(frozen=True, eq=False)
class Teacher:
    """What a student is told about the training images beside their labels.

    Its loss is (1 - weight) × cross-entropy with the label + weight × the teacher's loss. The latter is,
    of kind `"soft"`, temperature² × KL divergence from the teacher's to the student's probabilities, both
    at that temperature, and of kind `"hard"` the cross-entropy with the class that the teacher ranks
    first. A student with a distillation token learns the label by its class token and the teacher by
    the other, and predicts by the mean of both. Weight 0 is training without a teacher.

    Examples
    --------
    >>> Teacher(logits, kind="hard")

    Attributes
    ----------
    logits : Tensor
        (2, image, class): the teacher's, of the images as they are and of their mirror images.
    kind : {"soft", "hard"}
        What the student imitates.
    temperature : float
        Greater than 0; for `"soft"` only.
    weight : float
        Of the teacher against the label, 0 … 1.

    Raises
    ------
    ValueError
        If an attribute is outside what is said above, or a logit is NaN or infinite.

    References
    ----------
    Soft: Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531.
    Hard, and the token: Touvron et al., *Training data-efficient image transformers & distillation
    through attention*, ICML 2021, eq. (3), where the weight is one half.
    """

    logits: Tensor
    kind: Kind = "soft"
    temperature: float = 3.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be 'soft' or 'hard', got {self.kind!r}")
        check_number(temperature=self.temperature)
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must be between 0 and 1, got {self.weight}")
        if self.logits.ndim != 3 or len(self.logits) != 2:
            raise ValueError(
                "a teacher's logits must have shape (2, image, class), for the images and their mirror "
                f"images, got {tuple(self.logits.shape)}"
            )
        if not torch.isfinite(self.logits).all():
            raise ValueError("a teacher's logits must be finite, got NaN or infinity among them")

    def loss(self, student: Tensor | tuple[Tensor, Tensor], labels: Tensor, told: Tensor) -> Tensor:
        """Return the loss of a batch.

        `student` holds logits (n, class), or those of the class token and of the distillation token;
        `labels` (n,) true classes; `told` (n, class) the teacher's logits.
        """
        by_label, by_teacher = student if isinstance(student, tuple) else (student, student)
        own = cross_entropy(by_label, labels)
        return (1 - self.weight) * own + self.weight * self._imitation(by_teacher, told)

    def _imitation(self, student: Tensor, told: Tensor) -> Tensor:
        if self.kind == "hard":
            return cross_entropy(student, told.argmax(1))
        ours, theirs = ((logits / self.temperature).log_softmax(1) for logits in (student, told))
        return self.temperature**2 * kl_div(ours, theirs, reduction="batchmean", log_target=True)


@contextmanager
def _single_precision_muon() -> Iterator[None]:
    """Let Muon orthogonalise in single precision.

    timm does it in bfloat16, which a CPU without bfloat16 units emulates, five to eight times slower.
    """
    in_single_precision = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    with patch.object(muon, "zeropower_via_newtonschulz", in_single_precision):
        yield


def _batches(images: ImageSet, recipe: Recipe, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the positions of shuffled batches, and which of their images to mirror: one half of them."""
    generator = torch.Generator().manual_seed(int(seed))
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        for positions in order.split(recipe.batch_size):
            if len(positions) < recipe.batch_size:
                continue
            yield positions, torch.rand(len(positions), generator=generator) < 0.5


def _step_loss(
    classifier: nn.Module, images: ImageSet, teacher: Teacher | None, positions: Tensor, mirrored: Tensor
) -> Tensor:
    """Return the loss of one batch."""
    batch, labels = images.images[positions], images.labels[positions]
    logits = classifier(torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(3), batch))
    if teacher is None:
        return cross_entropy(logits, labels)
    return teacher.loss(logits, labels, teacher.logits[mirrored.long(), positions])


def train(
    architecture: str,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    images: ImageSet | None = None,
    teacher: Teacher | None = None,
    optimiser: str = "muon",
    progress: bool = True,
) -> Classifier:
    """Train one architecture of the catalogue from scratch.

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
    teacher : Teacher, optional
        Makes it a student.
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
        If the architecture is unknown, there are fewer images than one batch, or the teacher was
        trained on other classes or asked about other images.
    TypeError
        If `seed` is not a whole number.
    FloatingPointError
        If the loss stops being finite.
    """
    check_whole(least=0, seed=seed)
    images = images or fashion_mnist("train")
    seed += catalogue_entry(architecture).seed_offset
    classifier = build(architecture, seed=seed, n_classes=len(images.classes))
    return fit(
        classifier,
        images,
        teacher=teacher,
        seed=seed,
        recipe=recipe,
        optimiser=optimiser,
        progress=progress,
        name=architecture,
    )


def fit(
    classifier: Classifier,
    images: ImageSet,
    *,
    teacher: Teacher | None = None,
    seed: int = 0,
    recipe: Recipe | None = None,
    optimiser: str = "muon",
    progress: bool = True,
    name: str = "classifier",
) -> Classifier:
    """Train a classifier of any architecture by the recipe, from the weights that it has.

    Examples
    --------
    >>> network = timm.create_model("resnet18", in_chans=1, num_classes=10)
    >>> classifier = fit(Classifier(network, input_size=64), fashion_mnist("train", n=4000))

    Parameters
    ----------
    classifier : Classifier
        Changed in place.
    seed : int
        Of the order of the images and the mirroring.
    name : str
        For the progress bar and messages.

    Other parameters, the result and what is raised are those of `train`.
    """
    check_whole(least=0, seed=seed)
    recipe = recipe or Recipe()
    steps = recipe.epochs * (len(images) // recipe.batch_size)
    if steps == 0:
        raise ValueError(f"{len(images)} images are fewer than one batch of {recipe.batch_size}")
    teacher = _checked_teacher(teacher, images)
    if hasattr(classifier.network, "set_distilled_training"):
        cast("Any", classifier.network).set_distilled_training(teacher is not None)
    classifier.train()
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
        trange(steps, desc=name, disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        for step in bar:
            loss = _step_loss(classifier, images, teacher, *next(batches))
            updates.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            updates.step()
            schedule.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{_finite(loss, name, step):.3f}")
    return classifier.eval()


def _checked_teacher(teacher: Teacher | None, images: ImageSet) -> Teacher | None:
    """Return the teacher, or None if nothing is to be learnt from it."""
    if teacher is None or teacher.weight == 0:
        return None
    _, n_images, n_classes = teacher.logits.shape
    if n_classes != len(images.classes):
        raise ValueError(f"the teacher knows {n_classes} classes, the images have {len(images.classes)}")
    if n_images != len(images):
        raise ValueError(f"the teacher was asked about {n_images} images, there are {len(images)}")
    return teacher


def _finite(loss: Tensor, name: str, step: int) -> float:
    if not torch.isfinite(loss):
        raise FloatingPointError(f"training {name}: loss is {loss.item()} at step {step}")
    return loss.item()


def accuracy(classifier: nn.Module, images: ImageSet) -> float:
    """Share of `images` classified correctly, 0 … 1, in evaluation mode."""
    classifier.eval()
    with torch.no_grad():
        batches = zip(images.images.split(500), images.labels.split(500), strict=True)
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
    FloatingPointError
        If a loss stopped being finite, after all other models have been trained.
    """
    check_whole(workers=workers)
    recipe = recipe or Recipe()
    folder = folder or data_directory() / "fashion69" / "weights"
    for name in names:
        catalogue_entry(split_model_name(name)[0])
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in dict.fromkeys(names) if not is_trained(name, folder, recipe=recipe)]
    try:
        failed = _train_all(missing, folder, recipe=recipe, workers=workers)
    finally:
        table = training_table(folder)
        table.to_csv(folder / "training.csv")
    if failed:
        raise FloatingPointError(f"{'; '.join(failed)}. The {len(missing) - len(failed)} others are trained")
    return table


def _train_all(names: Sequence[str], folder: Path, *, recipe: Recipe, workers: int) -> list[str]:
    """Train and store all models; return what is to be said of those that failed."""
    work, failed = partial(train_to_file, folder=folder, recipe=recipe), []
    if workers == 1:
        for name in names:
            try:
                work(name)
            except FloatingPointError as error:
                failed.append(str(error))
        return failed
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(work, name, threads=threads, progress=False) for name in names]
        for job in (bar := tqdm(as_completed(jobs), total=len(jobs), desc="trained")):
            try:
                bar.set_postfix_str(job.result().stem)
            except FloatingPointError as error:
                failed.append(str(error))
    return failed


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
