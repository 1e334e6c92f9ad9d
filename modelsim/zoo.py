"""Catalogue of architectures, and the classifiers built from it.

A *classifier* maps the canvas (images in [0, 1]) to logits: its own differentiable resize and
normalisation come first, then a timm network.
"""

import copy
import difflib
import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from modelsim.attacks import frozen
from modelsim.catalogue import CATALOGUE, Architecture, at_full_width
from modelsim.images import check_strings, check_whole, data_directory

_Numbers = Sequence[float]

CANVAS_RULE = (
    "perturbation on the canvas; each classifier resizes (bilinear) and normalises by itself; "
    "adversarial images rounded to 8 bit before evaluation"
)


class Classifier(nn.Module):
    """Canvas to logits: resize, normalise, then a network.

    Examples
    --------
    >>> network = timm.create_model("resnet18", in_chans=1, num_classes=10)
    >>> classifier = Classifier(network, input_size=64)
    >>> classifier(torch.rand(8, 1, 28, 28)).shape
    torch.Size([8, 10])

    Parameters
    ----------
    network : nn.Module
        Takes normalised images (n, channel, input_size, input_size), returns logits (n, class).
    input_size : int
        Side, in pixels, to which the canvas is resized (bilinear, differentiable).
    mean, std : sequence of float
        Per channel, in units of the canvas; Fashion-MNIST's by default.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, *, input_size: int, mean: _Numbers = (0.286,), std: _Numbers = (0.353,)
    ) -> None:
        super().__init__()
        self.network = network
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, canvas: Tensor) -> Tensor:
        """Return logits (n, class) of a canvas (n, channel, height, width)."""
        channels = self.mean.shape[1]
        if canvas.ndim != 4 or canvas.shape[1] != channels:
            raise ValueError(f"expected a canvas (n, {channels}, height, width), got {tuple(canvas.shape)}")
        resized = nn.functional.interpolate(canvas, self.input_size, mode="bilinear", align_corners=False)
        return self.network((resized - self.mean) / self.std)


def split_model_name(name: str) -> tuple[str, int]:
    """Tell the architecture of a trained model from its seed, 0 where the name has none.

    Examples
    --------
    >>> split_model_name("resnet50-seed1")
    ('resnet50', 1)
    """
    before, _, seed = name.rpartition("-seed")
    return (before, int(seed)) if before and seed.isdecimal() else (name, 0)


def unknown_name_message(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is unknown and which known names are nearest."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    some = ", ".join([*known[:12], *([f"and {len(known) - 12} more"] if known[12:] else [])])
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {some}"
    return f"unknown {kind} {name!r}: {hint}"


def check_timm_name(kind: str, name: str) -> None:
    """Raise a ValueError that suggests the nearest, unless timm knows a name and the tag in it."""
    check_strings("names of timm's models", [name])
    tagged = timm.list_models(include_tags=True)
    if not timm.is_model(name) or ("." in name and name not in tagged):
        raise ValueError(unknown_name_message(kind, name, [*timm.list_models(), *tagged]))


def architecture(name: str) -> Architecture:
    """Look up the catalogue.

    Raises
    ------
    ValueError
        If `name` isn't in it; the message suggests the nearest names.
    """
    if (before := name.rpartition("-seed")[0]) in CATALOGUE:
        raise ValueError(f"{name!r} has no seed: write it as a whole number, such as {before}-seed1")
    if name not in CATALOGUE:
        raise ValueError(unknown_name_message("architecture", name, CATALOGUE))
    return CATALOGUE[name]


def build(name: str, *, seed: int = 0, n_classes: int = 10) -> Classifier:
    """Build an untrained classifier for a canvas of one channel.

    Examples
    --------
    >>> classifier = build("convnext_tiny", seed=0)
    >>> build("mobilenetv3_small_050").input_size
    64

    Parameters
    ----------
    name : str
        A name of the catalogue, built as small as there; or any other of timm, also one of the catalogue
        with a tag of weights (`"resnet50.a1_in1k"`), built at full width, with an input as small as it takes
        (64 pixels for a published 224).
    seed : int
        Of the initial weights; the global random state stays as it was.

    Raises
    ------
    TypeError, ValueError
        If timm doesn't know the name either, its network has no classifier head, or a number is out of range.
    """
    if name in CATALOGUE:
        return assemble(CATALOGUE[name], seed=seed, n_classes=n_classes)
    check_timm_name("architecture", name)
    return assemble(at_full_width(name), seed=seed, n_classes=n_classes)


def assemble(entry: Architecture, *, seed: int = 0, n_classes: int = 10) -> Classifier:
    """Build an untrained classifier of an architecture that needn't be in the catalogue."""
    check_whole(least=0, seed=seed)
    check_whole(n_classes=n_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = entry.network(n_classes=n_classes)
    # Channels last doubles the speed of small convolutional networks on a CPU and slows none much.
    convert_conv2d_weight_memory_format(network, torch.channels_last)
    return Classifier(network, input_size=entry.input_size)


def count_parameters(classifier: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(p.numel() for p in classifier.parameters() if p.requires_grad)


def count_flops(classifier: nn.Module, canvas: Sequence[int] = (1, 28, 28)) -> int:
    """Floating-point operations of one image (2 × multiply-accumulate; matrix products and convolutions)."""
    with frozen(classifier) as still, FlopCounterMode(display=False) as counter:
        still(torch.zeros(1, *canvas))
    return int(counter.get_total_flops())


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of a model before the message of whatever is raised inside, and make it a ValueError.

    Raises
    ------
    ValueError, TypeError
        The latter in place of a TypeError.
    """
    try:
        yield
    except Exception as error:  # whatever a network or an attack raises
        cause = error.__cause__ or error
        said = str(error) if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {error}"
        kind = TypeError if isinstance(cause, TypeError) else ValueError
        raise kind(f"model {name!r}: {said}") from cause


def fingerprint(classifier: nn.Module) -> str:
    """SHA-256 of all weights and buffers, in their order, to tell two classifiers apart.

    Their names don't count, nor does what else a module holds: a wrapper has the fingerprint of what it
    wraps.
    """
    digest = hashlib.sha256()
    for value in (dict(classifier.named_buffers()) | classifier.state_dict()).values():
        digest.update(str(getattr(value, "shape", "")).encode())
        digest.update(_to_bytes(value))
    return digest.hexdigest()


def _to_bytes(value: object) -> bytes:
    """Return what tells a value of a state dictionary from another: of a tensor, its numbers."""
    if not isinstance(value, Tensor):
        leaves, layout = tree_flatten(value)
        inside = b"".join(_to_bytes(leaf) for leaf in leaves if leaf is not value)
        return inside + (str(layout).encode() if inside else pickle.dumps(value))
    plain = value.detach().cpu()
    plain = plain.dequantize() if plain.is_quantized else plain.to_dense()
    return plain.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values, as it is noted in a weight file."""
    parts = (key.encode() + _to_bytes(weights[key]) for key in sorted(weights))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def in_half_precision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as they are stored: floats that are too large for half precision stay as they are."""
    halved = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    return {k: (v if v.isfinite().all() else weights[k]).contiguous() for k, v in halved.items()}


def save_weights(classifier: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the weights, in half precision where they fit, with `metadata`; the whole file appears or none.

    Examples
    --------
    >>> save_weights(classifier, "runs/mine.safetensors")

    Raises
    ------
    ValueError
        If a weight is not finite.
    """
    path, weights = Path(path), in_half_precision(classifier.state_dict())
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} is not finite: {path} is not written")
    partial_path = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, partial_path, {**(metadata or {}), "sha256": _digest(weights)})
    partial_path.replace(path)


def _training(path: Path) -> str:
    """Return the command that makes a weight file, if it is one of the book's."""
    is_ours = split_model_name(path.stem)[0] in CATALOGUE
    return f"run `python -m modelsim train {path.stem}`" if is_ours else ""


def _damaged(path: Path, why: str) -> ValueError:
    anew = f"delete it and {_training(path)}" if _training(path) else "write it anew with `save_weights`"
    return ValueError(
        f"{path} is truncated or corrupted, or holds no safetensors ({why}): restore it, or {anew}"
    )


def read_metadata(path: Path) -> dict[str, str]:
    """Read what `save_weights` noted beside the weights.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise _damaged(path, str(error)) from error


def load_weights(classifier: nn.Module, path: str | Path) -> None:
    """Fill `classifier` with the weights of a safetensors file, in single precision.

    Examples
    --------
    >>> load_weights(build("mobilenetv3_small_050"), "runs/mine.safetensors")

    A file that `save_weights` wrote is checked against the hash noted in it. One that was written elsewhere
    may hold the weights of the network that a `Classifier` wraps.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, or its weights are another architecture's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: {_training(path) or 'give the path of a file'}")
    noted, weights = read_metadata(path).get("sha256"), safetensors.torch.load_file(path)
    if noted is not None and noted != _digest(weights):
        raise _damaged(path, "its hash differs from the one noted in it")
    if isinstance(classifier, Classifier) and not all(key.startswith("network.") for key in weights):
        weights = {f"network.{key}": value for key, value in weights.items()}
    expected = {key: tuple(value.shape) for key, value in classifier.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if differing := sorted(key for key, _ in expected.items() ^ found.items()):
        key = differing[0]
        raise ValueError(
            f"weight file {path} belongs to another architecture: {len({*differing})} weights are missing, "
            f"too many or of another shape, such as {key}: {found.get(key, 'none')} in the file, "
            f"{expected.get(key, 'none')} in the network"
        )
    classifier.load_state_dict(weights)


class Zoo(Mapping[str, nn.Module]):
    """Classifiers by name, each built by `load` when it is asked for and not kept.

    Raises
    ------
    TypeError, ValueError
        If a name is not a string, empty, or given twice.
    """

    def __init__(self, names: str | Sequence[str], load: Callable[[str], nn.Module]) -> None:
        self._names = (names,) if isinstance(names, str) else tuple(names)
        check_strings("names of models", self._names)
        if duplicates := sorted({name for name in self._names if self._names.count(name) > 1}):
            raise ValueError(f"duplicate model names: {', '.join(duplicates)}")
        self._load = load

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self._names:
            raise KeyError(unknown_name_message("model", name, self._names))
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def weights_folder() -> Path:
    """Return where the weights of the embedded zoo are."""
    return data_directory() / "fashion69" / "weights"


def load_trained(name: str, *, folder: Path) -> Classifier:
    """Load one classifier of a folder of weights."""
    classifier = assemble(architecture(split_model_name(name)[0]))
    load_weights(classifier, folder / f"{name}.safetensors")
    return classifier.eval()


def load_zoo(study: str = "fashion69", *, names: str | Sequence[str] | None = None) -> Zoo:
    """Load the classifiers that ship with the book, each when it is asked for.

    Examples
    --------
    >>> zoo = load_zoo("fashion69")
    >>> zoo["resnet50"](images.images[:8]).argmax(1)

    Parameters
    ----------
    study : str
        `"fashion69"`, the one embedded zoo.
    names : str or sequence of str, optional
        Models, such as `"resnet50"` or its second seed `"resnet50-seed1"`; by default the first seed
        of every architecture of the catalogue.

    Raises
    ------
    TypeError, ValueError
        If the study or an architecture is unknown, or a name is not a string or given twice.
    """
    if study != "fashion69":
        raise ValueError(unknown_name_message("study", study, ["fashion69"]))
    load = partial(load_trained, folder=weights_folder())
    zoo = Zoo(list(CATALOGUE) if names is None else names, load)
    for name in zoo:
        architecture(split_model_name(name)[0])
    return zoo


class _Folded(nn.BatchNorm2d):
    """A batch normalisation whose work the convolution before it does."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply what timm keeps inside: dropout and activation."""
        return nn.Sequential(*self.children())(input)


class _Record(TorchDispatchMode):
    """Notes of every operation, of modules and of plain functions alike, which tensors it reads and makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, list[Tensor], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.operations.append((function, read, made))
        return made


def _foldable(classifier: nn.Module, record: _Record) -> Iterator[tuple[Any, Any]]:
    """Yield each convolution and the normalisation that alone reads it, where no weight is read twice."""
    reads = Counter(id(tensor) for _, read, _ in record.operations for tensor in read)
    modules, kinds, made_by = list(classifier.modules()), (nn.BatchNorm2d, BatchNormAct2d), {}
    by_weight = {id(m.weight): m for m in modules if isinstance(m, nn.Conv2d)}
    by_mean = {id(m.running_mean): m for m in modules if type(m) in kinds and not m.training}
    for function, (first, *others), made in ((f, read, made) for f, read, made in record.operations if read):
        if all(reads[id(tensor)] == 1 for tensor in others):
            if function is torch.ops.aten.convolution.default and id(others[0]) in by_weight:
                made_by[id(made)] = by_weight[id(others[0])]
            elif reads[id(first)] == 1 and id(first) in made_by:
                yield from ((made_by[id(first)], by_mean[id(x)]) for x in others if id(x) in by_mean)


def fold(classifier: nn.Module, canvas: Tensor) -> nn.Module:
    """Make each convolution and the batch normalisation after it one convolution: the same logits, sooner.

    Examples
    --------
    >>> quick = fold(zoo["resnet50"], images.images[:8])

    Parameters
    ----------
    classifier : nn.Module
        Canvas to logits. Left as it was.
    canvas : Tensor
        A few images, to see how data flow through the network, and that its logits stay.

    Returns
    -------
    nn.Module
        A copy in evaluation mode; or `classifier` itself, where nothing can be folded, it can't be
        copied, or a logit of `canvas` would change by more than 1 % of the largest.
    """
    try:
        folded = copy.deepcopy(classifier)
    except Exception:  # whatever an object's own way of copying raises
        return classifier
    folded.eval()
    with torch.no_grad():
        with _Record() as record:
            logits = folded(canvas.clone())
        pairs = list(_foldable(folded, record))
        for convolution, norm in pairs:
            fused = fuse_conv_bn_eval(convolution.eval(), norm)
            convolution.weight, convolution.bias = fused.weight, fused.bias
            norm.__class__ = _Folded
        change = (folded(canvas.clone()) - logits).abs().max()
    return folded if pairs and change <= 0.01 * logits.abs().max() else classifier
