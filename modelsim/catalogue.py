"""The sixty-nine architectures, each scaled down from timm's own model of that name.

Every block is the published one. A row holds what differs: width, depth, heads, groups and resolution,
and the patch, window, block and kernel sizes that must follow the resolution.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import timm
import torch
from timm import layers, models
from timm.models import byoanet, byobnet, cspnet, hrnet, mlp_mixer
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from torch import nn

Base = Literal["CNN", "Transformer", "MLP-Mixer", "Hybrid", "NAS"]


@dataclass(frozen=True)
class Architecture:
    """One row of the catalogue.

    Examples
    --------
    >>> small = Architecture("resnet26", "CNN", dict(layers=(1, 2, 1, 1), channels=(8, 16, 32, 64)))
    >>> network = small.network(n_classes=10)

    Attributes
    ----------
    name : str
        Of timm's model.
    base : str or None
        CNN, Transformer, MLP-Mixer, Hybrid or NAS; None where it isn't known.
    settings : mapping
        Keyword arguments of `model`; of timm's entry point those that differ from its own.
    input_size : int
        Side of the network's input, in pixels: 64 where the published one is 224, larger for larger.
        timm's entry point makes a network for this size, where it is one for a single size.
    model : callable, optional
        What builds the network from one channel, the classes and `settings`. Default: timm's entry point
        of that name; some refuse other settings than their own, and there it is the class that they build.
    seed_offset : int
        Added to every seed. Only for an architecture that is the same network as another (timm's
        ViT-S/16 is its DeiT-S/16): with equal seeds the two would be one model under two names.
    """

    name: str
    base: Base | None
    settings: Mapping[str, Any]
    input_size: int = 64
    model: Callable[..., nn.Module] | None = None
    seed_offset: int = 0

    def network(self, *, n_classes: int) -> nn.Module:
        """Build the untrained network, for images of one channel."""
        settings = dict(in_chans=1, num_classes=n_classes) | dict(self.settings)
        if self.model is not None:
            return self.model(**settings)
        size = (1, self.input_size, self.input_size)
        return timm.create_model(self.name, pretrained_cfg_overlay=dict(input_size=size), **settings)


def _byob(name: str, kernels: Mapping[str, Any] | None = None, *, width: float = 1 / 8) -> dict[str, Any]:
    """Narrow a network of timm's "bring your own blocks", and keep two blocks of each stage.

    These are its first, and its last of another kind where a stage has two kinds. Groups keep their
    number, so their size shrinks with the width. `kernels` has the settings of self-attention, by kind.
    """
    published = (byobnet.model_cfgs | byoanet.model_cfgs)[name]

    def narrow(block: Any, *, strided: bool) -> Any:
        block = replace(block, d=1, gs=block.gs and max(2, round(block.gs * width)))
        if block.type != "self_attn":
            return block
        kind = block.self_attn_layer or published.self_attn_layer
        attention = (block.self_attn_kwargs or published.self_attn_kwargs) | (kernels or {}).get(kind, {})
        if strided and "block_size" in attention and not attention.get("avg_down"):
            # timm strides the queries of an even block, as the published ones are, and pools an odd one's.
            attention["block_size"] *= 2
        return replace(block, self_attn_kwargs=attention)

    stages = [stage if isinstance(stage, tuple) else (stage, stage) for stage in published.blocks]
    lasts = [next((b for b in stage[::-1] if b.type != stage[0].type), stage[-1]) for stage in stages]
    pairs = zip(stages, lasts, strict=True)
    blocks = tuple((narrow(stage[0], strided=True), narrow(last, strided=False)) for stage, last in pairs)
    return dict(blocks=blocks, width_factor=width)


def _csp(name: str, *, width: float, **stages: Any) -> dict[str, Any]:
    def narrow(channels: int) -> int:
        return max(8, round(channels * width))

    published = cspnet.model_cfgs[name]
    out_chs = tuple(narrow(channels) for channels in published.stages.out_chs)
    return dict(
        stem=replace(published.stem, out_chs=narrow(published.stem.out_chs)),
        stages=replace(published.stages, out_chs=out_chs, **stages),
    )


def _xception(*, in_chans: int, stem: tuple[int, int], widths: Sequence[Any], **settings: Any) -> nn.Module:
    first, *middle, before_last, last = widths
    pairs = zip([stem[1], first, *middle], [first, *middle, before_last], strict=True)
    blocks = [dict(in_chs=a, out_chs=b, stride=1 if a == b else 2) for a, b in pairs]
    exit_flow = dict(in_chs=before_last[-1], out_chs=last, stride=1, no_skip=True, start_with_relu=False)
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.1)
    network = models.XceptionAligned([*blocks, exit_flow], in_chans=in_chans, norm_layer=norm, **settings)
    # timm fixes the stem's 32 and 64 channels: the same layers again, narrower.
    network.stem = nn.Sequential(
        layers.ConvNormAct(in_chans, stem[0], 3, stride=2, norm_layer=norm),
        layers.ConvNormAct(*stem, 3, stride=1, norm_layer=norm),
    )
    return network


def _dpn(*, in_chans: int, num_init_features: int, **settings: Any) -> nn.Module:
    # timm ties its narrow dual-path network to a stem of 3 × 3; the published one's 7 × 7 goes back in.
    network = models.DPN(small=True, in_chans=in_chans, num_init_features=num_init_features, **settings)
    norm = partial(layers.BatchNormAct2d, eps=0.001)
    stem = layers.ConvNormAct(in_chans, num_init_features, 7, stride=2, norm_layer=norm)
    network.features.conv1_1 = stem
    return network


class _NarrowHRNet(models.HighResolutionNet):
    """timm's HRNet with a narrower head: its constructor sets both widths to constants."""

    head_channels = property(lambda self: (8, 12, 16, 24), lambda self, published: None)
    num_features = property(lambda self: 192, lambda self, published: None)
    head_hidden_size = property(lambda self: 192, lambda self, published: None)


def _hrnet(*channels: int) -> dict[str, Any]:
    published = hrnet.cfg_cls["hrnet_w64"]
    sizes = [dict(num_modules=1, num_blocks=(1,) * n, num_channels=channels[:n]) for n in (1, 2, 3, 4)]
    stages = {f"stage{n}": published[f"stage{n}"] | size for n, size in enumerate(sizes, start=1)}
    return dict(cfg=published, stem_width=8, **stages)


def _rounding(width: float) -> Callable[..., int]:
    return partial(round_channels, multiplier=width, divisor=8, round_limit=0.0)


def _searched(model: type[nn.Module], *, width: float, stages: Sequence[str], **settings: Any) -> nn.Module:
    """Build EfficientNet or one of its kin; timm writes into decoded stages, so each time decodes anew."""
    blocks = decode_arch_def([stage.split() for stage in stages])
    return model(block_args=blocks, round_chs_fn=_rounding(width), **settings)


def _hybrid_vit(*, in_chans: int, channels: Sequence[int], stem_chs: int, **settings: Any) -> nn.Module:
    norm_layer = partial(layers.GroupNormAct, num_groups=8)
    kinds: Any = dict(stem_type="same", conv_layer=partial(layers.StdConv2dSame, eps=1e-8), preact=False)
    size: Any = dict(layers=(2, 2, 2, 2), channels=channels, stem_chs=stem_chs, in_chans=in_chans)
    backbone = models.ResNetV2(num_classes=0, global_pool="", norm_layer=norm_layer, **kinds, **size)
    embed = partial(layers.HybridEmbed, backbone=backbone)
    return models.VisionTransformer(in_chans=in_chans, patch_size=1, embed_layer=embed, **settings)


def _resmlp(init_values: float, **settings: Any) -> dict[str, Any]:
    block_layer = partial(mlp_mixer.ResBlock, init_values=init_values)
    return dict(img_size=64, mlp_ratio=4, norm_layer=mlp_mixer.Affine, block_layer=block_layer) | settings


_RESNET = dict(layers=(2, 2, 2, 1), channels=(8, 16, 32, 64))
_RESNET_V2 = dict(layers=(2, 2, 2, 1), channels=(32, 64, 128, 256), stem_chs=16)
_HALO = dict(block_size=3, halo_size=1)
_NFNET = dict(depths=(1, 2, 2, 1), width_factor=1 / 8, group_size=8)
_VIT = dict(patch_size=8, embed_dim=48, depth=4, num_heads=3)
_SWIN = dict(embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8))
_TWINS = dict(embed_dims=(16, 32, 64, 96), num_heads=(1, 2, 4, 6))

# fmt: off
_ROWS = (
    # Residual networks
    Architecture("resnet50", "CNN", _RESNET),
    Architecture("resnet101", "CNN", _RESNET | dict(layers=(2, 2, 5, 1))),
    Architecture("resnet101c", "CNN", _RESNET | dict(layers=(2, 2, 5, 1), stem_width=8)),
    Architecture("resnetblur50", "CNN", _RESNET),
    Architecture("wide_resnet50_2", "CNN", _RESNET | dict(channels=(8, 16, 28, 56))),
    Architecture("resnext50_32x4d", "CNN", _RESNET | dict(cardinality=4, base_width=32)),
    Architecture("seresnet50", "CNN", _RESNET),
    Architecture("seresnext50_32x4d", "CNN", _RESNET | dict(cardinality=4, base_width=32)),
    Architecture("resnet50_gn", "CNN", _RESNET | dict(norm_layer=partial(layers.GroupNorm, num_groups=8))),
    Architecture("resnest50d", "CNN", _RESNET | dict(stem_width=8)),
    Architecture("resnetv2_50", "CNN", _RESNET_V2),
    Architecture("resnetv2_101", "CNN", _RESNET_V2 | dict(layers=(2, 2, 5, 1))),
    Architecture("resnetv2_50d_evos", "CNN", _RESNET_V2 | dict(
        norm_layer=partial(layers.EvoNorm2dS0, groups=8))),
    Architecture("gcresnet50t", "CNN", _byob("gcresnet50t"), 72),
    Architecture("gcresnext50ts", "CNN", _byob("gcresnext50ts"), 72),
    Architecture("eca_resnet33ts", "CNN", _byob("eca_resnet33ts"), 72),
    # Residual networks with spatial self-attention
    # Two entry points of timm choose a size themselves, unless they are given one.
    Architecture("botnet26t_256", "CNN", dict(width_factor=1 / 8, img_size=96), 96),
    Architecture("eca_botnext26ts_256", "CNN", dict(
        _byob("eca_botnext26ts", dict(bottleneck=dict(dim_head=8))), img_size=96), 96),
    Architecture("sebotnet33ts_256", "CNN", _byob("sebotnet33ts"), 96),
    Architecture("halonet50ts", "CNN", _byob("halonet50ts", dict(halo=_HALO)), 96),
    Architecture("sehalonet33ts", "CNN", _byob("sehalonet33ts", dict(halo=_HALO)), 96),
    Architecture("eca_halonext26ts", "CNN", _byob(
        "eca_halonext26ts", dict(halo=_HALO | dict(dim_head=8))), 96),
    Architecture("lambda_resnet50ts", "CNN", _byob("lambda_resnet50ts", {"lambda": dict(r=3)}), 96),
    Architecture("lamhalobotnet50ts_256", "CNN", _byob(
        "lamhalobotnet50ts", {"halo": _HALO, "lambda": dict(r=5)}), 96),
    Architecture("halo2botnet50ts_256", "CNN", _byob("halo2botnet50ts", dict(halo=_HALO)), 96),
    # Other convolutional networks
    Architecture("nf_resnet50", "CNN", dict(depths=(2, 2, 2, 1), width_factor=1 / 8, stem_chs=128), 72),
    Architecture("nfnet_l0", "CNN", _NFNET),
    Architecture("eca_nfnet_l0", "CNN", _NFNET),
    Architecture("cspresnet50", "CNN", _csp("cspresnet50", width=1 / 8, depth=(1, 2, 2, 1)), 72),
    Architecture("cspresnext50", "CNN", _csp(
        "cspresnext50", width=1 / 16, depth=(1, 2, 2, 1), groups=(4,) * 4), 72),
    Architecture("cspdarknet53", "CNN", _csp("cspdarknet53", width=1 / 8, depth=(1, 1, 2, 2, 1)), 72),
    Architecture("xception65", "CNN", dict(
        stem=(8, 12), widths=(16, 24, 56, 56, 56, (56, 80, 80), (112, 112, 160))), 100, _xception),
    Architecture("dpn107", "CNN", dict(
        num_init_features=16, k_r=12, groups=3, k_sec=(1, 2, 2, 1), inc_sec=(4, 8, 8, 16)), model=_dpn),
    Architecture("hrnet_w64", "CNN", _hrnet(8, 16, 24, 40), model=_NarrowHRNet),
    Architecture("dla102x2", "CNN", dict(
        levels=(1, 1, 1, 2, 2, 1), channels=(4, 8, 16, 32, 48, 64), cardinality=8, base_width=32)),
    Architecture("ese_vovnet39b", "CNN", dict(
        stem_chs=(8, 8, 16), stage_conv_chs=(16, 20, 24, 28), stage_out_chs=(32, 64, 96, 128),
        layer_per_block=3, block_per_stage=(1, 1, 2, 1))),
    Architecture("convnext_tiny", "CNN", dict(depths=(2, 2, 3, 1), dims=(24, 48, 80, 120))),
    Architecture("convmixer_1536_20", "CNN", dict(dim=48, depth=4, patch_size=4), model=models.ConvMixer),
    Architecture("poolformer_m48", "CNN", dict(
        depths=(2, 2, 3, 1), dims=(24, 48, 80, 112), downsample_norm=None, mlp_act=nn.GELU, mlp_bias=True,
        norm_layers=layers.GroupNorm1, layer_scale_init_values=1e-6, res_scale_init_values=None,
        use_mlp_head=False), model=models.MetaFormer),
    # Found by search
    Architecture("efficientnet_b2", "NAS", dict(
        width=0.4, num_features=256, act_layer=nn.SiLU, stages=(
            "ds_r1_k3_s1_e1_c16_se0.25", "ir_r1_k3_s2_e6_c24_se0.25", "ir_r1_k5_s2_e6_c40_se0.25",
            "ir_r2_k3_s2_e6_c80_se0.25", "ir_r2_k5_s1_e6_c112_se0.25", "ir_r2_k5_s2_e6_c192_se0.25",
            "ir_r1_k3_s1_e6_c320_se0.25")), 72, partial(_searched, models.EfficientNet)),
    Architecture("mixnet_xl", "NAS", dict(
        width=0.4, num_features=256, stem_size=24, stages=(
            "ds_r1_k3_s1_e1_c24",
            "ir_r1_k3.5.7_a1.1_p1.1_s2_e6_c32 ir_r1_k3_a1.1_p1.1_s1_e3_c32",
            "ir_r1_k3.5.7.9_s2_e6_c40_se0.5_nsw ir_r1_k3.5_a1.1_p1.1_s1_e6_c40_se0.5_nsw",
            "ir_r1_k3.5.7_s2_e6_c80_se0.25_nsw ir_r1_k3.5.7.9_a1.1_p1.1_s1_e6_c80_se0.25_nsw",
            "ir_r1_k3_s1_e6_c120_se0.5_nsw ir_r1_k3.5.7.9_a1.1_p1.1_s1_e3_c120_se0.5_nsw",
            "ir_r1_k3.5.7.9_s2_e6_c200_se0.5_nsw ir_r1_k3.5.7.9_p1.1_s1_e6_c200_se0.5_nsw")),
        model=partial(_searched, models.EfficientNet)),
    Architecture("fbnetv3_g", "NAS", dict(
        width=0.3, num_features=256, stem_size=32, stages=(
            "ds_r1_k3_s1_e1_c24", "ir_r1_k5_s2_e4_c40",
            "ir_r1_k5_s2_e4_c56_se0.25 ir_r1_k5_s1_e3_c56_se0.25", "ir_r1_k5_s2_e5_c104 ir_r1_k3_s1_e3_c104",
            "ir_r1_k3_s1_e5_c160_se0.25 ir_r1_k5_s1_e3_c160_se0.25",
            "ir_r1_k3_s2_e6_c264_se0.25 ir_r1_k5_s1_e6_c288_se0.25", "cn_r1_k1_s1_c1728"),
        head_bias=False, se_from_exp=False, act_layer=layers.get_act_layer("hard_swish"),
        se_layer=partial(SqueezeExcite, gate_layer="hard_sigmoid", rd_round_fn=_rounding(0.3))),
        66, partial(_searched, models.MobileNetV3)),
    Architecture("rexnet_150", "NAS", dict(
        width_mult=0.4, depth_mult=0.5, ch_div=4, initial_chs=8, drop_rate=0.0), model=models.RexNet),
    Architecture("regnetx_320", "NAS", dict(w0=24, wa=20, depth=7, group_size=12, stem_width=16)),
    Architecture("regnety_032", "NAS", dict(w0=16, wa=32, depth=7, group_size=8, stem_width=16)),
    Architecture("nf_regnet_b1", "NAS", dict(depths=(1, 2, 2, 2), width_factor=0.25, num_features=512), 72),
    Architecture("haloregnetz_b", "NAS", _byob(
        "haloregnetz_b", dict(halo=dict(block_size=2, halo_size=1, avg_down=True)), width=1 / 4)),
    Architecture("swin_s3_tiny_224", "NAS", _SWIN | dict(window_size=(2, 2, 4, 2))),
    # Transformers
    Architecture("vit_small_patch16_224", "Transformer", _VIT, seed_offset=1000),
    Architecture("vit_base_patch32_224", "Transformer", dict(
        patch_size=16, embed_dim=80, depth=4, num_heads=5)),
    Architecture("deit_small_patch16_224", "Transformer", _VIT),
    Architecture("deit_base_patch16_224", "Transformer", dict(
        patch_size=8, embed_dim=64, depth=3, num_heads=4)),
    Architecture("convit_base", "Transformer", dict(
        patch_size=8, embed_dim=12, num_heads=4, depth=4, local_up_to_layer=3)),
    Architecture("crossvit_base_240", "Transformer", dict(
        img_scale=(1.0, 64 / 66), patch_size=(6, 8), embed_dim=(24, 40), depth=((1, 2, 0), (1, 2, 0)),
        num_heads=(2, 2)), 66),
    Architecture("tnt_s_patch16_224", "Transformer", dict(
        patch_size=8, first_stride=2, embed_dim=40, inner_dim=8, depth=3, num_heads_inner=2,
        num_heads_outer=2)),
    Architecture("nest_tiny_jx", "Transformer", dict(
        img_size=64, embed_dims=(16, 32, 64), num_heads=(1, 2, 4), depths=(2, 2, 3), pad_type="same",
        drop_path_rate=0.0), model=models.Nest),
    Architecture("swin_tiny_patch4_window7_224", "Transformer", _SWIN | dict(window_size=4)),
    Architecture("pit_s_224", "Transformer", dict(
        patch_size=10, stride=5, base_dims=(16, 16, 16), depth=(1, 2, 1), heads=(2, 4, 8))),
    # Multi-layer perceptrons
    Architecture("resmlp_24_224", "MLP-Mixer", _resmlp(
        1e-5, patch_size=8, num_blocks=4, embed_dim=64), model=models.MlpMixer),
    Architecture("resmlp_big_24_224", "MLP-Mixer", _resmlp(
        1e-6, patch_size=4, num_blocks=2, embed_dim=32), model=models.MlpMixer),
    Architecture("gmlp_s16_224", "MLP-Mixer", dict(
        img_size=64, patch_size=8, num_blocks=4, embed_dim=48, mlp_ratio=6,
        block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=layers.GatedMlp), model=models.MlpMixer),
    # Convolution and self-attention together
    Architecture("twins_svt_small", "Hybrid", _TWINS | dict(depths=(2, 2, 2, 2), wss=(4, 4, 4, 2))),
    Architecture("twins_pcpvt_base", "Hybrid", _TWINS | dict(depths=(2, 2, 2, 1))),
    Architecture("pit_b_224", "Hybrid", dict(
        patch_size=8, stride=4, base_dims=(12, 12, 12), depth=(1, 2, 1), heads=(2, 4, 8))),
    Architecture("coat_lite_small", "Hybrid", dict(embed_dims=(16, 32, 64, 96), serial_depths=(2, 2, 2, 1))),
    Architecture("visformer_small", "Hybrid", dict(
        init_channels=12, embed_dim=64, depth=(2, 2, 1), num_heads=4)),
    Architecture("vit_small_r26_s32_224", "Hybrid", dict(
        channels=(32, 64, 96, 128), stem_chs=16, img_size=64, embed_dim=48, depth=4, num_heads=3),
        model=_hybrid_vit),
    Architecture("xcit_medium_24_p16_224", "Hybrid", dict(embed_dim=64, depth=4, num_heads=4)),
    Architecture("xcit_tiny_12_p8_224", "Hybrid", dict(embed_dim=32, depth=4, num_heads=2)),
)
# fmt: on

CATALOGUE: dict[str, Architecture] = {row.name: row for row in _ROWS}
"""Architectures by the name of the ImageNet model that each scales down; a new one is a new row above.

At most 0.45 million parameters and 20 MFLOP (2 × multiply-accumulate) an image, so that one core trains
each in minutes. Inputs keep the published order: 224 becomes 64, 240 becomes 66, 256 becomes 72 (96
where self-attention needs maps that halve without a remainder), 299 becomes 100.
"""


def at_full_width(name: str) -> Architecture:
    """Find the smallest input at which a network of timm's runs, whose name the catalogue doesn't hold.

    Tried are the catalogue's rule (64 for a published 224, in steps of 8), the multiples of 32 above it, and
    the published size; each first as it is, then with timm's `img_size`.

    Raises
    ------
    ValueError
        If none of them gives logits.
    """
    published = getattr(timm.models.get_pretrained_cfg(name), "input_size", (224,))[-1]
    least = round(64 * published / 224 / 8) * 8
    sizes = [least, *range(least // 32 * 32 + 32, published, 32), published]
    for size, key in product(dict.fromkeys(sizes), (None, "img_size")):
        entry = Architecture(name, None, {key: size} if key else {}, size)
        with suppress(Exception), torch.device("meta"):  # whatever a network raises
            if entry.network(n_classes=10).eval()(torch.zeros(1, 1, size, size)).shape == (1, 10):
                return entry
    raise ValueError(
        f"{name} of timm gives no logits (image, 10) of one channel at {least} to {published} pixels (no "
        "head, or other settings wanted?): build it otherwise, and wrap it in Classifier(…, input_size=…)"
    )
