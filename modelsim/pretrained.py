"""Networks of timm with the weights that were trained for them, on ImageNet or elsewhere."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from torch.nn.utils import convert_conv2d_weight_memory_format

from modelsim.images import check_strings
from modelsim.zoo import Classifier, Zoo, check_timm_name, naming

_IMAGENET69 = """
    resnet50.a1_in1k resnet101.a1h_in1k resnet101c.gluon_in1k resnetblur50.bt_in1k
    wide_resnet50_2.racm_in1k resnext50_32x4d.a1h_in1k seresnet50.ra2_in1k seresnext50_32x4d.racm_in1k
    resnet50_gn.a1h_in1k resnest50d.in1k resnetv2_50.a1h_in1k resnetv2_101.a1h_in1k
    resnetv2_50d_evos.ah_in1k gcresnet50t.ra2_in1k gcresnext50ts.ch_in1k eca_resnet33ts.ra2_in1k
    botnet26t_256.c1_in1k eca_botnext26ts_256.c1_in1k sebotnet33ts_256.a1h_in1k halonet50ts.a1h_in1k
    sehalonet33ts.ra2_in1k eca_halonext26ts.c1_in1k lambda_resnet50ts.a1h_in1k
    lamhalobotnet50ts_256.a1h_in1k halo2botnet50ts_256.a1h_in1k nf_resnet50.ra2_in1k nfnet_l0.ra2_in1k
    eca_nfnet_l0.ra2_in1k cspresnet50.ra_in1k cspresnext50.ra_in1k cspdarknet53.ra_in1k xception65.tf_in1k
    dpn107.mx_in1k hrnet_w64.ms_in1k dla102x2.in1k ese_vovnet39b.ra_in1k convnext_tiny.fb_in1k
    convmixer_1536_20.in1k poolformer_m48.sail_in1k efficientnet_b2.ra_in1k mixnet_xl.ra_in1k
    fbnetv3_g.ra2_in1k rexnet_150.nav_in1k regnetx_320.pycls_in1k regnety_032.ra_in1k
    nf_regnet_b1.ra2_in1k haloregnetz_b.ra3_in1k swin_s3_tiny_224.ms_in1k
    vit_small_patch16_224.augreg_in21k_ft_in1k vit_base_patch32_224.augreg_in21k_ft_in1k
    deit_small_patch16_224.fb_in1k deit_base_patch16_224.fb_in1k convit_base.fb_in1k
    crossvit_base_240.in1k tnt_s_patch16_224.in1k nest_tiny_jx.goog_in1k
    swin_tiny_patch4_window7_224.ms_in1k pit_s_224.in1k resmlp_24_224.fb_in1k resmlp_big_24_224.fb_in1k
    gmlp_s16_224.ra3_in1k twins_svt_small.in1k twins_pcpvt_base.in1k pit_b_224.in1k coat_lite_small.in1k
    visformer_small.in1k vit_small_r26_s32_224.augreg_in21k_ft_in1k xcit_medium_24_p16_224.fb_in1k
    xcit_tiny_12_p8_224.fb_in1k
"""
IMAGENET69: dict[str, str] = {tagged.partition(".")[0]: tagged for tagged in _IMAGENET69.split()}
"""Weights of the paper's 69: those that timm 0.6, of 2022, gave for a name without a tag.

Of `xception65` these are TensorFlow's, since timm no longer has Gluon's.
"""


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
        has the weights of `IMAGENET69`, any other name timm's default.
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
    names = [names] if isinstance(names, str) else names
    check_strings("names of models", names)
    folder = None if weights is None else Path(weights)
    zoo = Zoo([one for name in names for one in _expanded(name, folder)], partial(_load, folder=folder))
    known = {name: _known(name, folder) for name in zoo if not name.startswith("hf-hub:")}
    for name, classes in known.items():
        if classes != (first := next(iter(known.values()))):
            raise ValueError(f"model {name!r} has {classes} classes, {next(iter(known))!r} has {first}")
    if folder is None and "xception65" in zoo:
        stand_in = "timm no longer has the paper's gluon_xception65: xception65.tf_in1k stands in for it"
        warnings.warn(stand_in, stacklevel=2)
    return zoo


def _expanded(name: str, folder: Path | None) -> Sequence[str]:
    """Return the names that one given name stands for."""
    if name == "imagenet69":
        return list(IMAGENET69)
    if not set("*?[") & set(name):
        return [name]
    there = timm.list_models(name, pretrained=True)
    found = there if folder is None else sorted(path.stem for path in folder.glob(f"{name}.safetensors"))
    if not found:
        raise ValueError(f"no network {'of timm' if folder is None else f'in {folder}'} matches {name!r}")
    return found


def _known(name: str, folder: Path | None) -> int:
    """Return how many classes a network of timm has, before anything is loaded; raise if it can't be used."""
    check_timm_name("model of timm", name)
    if folder is None and not timm.is_model_pretrained(name):
        raise ValueError(f"timm has no weights of {name!r}: give a folder that holds them")
    if folder is not None and not (path := folder / f"{name}.safetensors").is_file():
        raise FileNotFoundError(f"no weights of {name!r}: expected a file {path}")
    published = timm.get_pretrained_cfg(IMAGENET69.get(name, name))
    _check(name, published.num_classes, published.input_size)
    return published.num_classes


def _check(name: str, n_classes: int, input_size: Sequence[int]) -> int:
    """Raise unless a network tells classes, of images that are square; return their side."""
    if not n_classes:
        raise ValueError(f"model {name!r} has no head that tells classes: choose other weights of it")
    _, height, width = input_size
    if height != width:
        raise ValueError(f"model {name!r} takes images of {height} × {width} pixels: they must be square")
    return height


def _load(name: str, folder: Path | None) -> Classifier:
    """Build one network and fill it with its weights."""
    of_file: Mapping[str, object] = {}
    if folder is not None and not name.startswith("hf-hub:"):
        of_file = {"file": str(folder / f"{name}.safetensors"), "custom_load": False}
    with naming(name), torch.random.fork_rng(devices=[]):
        known = IMAGENET69.get(name, name)
        network = timm.create_model(known, pretrained=True, pretrained_cfg_overlay=of_file or None).eval()
    settings = resolve_model_data_config(network)
    side = _check(name, network.num_classes, settings["input_size"])
    convert_conv2d_weight_memory_format(network, torch.channels_last)
    return Classifier(network, input_size=side, mean=settings["mean"], std=settings["std"]).eval()
