"""One recipe for every architecture, with or without a teacher, and the weights that it makes."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args
from unittest.mock import patch

import pandas as pd
import timm
import torch
from timm.optim import create_optimizer_v2, muon
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm import tqdm

from modelsim import zoo
from modelsim.attacks import logits
from modelsim.images import ImageSet, check_number, check_whole, fashion_mnist, to_canvas
from modelsim.study import setting_differences
from modelsim.workers import check_workers, side_by_side, sole_writer
from modelsim.zoo import Classifier

Kind = Literal["soft", "hard"]
_Work = Callable[[Any], Any]
_Trained = TypeVar("_Trained", bound=nn.Module)


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
        for name, plain in self.__annotations__.items():  # such as a number of numpy's
            object.__setattr__(self, name, plain(getattr(self, name)))

    def steps(self, n_images: int) -> int:
        """Return how many steps it takes with so many images; batches that aren't full are left out.

        Raises
        ------
        ValueError
            If there is no full batch.
        """
        if n_images < self.batch_size:
            raise ValueError(f"{n_images} images are fewer than one batch of {self.batch_size}")
        return self.epochs * (n_images // self.batch_size)


RECIPE = Recipe()  # of the book


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
        check_number(least=0, most=1, weight=self.weight)
        if self.logits.ndim != 3 or len(self.logits) != 2:
            shape = tuple(self.logits.shape)
            raise ValueError(f"logits of images and mirror images must be (2, image, class), got {shape}")
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
        ours, theirs = ((said / self.temperature).log_softmax(1) for said in (student, told))
        return self.temperature**2 * kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _single_precision_muon() -> AbstractContextManager[Any]:
    """Let Muon orthogonalise in single precision.

    timm does it in bfloat16, which a CPU without bfloat16 units emulates, five to eight times slower.
    """
    name = "zeropower_via_newtonschulz"
    return patch.object(muon, name, partial(getattr(muon, name), dtype=torch.float32))


def _batches(images: ImageSet, recipe: Recipe, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the positions of shuffled batches, and which of their images to mirror: one half of them."""
    generator = torch.Generator().manual_seed(int(seed))
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        for positions in order.split(recipe.batch_size)[: len(images) // recipe.batch_size]:
            yield positions, torch.rand(len(positions), generator=generator) < 0.5


def _step_loss(
    classifier: nn.Module, images: ImageSet, teacher: Teacher | None, positions: Tensor, mirrored: Tensor
) -> Tensor:
    """Return the loss of one batch."""
    batch, labels = to_canvas(images.pixels[positions]), images.labels[positions]
    # All of these are copies, which a network may write into.
    said = classifier(torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(3), batch))
    if teacher is None:
        return cross_entropy(said, labels)
    return teacher.loss(said, labels, teacher.logits[mirrored.long(), positions])


@torch.inference_mode(mode=False)
def train(architecture: str, *, seed: int = 0, recipe: Recipe = RECIPE, progress: bool = True) -> Classifier:
    """Train one architecture of the catalogue from scratch on Fashion-MNIST's 60,000 training images.

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
    progress : bool
        Show a progress bar.

    Returns
    -------
    Classifier
        In evaluation mode, in single precision.

    Raises
    ------
    TypeError, ValueError
        If the architecture is unknown, the seed no whole number, or there are fewer images than one batch.
    FloatingPointError
        If the loss or its gradient stops being finite.
    """
    check_whole(least=0, seed=seed)
    seed += zoo.architecture(architecture).seed_offset
    classifier = zoo.build(architecture, seed=seed)
    return fit(classifier, fashion_mnist("train"), seed=seed, recipe=recipe, progress=progress)


@torch.inference_mode(mode=False)  # which switches gradients on, whatever is around
def fit(
    classifier: _Trained,
    images: ImageSet,
    *,
    teacher: Teacher | None = None,
    seed: int = 0,
    recipe: Recipe = RECIPE,
    optimiser: str = "muon",
    progress: bool = True,
) -> _Trained:
    """Train a classifier of any architecture by the recipe, from the weights that it has.

    Examples
    --------
    >>> network = timm.create_model("resnet18", in_chans=1, num_classes=10)
    >>> classifier = fit(Classifier(network, input_size=64), fashion_mnist("train", n=4000))

    Parameters
    ----------
    classifier : nn.Module
        Canvas to logits; changed in place.
    images : ImageSet
        Training images, on the canvas.
    teacher : Teacher, optional
        Makes it a student.
    seed : int
        Of the order of the images and the mirroring; the global random state stays as it was.
    recipe : Recipe, optional
        The recipe of the book by default.
    optimiser : str
        timm's name of it; `"muon"` is the recipe's, others are there to be compared.
    progress : bool
        Show a progress bar.

    Returns
    -------
    nn.Module
        The same, in evaluation mode.

    Raises
    ------
    TypeError, ValueError
        If there are fewer images than one batch, the seed is no whole number, or the teacher was trained
        on other classes or asked about other images.
    FloatingPointError
        If the loss or its gradient stops being finite.
    """
    check_whole(least=0, seed=seed)
    steps, network = recipe.steps(len(images)), cast("Any", getattr(classifier, "network", classifier))
    teacher = _checked_teacher(teacher, images)
    if hasattr(network, "set_distilled_training"):
        network.set_distilled_training(teacher is not None)
    classifier.train()
    decay: Any = dict(weight_decay=recipe.weight_decay, fallback_no_weight_decay=True)
    updates = create_optimizer_v2(network, opt=optimiser, lr=recipe.learning_rate, **decay)
    cycle = OneCycleLR(updates, recipe.learning_rate, steps, pct_start=recipe.warm_up, cycle_momentum=False)
    with torch.random.fork_rng(devices=[]), _single_precision_muon():
        torch.manual_seed(seed)
        batches = _batches(images, recipe, seed=seed)
        losses = (_step_loss(classifier, images, teacher, *batch) for batch in batches)
        _descend(classifier, tqdm(losses, "training", steps, leave=None, disable=not progress), cycle)
    classifier.eval()
    return classifier


def _checked_teacher(teacher: Teacher | None, images: ImageSet) -> Teacher | None:
    """Return the teacher, or None if nothing is to be learnt from it."""
    if teacher is None or teacher.weight == 0:
        return None
    told, given = tuple(teacher.logits.shape[1:]), (len(images), len(images.classes))
    if told != given:
        raise ValueError(f"the teacher's logits are for (images, classes) {told}, the images are {given}")
    return teacher


def _descend(classifier: nn.Module, losses: "tqdm[Tensor]", schedule: LRScheduler) -> None:
    """Take one step for each loss."""
    for step, loss in enumerate(losses):
        schedule.optimizer.zero_grad()
        loss.backward()
        length = nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        if not torch.isfinite(length):
            found = f"loss {loss:.3g}, gradient {length:.3g} at step {step}"
            raise FloatingPointError(f"{found}: lower the learning rate")
        schedule.optimizer.step()
        schedule.step()
        if step % 50 == 0:
            losses.set_postfix(loss=f"{loss:.3f}")


def accuracy(classifier: nn.Module, images: ImageSet) -> float:
    """Share of `images` classified correctly, 0 … 1, in evaluation mode."""
    return float((logits(classifier, images.pixels).argmax(1) == images.labels).double().mean())


def _measured(recipe: Recipe, name: str, *, progress: bool) -> tuple[Classifier, dict[str, str]]:
    """Train one model; return it as it will be stored, in half precision, and what is known of it."""
    architecture, seed = zoo.split_model_name(name)
    start = time.perf_counter()
    classifier = train(architecture, seed=seed, recipe=recipe, progress=progress)
    seconds = time.perf_counter() - start
    classifier.load_state_dict(zoo.in_half_precision(classifier.state_dict()))
    right = f"{accuracy(classifier, fashion_mnist('test')):.4f}"
    known = dict(architecture=architecture, seed=seed, test_accuracy=right, seconds=f"{seconds:.0f}")
    known |= dict(parameters=zoo.count_parameters(classifier), flops=zoo.count_flops(classifier))
    known |= dict(recipe=json.dumps(asdict(recipe)), torch=torch.__version__, timm=timm.__version__)
    return classifier, {key: str(value) for key, value in known.items()}


def _is_trained(path: Path, recipe: Recipe) -> bool:
    """Tell whether the file of a model is there; raise a ValueError if it is damaged or of another recipe."""
    if not path.exists():
        return False
    zoo.load_trained(path.stem, folder=path.parent)
    if differences := setting_differences(json.loads(zoo.read_metadata(path)["recipe"]), asdict(recipe)):
        raise ValueError(f"{path} is of another recipe ({'; '.join(differences)}): delete it to train anew")
    return True


def train_zoo(
    names: Sequence[str], *, recipe: Recipe = RECIPE, workers: int = 1, scheduler: str | None = None
) -> pd.DataFrame:
    """Train the models that `data/fashion69/weights` doesn't hold yet, and write its `training.csv` anew.

    A run that is killed and started again loses at most the models in progress.

    Parameters
    ----------
    names : sequence of str
        Models, such as `"resnet50"` or its second seed `"resnet50-seed1"`.
    workers, scheduler
        As for `train_side_by_side`.

    Returns
    -------
    DataFrame
        See `training_table`.

    Raises
    ------
    ValueError
        If an architecture is unknown, a name is given twice, or a stored model is damaged or was trained by
        another recipe; nothing has been trained then.
    FloatingPointError
        As `train_side_by_side`.
    BlockingIOError
        If another run writes into the folder.
    """
    check_workers(workers, scheduler)
    folder = zoo.weights_folder()
    paths = {name: folder / f"{name}.safetensors" for name in zoo.load_zoo(names=names)}

    def store(name: str, made: tuple[Classifier, dict[str, str]]) -> None:
        zoo.save_weights(made[0], paths[name], made[1])

    with sole_writer(folder):
        missing = [name for name, path in paths.items() if not _is_trained(path, recipe)]
        work = partial(_measured, recipe, progress=workers == 1 and not scheduler)
        try:
            train_side_by_side(work, missing, store, workers=workers, scheduler=scheduler)
        finally:
            table = training_table()
            table.to_csv(folder / "training.csv")
    return table


def train_side_by_side(
    work: _Work, items: list[Any], store: Callable[[Any, Any], None], *, workers: int, scheduler: str | None
) -> None:
    """Call `store(item, work(item))` here for every item, in any order; only `work` is done elsewhere.

    Each call of `work` has one thread, so that its result is the same however many go on beside it.
    `workers` and `scheduler` are those of `side_by_side`, and so is what is raised, and

    Raises
    ------
    FloatingPointError
        If a model diverged, or what it makes of images isn't finite, after all others have been stored.
    """
    failed: list[str] = []
    with tqdm(desc="trained", total=len(items), disable=not items) as bar:

        def finish(item: object, result: object) -> None:
            bar.update()
            try:
                if isinstance(result, Exception):
                    raise result
                store(item, result)
            except (FloatingPointError, ValueError) as error:
                failed.append(f"{item}: {error}")

        try:
            side_by_side(_attempt, work, items, finish, workers=workers, scheduler=scheduler)
        except ChildProcessError as error:
            raise ChildProcessError("; ".join([*failed, str(error)])) from error
    if failed:
        raise FloatingPointError(f"{'; '.join(failed)}. The {len(items) - len(failed)} others are trained")


def _attempt(work: _Work, item: object) -> Any:
    """Work in one thread; return the error of a model that failed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(item)
    except (FloatingPointError, ValueError) as error:
        return error
    finally:
        torch.set_num_threads(threads)


def training_table() -> pd.DataFrame:
    """Tabulate the weight files that ship with the book: one row a model, read from the files' own metadata.

    Returns
    -------
    DataFrame
        Index `model`; columns `architecture`, `seed`, `test_accuracy` (0 … 1, of the stored
        half-precision weights on all 10,000 test images), `seconds` (wall time of the training in
        one thread), `parameters`, `flops` (of one image), `recipe` (JSON),
        `torch`, `timm` (versions).
    """
    rows = {path.stem: zoo.read_metadata(path) for path in zoo.weights_folder().glob("*.safetensors")}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model").sort_index()
    numbers = {"seed": int, "test_accuracy": float, "seconds": int, "parameters": int, "flops": int}
    columns = ["architecture", *numbers, "recipe", "torch", "timm"]
    return table.reindex(columns=columns).astype(numbers)
