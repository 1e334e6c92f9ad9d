"""Networks of timm with the weights that were trained for them, on ImageNet or elsewhere."""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from timm.data import resolve_model_data_config
from torch.nn.utils import convert_conv2d_weight_memory_format

from modelsim.catalogue import CATALOGUE
from modelsim.images import check_strings
from modelsim.zoo import Classifier, Zoo, check_timm_name, naming

# Weights of those of the paper's 69 of which timm has several: as timm 0.6, of 2022, had them without a tag.
# Of `xception65` these are TensorFlow's, since timm no longer has Gluon's.
_TAGS = dict(
    a1_in1k="resnet50", a1h_in1k="resnet101 resnext50_32x4d", ra2_in1k="seresnet50", ra_in1k="regnety_032",
    racm_in1k="wide_resnet50_2 seresnext50_32x4d", tf_in1k="xception65", pycls_in1k="regnetx_320",
    ms_in1k="swin_tiny_patch4_window7_224",
    augreg_in21k_ft_in1k="vit_small_patch16_224 vit_base_patch32_224 vit_small_r26_s32_224",
    fb_in1k="convnext_tiny resmlp_24_224 resmlp_big_24_224 xcit_medium_24_p16_224 xcit_tiny_12_p8_224",
)  # fmt: skip
_PAPERS = {name: f"{name}.{tag}" for tag, names in _TAGS.items() for name in names.split()}


def pretrained(names: str | Sequence[str], weights: str | Path | None = None) -> Zoo:
    """Return networks of timm with their own weights, input size and normalisation.

    Examples
    --------
    >>> zoo = pretrained("imagenet69")
    >>> zoo = pretrained(["resnet18*", "vit_small_patch16_224", "hf-hub:timm/resnet50.a1_in1k"])
    >>> zoo = pretrained("tf_efficientnet_lite?", weights="my_weights")

    Parameters
    ----------
    names : str or sequence of str
        Names of timm, with a tag of weights or without; patterns such as `"resnet18*"`, for all that match;
        ids of a hub, after `hf-hub:`; or `"imagenet69"`, the paper's sixty-nine. One of these without a tag
        has the weights that timm gave for it in 2022, any other name timm's default.
    weights : path, optional
        Folder of `NAME.safetensors`, a file a network, as timm's hub has them; patterns are matched with the
        files. By default weights are fetched from the hub once, and kept where the environment variable
        `HF_HOME` says. No file is read in a form that can hold code.

    Returns
    -------
    Zoo
        Classifiers for a canvas of three channels, each loaded when it is asked for.

    Warns
    -----
    UserWarning
        If `xception65` is among the names, without a tag: the paper's weights are no longer to be had.

    Raises
    ------
    TypeError, ValueError
        If a name is unknown, matches nothing, is given twice, or has no weights; or a network has no
        head, an input that isn't square, or another number of classes than the others. The zoo raises a
        ValueError when weights can't be fetched or don't fit.
    FileNotFoundError
        If `weights` lacks a file.
    """
    given, folder = [names] if isinstance(names, str) else names, Path(weights) if weights else None
    check_strings("names of models", given)
    zoo = Zoo([one for name in given for one in _expanded(name, folder)], partial(_load, folder=folder))
    classes = {name: _known(name, folder) for name in zoo if not name.startswith("hf-hub:")}
    for name, other in zip(classes, [*classes][1:], strict=False):
        if classes[name] != classes[other]:
            raise ValueError(f"{name!r} has {classes[name]} classes, {other!r} has {classes[other]}")
    if folder is None and "xception65" in classes:
        stand_in = "timm no longer has the paper's gluon_xception65: xception65.tf_in1k stands in for it"
        warnings.warn(stand_in, stacklevel=2)
    return zoo


def expected_accuracy(path: str | Path, names: Iterable[str]) -> dict[str, float]:
    """Read the top-1 accuracy, 0 … 1, of networks in a table such as timm's own results.

    Examples
    --------
    >>> expected_accuracy("results-imagenet.csv", ["resnet50"])

    Parameters
    ----------
    path : path
        CSV with the columns `model`, a name with or without the tag of its weights, and `top1`, in per cent.
    names : iterable of str
        As given to `pretrained`; those that aren't in the table are left out.

    Raises
    ------
    OSError, ValueError
        If there is no such table, it has other columns, or none of the names.
    """
    table = pd.read_csv(path)
    if missing := {"model", "top1"} - {*table}:
        raise ValueError(f"{path} has no column {sorted(missing)[0]!r}, as timm's tables of results have")
    top1 = table.drop_duplicates("model").set_index("model").top1 / 100
    found = {name: top1[key] for name in names for key in (_tagged(name), name) if key in top1.index}
    if not found:
        raise ValueError(f"{path} has none of the networks {', '.join(names)}")
    return found


def _tagged(name: str) -> str:
    """Return the name with the tag of the weights that it stands for."""
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) and "." not in name else None
    return _PAPERS.get(name, f"{name}.{known.tag}" if known and known.tag else name)


def _expanded(name: str, folder: Path | None) -> Sequence[str]:
    """Return the names that one given name stands for."""
    if name == "imagenet69" or not set("*?[") & set(name):
        return list(CATALOGUE) if name == "imagenet69" else [name]
    there = (
        folder.glob(f"{name}.safetensors") if folder else map(Path, timm.list_models(name, pretrained=True))
    )
    if not (found := sorted(path.name.removesuffix(".safetensors") for path in there)):
        raise ValueError(f"no network {f'in {folder}' if folder else 'of timm'} matches {name!r}")
    return found


def _known(name: str, folder: Path | None) -> int:
    """Return how many classes a network of timm has, before anything is loaded; raise if it can't be used."""
    check_timm_name("model of timm", name)
    if folder and not (path := folder / f"{name}.safetensors").is_file():
        raise FileNotFoundError(f"no weights of {name!r}: expected a file {path}")
    if not folder and not timm.is_model_pretrained(name):
        raise ValueError(f"timm has no weights of {name!r}: give a folder that holds them")
    published = timm.get_pretrained_cfg(_PAPERS.get(name, name))
    _side(name, published.num_classes, published.input_size)
    return published.num_classes


def _side(name: str, n_classes: int, input_size: Sequence[int]) -> int:
    """Return the side of a network's input; raise unless that is square and the network tells classes."""
    if not n_classes:
        raise ValueError(f"model {name!r} has no head that tells classes: choose other weights of it")
    _, height, width = input_size
    if height != width:
        raise ValueError(f"model {name!r} takes images of {height} × {width} pixels: they must be square")
    return height


def _load(name: str, folder: Path | None) -> Classifier:
    """Build one network and fill it with its weights."""
    of_file = folder and {"file": str(folder / f"{name}.safetensors"), "custom_load": False}
    overlay = None if name.startswith("hf-hub:") else of_file
    return at_full_size(name, pretrained=True, pretrained_cfg_overlay=overlay)


def at_full_size(name: str, **of_timm: Any) -> Classifier:
    """Build a network of timm as `pretrained` does, but with random weights, unless timm is told otherwise.

    Raises
    ------
    ValueError
        If timm can't build it, or it has no head or an input that isn't square.
    """
    with naming(name), torch.random.fork_rng(devices=[]):
        network = timm.create_model(_PAPERS.get(name, name), **of_timm)
    settings = resolve_model_data_config(network)
    side = _side(name, network.num_classes, settings["input_size"])
    convert_conv2d_weight_memory_format(network, torch.channels_last)
    return Classifier(network, input_size=side, mean=settings["mean"], std=settings["std"]).eval()
