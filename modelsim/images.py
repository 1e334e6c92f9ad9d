"""Image sets: a canvas of images in [0, 1] with labels, class names and stable ids."""

import gzip
import hashlib
import os
import shlex
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from numbers import Integral, Real
from pathlib import Path
from sys import float_info
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm.contrib.concurrent import thread_map

_CLASSES = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
_FASHION_MNIST_FILES = {"train": "train", "test": "t10k"}


def data_directory() -> Path:
    """Return the folder of embedded data, as an absolute path.

    That is the environment variable `MODELSIM_DATA` if it is set, else `data/` beside the package.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or it is not one of ours, into which nothing must be written.
    """
    folder = Path(os.environ.get("MODELSIM_DATA") or Path(__file__).resolve().parents[1] / "data").absolute()
    if missing := " and no ".join(n for n in ("fashion-mnist", "fashion69") if not (folder / n).is_dir()):
        raise FileNotFoundError(
            f"no data of modelsim at {folder} (no {missing} in it): set MODELSIM_DATA to a clone's data/"
        )
    return folder


def check_strings(what: str, names: Iterable[object]) -> None:
    """Raise unless all `names` are strings that aren't blank; `what` says of what they are."""
    if isinstance(names, str):
        raise TypeError(f"{what} must be several strings, got one: {names!r}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{what} must be strings, got {name!r}")
        if not name.strip():
            raise ValueError(f"{what} must not be empty, got {name!r}")


def check_whole(*, least: int = 1, **options: object) -> None:
    """Raise unless every option is a whole number, at least `least`."""
    for name, value in options.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if not least <= (number := int(value)) < 2**63:
            bound = f"at least {least}" if number < least else "less than 2**63"
            raise ValueError(f"{name} must be {bound}, got {value}")


def check_number(*, least: float = float_info.min, most: float = float_info.max, **options: object) -> None:
    """Raise unless every option is a number from `least` to `most`; by default positive and finite."""
    for name, value in options.items():
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not least <= (number := float(value)) <= most:
            low = f"at least {least:g}" if least <= 0 else "greater than 0"
            raise ValueError(f"{name} must be {f'at most {most:.4g}' if number > most else low}, got {value}")


_TO_CANVAS = "convert them by .float(), divide 8-bit images by 255, and leave normalisation to the networks"


def check_images(images: Tensor, *, what: str = "images", advice: str = _TO_CANVAS) -> None:
    """Raise unless `images` is a canvas: float32 (n, channel, height, width) in [0, 1], n ≥ 1.

    A message begins with `what`, and ends with `advice` where type or range are wrong.

    Raises
    ------
    TypeError
        If `images` is not a float32 tensor.
    ValueError
        If its shape is not four-dimensional with 1 or 3 channels, it is empty, or a value is NaN or
        outside [0, 1].
    """
    _check_type(what, images, torch.float32, advice)
    _check_shape(what, images)
    if images.isnan().any():
        raise ValueError(f"{what}: {int(images.isnan().flatten(1).any(1).sum())} image(s) contain NaN")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise ValueError(f"{what} must lie in [0, 1], got values from {low:.8g} to {high:.8g}: {advice}")


def _check_shape(what: str, images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{what} must have shape (n, 1 or 3, height, width), got {tuple(images.shape)}")
    if images.numel() == 0:
        raise ValueError(f"the image set is empty: shape {tuple(images.shape)}")


def check_labels(labels: Tensor, *, n_images: int, n_classes: int) -> None:
    """Raise unless `labels` holds `n_images` whole numbers in 0 … n_classes - 1.

    Raises
    ------
    TypeError
        If `labels` is not an int64 tensor.
    ValueError
        If there is not one label an image, or a label is outside the classes.
    """
    _check_type("labels", labels, torch.int64, "convert them by torch.as_tensor(labels).long()")
    if labels.shape != (n_images,):
        raise ValueError(f"expected one label for each of {n_images} images, got shape {tuple(labels.shape)}")
    if outside := ((labels < 0) | (labels >= n_classes)).nonzero().flatten().tolist():
        raise ValueError(
            f"{len(outside)} label(s) outside the {n_classes} classes 0 … {n_classes - 1}: "
            f"the first is {int(labels[outside[0]])} at position {outside[0]}"
        )


def _check_type(what: str, values: object, dtype: torch.dtype, advice: str) -> None:
    found = values.dtype if isinstance(values, Tensor) else type(values).__name__
    if found != dtype:
        raise TypeError(f"{what} must be a tensor of {dtype}, got {found}: {advice}")


def to_canvas(pixels: Tensor) -> Tensor:
    """Return the canvas, float32 in [0, 1], of pixels as an `ImageSet` keeps them."""
    # Not by a number: on a GPU torch would multiply by its reciprocal, and round otherwise.
    whole = torch.tensor(255, dtype=torch.float32, device=pixels.device)
    return pixels / whole if pixels.dtype == torch.uint8 else pixels


@dataclass(frozen=True)
class ImageSet:
    """Images on one canvas, with what is known of each.

    Examples
    --------
    >>> images = fashion_mnist("test", n=1000, seed=0)
    >>> images.images.shape
    torch.Size([1000, 1, 28, 28])

    Only the part that is asked for is made float, so of a large set ask for one batch after the other:

    >>> images[:100].images

    Attributes
    ----------
    images : Tensor
        The canvas: float32 (n, channel, height, width) in [0, 1]. A set may also be made of 8-bit pixels,
        uint8 in 0 … 255, and keeps them as they are; then this is a new tensor each time.
    pixels : Tensor
        What the set was made of: float32, or uint8, a quarter of the memory.
    labels : Tensor
        int64 (n,), indices into `classes`.
    ids : tuple of str
        One name an image that stays the same in every subset.
    classes : tuple of str
        Class names.
    name : str
        Name of the set, recorded in every study made from it.

    Raises
    ------
    TypeError, ValueError
        When made from anything but a canvas, labels within the classes, unique ids, one an image, and
        names of the classes.
    """

    images: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    name: str
    pixels: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for what, values in {"images": self.pixels, "labels": self.labels}.items():
            if isinstance(values, Tensor) and (values.device.type != "cpu" or values.requires_grad):
                raise ValueError(f"{what} must be plain values on the CPU: give {what}.detach().cpu()")
        check_strings("image ids", self.ids)
        check_strings("class names", self.classes)
        check_strings("names of image sets", [self.name])
        for name in ("ids", "classes"):  # such as a list
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if getattr(self.pixels, "dtype", None) == torch.uint8:
            _check_shape("images", self.pixels)
        else:
            check_images(self.pixels)
        check_labels(self.labels, n_images=len(self.pixels), n_classes=len(self.classes))
        n, given, unique = len(self), len(self.ids), len(set(self.ids))
        if not n == given == unique:
            raise ValueError(f"expected {n} unique image ids, got {given} of which {unique} differ")

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, positions: int | slice | Sequence[int] | NDArray[Any] | Tensor) -> "ImageSet":
        """Return copies of the images at `positions`, in that order.

        Examples
        --------
        >>> images[:5], images[7], images[[4, 1]], images[images.labels == 3]

        Raises
        ------
        IndexError
            If a position is outside the set or not a whole number, or a mask doesn't fit the set.
        """
        places = np.ascontiguousarray(np.arange(len(self))[positions])
        if places.ndim > 1:
            raise IndexError(f"positions must be one-dimensional, got {positions!r}")
        keep, ids = torch.from_numpy(places), tuple(self.ids[place] for place in places)
        return ImageSet(self.pixels[keep], self.labels[keep], ids, self.classes, self.name)

    def hashes(self) -> tuple[str, ...]:
        """Return the start of the SHA-256 of each image's pixels and label, to recognise parts of a set."""
        pairs = zip(self._bytes(1), self.labels.numpy(), strict=True)
        return tuple(hashlib.sha256(x + y.tobytes()).hexdigest()[:16] for x, y in pairs)

    def fingerprint(self) -> str:
        """SHA-256 of pixels, labels and ids, to tell two image sets apart."""
        digest = hashlib.sha256()
        for part in self._bytes(100):
            digest.update(part)
        digest.update(self.labels.numpy().tobytes() + "\n".join(self.ids).encode())
        return digest.hexdigest()

    def _bytes(self, size: int) -> Iterator[bytes]:
        """Yield the canvas in parts of `size` images."""
        return (to_canvas(part).numpy().tobytes() for part in self.pixels.split(size))

    def balanced(self, n: int, *, seed: int = 0) -> "ImageSet":
        """Draw `n` images, the same number of every class, sorted by position in this set.

        Raises
        ------
        ValueError
            If `n` is not a positive multiple of the number of classes, or a class has too few images.
        TypeError
            If `n` or `seed` is not a whole number.
        """
        check_whole(n=n)
        check_whole(least=0, seed=seed)
        each, rest = divmod(n, len(self.classes))
        if rest:
            raise ValueError(f"n must be a positive multiple of the {len(self.classes)} classes, got {n}")
        return self[_draw(self.labels.numpy(), self.classes, each, seed)]


# Set after the constructor is made, which takes `images`, and keeps them as they are.
ImageSet.images = property(  # type: ignore[assignment]
    lambda images: to_canvas(images.pixels),
    lambda images, given: object.__setattr__(images, "pixels", given),
)


def _draw(labels: NDArray[np.int64], classes: Sequence[str], each: int, seed: int) -> NDArray[np.int64]:
    """Draw positions of `each` images of every class; return them sorted."""
    random = np.random.default_rng(seed)
    chosen = []
    for label, class_name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < each:
            raise ValueError(f"class {class_name!r} has {len(members)} images, {each} were asked for")
        chosen.append(random.choice(members, size=each, replace=False))
    return np.sort(np.concatenate(chosen))


def _read_idx(path: Path, *, header: int) -> NDArray[np.uint8]:
    """Read the body of a gzip IDX file of unsigned bytes."""
    try:
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
    except (EOFError, ValueError, gzip.BadGzipFile, zlib.error) as error:
        restore = f"git -C {shlex.quote(str(path.parent))} checkout -- {path.name}"
        raise ValueError(f"{path} is truncated or corrupted ({error}): restore it with {restore}") from error


def fashion_mnist(split: str = "test", *, n: int | None = None, seed: int = 0) -> ImageSet:
    """Load Fashion-MNIST: 28 × 28 grey images of clothes, ten classes.

    Parameters
    ----------
    split : {"train", "test"}
        60,000 or 10,000 images.
    n : int, optional
        Draw this many, balanced over the classes; all of them by default.
    seed : int
        Of the draw.

    Raises
    ------
    ValueError
        If `split` is unknown, `n` can't be drawn evenly, or a file is corrupted.
    TypeError
        If `n` or `seed` is not a whole number.

    References
    ----------
    Xiao, Rasul and Vollgraf, *Fashion-MNIST*, arXiv 1708.07747.
    """
    if split not in _FASHION_MNIST_FILES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    stem = data_directory() / "fashion-mnist" / _FASHION_MNIST_FILES[split]
    pixels = _read_idx(Path(f"{stem}-images-idx3-ubyte.gz"), header=16).reshape(-1, 1, 28, 28)
    labels = torch.from_numpy(_read_idx(Path(f"{stem}-labels-idx1-ubyte.gz"), header=8).astype(np.int64))
    ids = tuple(f"{split}/{i:05d}" for i in range(len(labels)))
    classes = tuple(_CLASSES.split(", "))
    images = ImageSet(torch.tensor(pixels), labels, ids, classes, f"Fashion-MNIST {split}")
    return images if n is None else images.balanced(n, seed=seed)


def image_folder(
    path: str | Path,
    *,
    per_class: int = 5,
    canvas: int = 224,
    labels: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ImageSet:
    """Draw pictures of a folder, the same number of every class there, cut to squares of one size.

    Each is turned as its camera noted, made RGB, its short side resized to `canvas` / 0.875 pixels (bicubic)
    and its middle cut out, as timm does to measure most of its networks.

    Examples
    --------
    >>> images = image_folder("imagenet/val", per_class=5)
    >>> images = image_folder("imagenet/flat", labels="LOC_val_solution.csv")
    >>> images = image_folder("imagenet/val-{000000..000063}.tar")

    Parameters
    ----------
    path : path
        Folder of folders, one a class; or, with `labels`, a folder of pictures; or shards of webdataset, of
        samples with a picture (`jpg`, `jpeg`, `png` or `webp`) and its class (`cls`). If the classes are
        synsets of ImageNet (`n01440764`), they are its 1,000 in timm's order, also where there are fewer;
        else those there, in the order of their names.
    per_class : int
        How many to draw of every class there.
    canvas : int
        Side in pixels.
    labels : path, optional
        Table (CSV with a line of titles) of names of files, with a suffix or without, and classes. Of a class
        only the synset counts that it begins with. Here and in shards whole numbers are places among the
        synsets.
    seed : int
        Of the draw.
    progress : bool
        Show a progress bar.

    Raises
    ------
    OSError
        If there is no such folder, table or shard, or no folder in the folder.
    ValueError
        If it has one class only, or too few pictures of a class; if some classes are ImageNet's and others
        aren't; if files of the table are missing, or a sample has no picture or class; or if pictures can't
        be read: the message says how many, and names the first.
    TypeError
        If a number is not a whole one.
    ModuleNotFoundError
        If there are shards, but webdataset is not installed.
    """
    check_whole(per_class=per_class, canvas=canvas)
    check_whole(least=0, seed=seed)
    shards = str(path).endswith(".tar")
    told = _of_shards(path) if shards else _of_table(path, labels) if labels else _of_folders(path)
    known, synsets = list(told.cat.categories), ImageNetInfo().label_names()
    if len(known) < 2:
        raise ValueError(f"{path} has one class, {known[0]!r}: expected a folder for each of several")
    if 0 < len(foreign := [name for name in known if name not in synsets]) < len(known):
        some = f"{len(foreign)} of {len(known)} classes in {path}"
        raise ValueError(f"{some} are none of ImageNet's 1,000, such as {foreign[0]!r}: leave them out")
    drawn = told.iloc[_draw(told.cat.codes.to_numpy(), known, per_class, seed)]
    files = _in_shards(path, drawn.index) if shards else [Path(path, name) for name in drawn.index]
    bar: dict[str, Any] = dict(desc="pictures", disable=not progress, leave=False)
    pixels = thread_map(partial(_read_picture, canvas=canvas), files, drawn.index, **bar)
    if broken := [read for read in pixels if isinstance(read, str)]:
        raise ValueError(f"{len(broken)} of {len(pixels)} pictures can't be read, the first is {broken[0]}")
    classes = known if foreign else synsets
    places = torch.tensor([classes.index(name) for name in drawn])
    name = f"{Path(path).name}, {canvas} pixels"
    return ImageSet(torch.stack(pixels), places, tuple(drawn.index), tuple(classes), name)


def _of_folders(path: str | Path) -> pd.Series:
    """Return the class of every picture, its folder's name, by its path, as a category."""
    found = ImageFolder(path, allow_empty=True)
    ids = [Path(file).relative_to(path).as_posix() for file in next(zip(*found.samples, strict=True), ())]
    return pd.Series(pd.Categorical.from_codes(found.targets, found.classes), ids)


def _of_table(path: str | Path, labels: str | Path) -> pd.Series:
    """Return the class of every picture of a table, by its path in the folder, as a category."""
    table = pd.read_csv(labels, dtype=str, usecols=[0, 1]).dropna()
    names, classes = table.iloc[:, 0].tolist(), table.iloc[:, 1].tolist()
    files = [file.relative_to(path) for file in sorted(Path(path).rglob("*")) if file.is_file()]
    known = {key: file.as_posix() for file in files for key in (file.stem, file.name, file.as_posix())}
    if missing := [name for name in names if name not in known]:
        some = f"{len(missing)} of {len(names)} files of {labels}"
        raise ValueError(f"{some} are not in the folder {path}, the first is {missing[0]}")
    return _by_synset(dict(zip((known[name] for name in names), classes, strict=True)))


def _of_shards(path: str | Path) -> pd.Series:
    """Return the class of every sample, by its key, as a category."""
    return _by_synset({key: name for key, name, _ in _samples(path)})


def _in_shards(path: str | Path, keys: Collection[str]) -> list[BytesIO]:
    """Return the files of pictures, in the order of the shards."""
    return [BytesIO(content) for key, _, content in _samples(path) if key in keys]


def _samples(path: str | Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield key, class and file of every picture in shards."""
    try:
        from braceexpand import braceexpand
        from webdataset.tariterators import group_by_keys, tar_file_expander
    except ModuleNotFoundError as error:
        error.msg = "shards need a further package: pip install webdataset"
        raise
    for shard in braceexpand(str(path)):
        with Path(shard).open("rb") as stream:
            for parts in group_by_keys(tar_file_expander([{"url": shard, "stream": stream}])):
                pictures = [parts[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in parts]
                if not pictures or "cls" not in parts:
                    there = [name for name in parts if not name.startswith("__")]
                    raise ValueError(
                        f"sample {parts['__key__']} of {shard} has {there}, expected jpg and cls"
                    )
                yield parts["__key__"], parts["cls"].decode().strip(), pictures[0]


def _by_synset(told: Mapping[str, str]) -> pd.Series:
    """Return classes as a category, by the name of the picture, with the synsets for numbers."""
    synsets = ImageNetInfo().label_names()
    if all(name.isdecimal() for name in told.values()):
        if most := [name for name in told.values() if int(name) >= len(synsets)]:
            raise ValueError(f"ImageNet's classes are numbered 0 to {len(synsets) - 1}, got {most[0]}")
        told = {picture: synsets[int(name)] for picture, name in told.items()}
    first = {name: name.split()[0] if name.split()[0] in synsets else name for name in {*told.values()}}
    return pd.Series(told, dtype=str).map(first).astype("category")


def _read_picture(file: Path | BytesIO, name: str, *, canvas: int) -> Tensor | str:
    """Read the middle of a picture as 8-bit values (3, canvas, canvas), or say why it can't be read."""
    cut = v2.Compose([v2.Resize(round(canvas / 0.875), v2.InterpolationMode.BICUBIC), v2.CenterCrop(canvas)])
    try:
        with Image.open(file) as picture:
            if picture.mode[0] in "IF":  # which Pillow would cut off at 255
                raise ValueError("16 bits or more a pixel, save it with 8")
            return v2.functional.pil_to_tensor(cut(ImageOps.exif_transpose(picture).convert("RGB")))
    except Exception as error:  # whatever a decoder raises
        return f"{name} ({error})"
