"""The sixty-nine architectures, each scaled down from timm's own class and configuration.

Every block is the published one. Reduced are width, depth, heads, groups and resolution, and the
patch, window, block and kernel sizes that must follow the resolution.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from timm.layers import (
    BatchNormAct2d,
    BlurPool2d,
    ConvNormAct,
    EvoNorm2dS0,
    GroupNorm,
    GroupNorm1,
    GroupNormAct,
    HybridEmbed,
    StdConv2dSame,
    create_conv2d,
    get_act_layer,
)
from timm.layers.mlp import GatedMlp
from timm.models import byoanet, byobnet, cspnet, hrnet, nfnet, regnet, vovnet
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.byobnet import ByobNet, ByoModelCfg
from timm.models.coat import CoaT
from timm.models.convit import ConVit
from timm.models.convmixer import ConvMixer
from timm.models.convnext import ConvNeXt
from timm.models.crossvit import CrossVit
from timm.models.cspnet import CspModelCfg, CspNet
from timm.models.dla import DLA, DlaBottleneck
from timm.models.dpn import DPN
from timm.models.efficientnet import EfficientNet
from timm.models.hrnet import HighResolutionNet
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.nest import Nest
from timm.models.nfnet import NormFreeNet
from timm.models.pit import PoolingVisionTransformer
from timm.models.regnet import RegNet
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.rexnet import RexNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.tnt import TNT
from timm.models.twins import Twins
from timm.models.visformer import Visformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vovnet import VovNet
from timm.models.xception_aligned import XceptionAligned
from timm.models.xcit import Xcit
from torch import nn

Base = Literal["CNN", "Transformer", "MLP-Mixer", "Hybrid", "NAS"]


@dataclass(frozen=True)
class Architecture:
    """One row of the catalogue.

    Attributes
    ----------
    base : str
        CNN, Transformer, MLP-Mixer, Hybrid or NAS.
    model : callable
        timm's class (or a function of it) that builds the network.
    settings : mapping
        Keyword arguments of `model`: the published ones, with width, depth and so on reduced.
    input_size : int
        Side of the network's input, in pixels: 64 where the published one is 224, larger for larger.
    seed_offset : int
        Added to every seed. Only for an architecture that is the same network as another (timm's
        ViT-S/16 is its DeiT-S/16): with equal seeds the two would be one model under two names.
    """

    base: Base
    model: Callable[..., nn.Module]
    settings: Mapping[str, Any]
    input_size: int = 64
    seed_offset: int = 0


def _rounding(width: float) -> Callable[..., int]:
    return partial(round_channels, multiplier=width, divisor=8, round_limit=0.0)


def _efficientnet(
    *,
    width: float,
    stages: Sequence[str | Sequence[str]],
    features: int,
    stem_size: int = 32,
    act_layer: type[nn.Module] = nn.SiLU,
    **settings: Any,
) -> nn.Module:
    return EfficientNet(
        block_args=_decoded(stages),
        num_features=features,
        stem_size=stem_size,
        round_chs_fn=_rounding(width),
        act_layer=act_layer,
        **settings,
    )


def _decoded(stages: Sequence[str | Sequence[str]]) -> Any:
    return decode_arch_def([[stage] if isinstance(stage, str) else list(stage) for stage in stages])


def _fbnetv3(*, width: float, stages: Sequence[Sequence[str]], **settings: Any) -> nn.Module:
    rounding = _rounding(width)
    return MobileNetV3(
        block_args=_decoded(stages),
        head_bias=False,
        round_chs_fn=rounding,
        se_from_exp=False,
        act_layer=get_act_layer("hard_swish"),
        se_layer=partial(SqueezeExcite, gate_layer="hard_sigmoid", rd_round_fn=rounding),
        **settings,
    )


def _byob(published: ByoModelCfg, *, width: float, **settings: Any) -> dict[str, Any]:
    """Narrow a configuration of timm's "bring your own blocks", and keep two blocks of each stage.

    These are its first, and its last of another kind where a stage has two kinds. Groups keep their
    number, so their size shrinks with the width.
    """

    def narrow(block: Any) -> Any:
        return replace(block, d=1, gs=block.gs and max(2, round(block.gs * width)))

    stages = [stage if isinstance(stage, tuple) else (stage, stage) for stage in published.blocks]
    lasts = [next((b for b in stage[::-1] if b.type != stage[0].type), stage[-1]) for stage in stages]
    blocks = tuple((narrow(stage[0]), narrow(last)) for stage, last in zip(stages, lasts, strict=True))
    return dict(cfg=replace(published, blocks=blocks, width_factor=width)) | settings


def _attention_byob(
    name: str, *, width: float, img_size: int = 96, kernels: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Do as `_byob` for a network with spatial self-attention, whose blocks and halos follow the map."""
    scaled = _byob(byoanet.model_cfgs[name], width=width, img_size=img_size)
    cfg = scaled["cfg"]

    def reduce(block: Any, *, strided: bool) -> Any:
        layer = block.self_attn_layer or cfg.self_attn_layer
        if block.type != "self_attn":
            return block
        reduced = (block.self_attn_kwargs or cfg.self_attn_kwargs) | (kernels or {}).get(layer, {})
        if strided and "block_size" in reduced and not reduced.get("avg_down"):
            # timm strides the queries of an even block, as the published ones are, and pools an odd one's.
            reduced["block_size"] *= 2
        return replace(block, self_attn_kwargs=reduced)

    blocks = tuple(
        tuple(reduce(block, strided=position == 0) for position, block in enumerate(stage))
        for stage in cfg.blocks
    )
    return scaled | dict(cfg=replace(cfg, blocks=blocks))


def _csp(published: CspModelCfg, *, width: float, depth: Sequence[int], **stages: Any) -> dict[str, Any]:
    def narrow(channels: int) -> int:
        return max(8, round(channels * width))

    stem = replace(published.stem, out_chs=narrow(published.stem.out_chs))
    out_chs = tuple(narrow(channels) for channels in published.stages.out_chs)
    return dict(
        cfg=replace(
            published,
            stem=stem,
            stages=replace(published.stages, depth=tuple(depth), out_chs=out_chs, **stages),
        )
    )


def _dpn(*, in_chans: int, num_init_features: int, **settings: Any) -> nn.Module:
    # timm ties its narrow dual-path network to a stem of 3 × 3; the published one's 7 × 7 goes back in.
    network = DPN(small=True, in_chans=in_chans, num_init_features=num_init_features, **settings)
    norm_layer = partial(BatchNormAct2d, eps=0.001)
    network.features.conv1_1 = ConvNormAct(in_chans, num_init_features, 7, stride=2, norm_layer=norm_layer)
    return network


def _xception(*, in_chans: int, stem: tuple[int, int], widths: Sequence[Any], **settings: Any) -> nn.Module:
    first, *middle, before_last, last = widths
    pairs = zip([stem[1], first, *middle], [first, *middle, before_last], strict=True)
    blocks = [dict(in_chs=a, out_chs=b, stride=1 if a == b else 2) for a, b in pairs]
    exit_flow = dict(in_chs=before_last[-1], out_chs=last, stride=1, no_skip=True, start_with_relu=False)
    norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.1)
    network = XceptionAligned([*blocks, exit_flow], in_chans=in_chans, norm_layer=norm_layer, **settings)
    # timm fixes the stem's 32 and 64 channels: the same layers again, narrower.
    network.stem = nn.Sequential(
        ConvNormAct(in_chans, stem[0], 3, stride=2, norm_layer=norm_layer),
        ConvNormAct(*stem, 3, stride=1, norm_layer=norm_layer),
    )
    return network


class _NarrowHRNet(HighResolutionNet):
    """timm's HRNet with a narrower head: its constructor sets both widths to constants."""

    head_channels = property(lambda self: (8, 12, 16, 24), lambda self, published: None)
    num_features = property(lambda self: 192, lambda self, published: None)
    head_hidden_size = property(lambda self: 192, lambda self, published: None)


def _hrnet_stages(*channels: int) -> dict[str, Any]:
    published = hrnet.cfg_cls["hrnet_w64"]
    return {
        stage: published[stage]
        | dict(num_modules=1, num_blocks=(1,) * branches, num_channels=channels[:branches])
        for branches, stage in enumerate(["stage1", "stage2", "stage3", "stage4"], start=1)
    }


def _hybrid_vit(*, in_chans: int, channels: Sequence[int], stem_chs: int, **settings: Any) -> nn.Module:
    backbone = ResNetV2(
        layers=(2, 2, 2, 2),
        channels=channels,
        stem_chs=stem_chs,
        num_classes=0,
        global_pool="",
        in_chans=in_chans,
        preact=False,
        stem_type="same",
        conv_layer=partial(StdConv2dSame, eps=1e-8),
        norm_layer=partial(GroupNormAct, num_groups=8),
    )
    embed = partial(HybridEmbed, backbone=backbone)
    return VisionTransformer(in_chans=in_chans, patch_size=1, embed_layer=embed, **settings)


_RESNET = dict(block=Bottleneck, layers=(2, 2, 2, 1), channels=(8, 16, 32, 64))
_RESNET_V2 = dict(
    layers=(2, 2, 2, 1),
    channels=(32, 64, 128, 256),
    stem_chs=16,
    conv_layer=create_conv2d,
    norm_layer=BatchNormAct2d,
)
_VIT = dict(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3)
_SWIN = dict(img_size=64, patch_size=4, embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8))
_RESMLP = dict(img_size=64, mlp_ratio=4, norm_layer=Affine)
_PIT = dict(img_size=64, mlp_ratio=4)
_XCIT = dict(img_size=64, tokens_norm=True)
_TWINS = dict(
    img_size=64, patch_size=4, embed_dims=(16, 32, 64, 96), num_heads=(1, 2, 4, 6), sr_ratios=(8, 4, 2, 1)
)
_HALO = dict(block_size=3, halo_size=1)

CATALOGUE: dict[str, Architecture] = {
    # Residual networks
    "resnet50": Architecture("CNN", ResNet, _RESNET),
    "resnet101": Architecture("CNN", ResNet, _RESNET | dict(layers=(2, 2, 5, 1))),
    "resnet101c": Architecture(
        "CNN", ResNet, _RESNET | dict(layers=(2, 2, 5, 1), stem_type="deep", stem_width=8)
    ),
    "resnetblur50": Architecture("CNN", ResNet, _RESNET | dict(aa_layer=BlurPool2d)),
    "wide_resnet50_2": Architecture("CNN", ResNet, _RESNET | dict(base_width=128, channels=(8, 16, 28, 56))),
    "resnext50_32x4d": Architecture("CNN", ResNet, _RESNET | dict(cardinality=4, base_width=32)),
    "seresnet50": Architecture("CNN", ResNet, _RESNET | dict(block_args=dict(attn_layer="se"))),
    "seresnext50_32x4d": Architecture(
        "CNN", ResNet, _RESNET | dict(cardinality=4, base_width=32, block_args=dict(attn_layer="se"))
    ),
    "resnet50_gn": Architecture("CNN", ResNet, _RESNET | dict(norm_layer=partial(GroupNorm, num_groups=8))),
    "resnest50d": Architecture(
        "CNN",
        ResNet,
        _RESNET
        | dict(
            block=ResNestBottleneck,
            stem_type="deep",
            stem_width=8,
            avg_down=True,
            base_width=64,
            cardinality=1,
            block_args=dict(radix=2, avd=True, avd_first=False),
        ),
    ),
    "resnetv2_50": Architecture("CNN", ResNetV2, _RESNET_V2),
    "resnetv2_101": Architecture("CNN", ResNetV2, _RESNET_V2 | dict(layers=(2, 2, 5, 1))),
    "resnetv2_50d_evos": Architecture(
        "CNN",
        ResNetV2,
        _RESNET_V2 | dict(norm_layer=partial(EvoNorm2dS0, groups=8), stem_type="deep", avg_down=True),
    ),
    "gcresnet50t": Architecture("CNN", ByobNet, _byob(byobnet.model_cfgs["gcresnet50t"], width=1 / 8), 72),
    "gcresnext50ts": Architecture(
        "CNN", ByobNet, _byob(byobnet.model_cfgs["gcresnext50ts"], width=1 / 8), 72
    ),
    "eca_resnet33ts": Architecture(
        "CNN", ByobNet, _byob(byobnet.model_cfgs["eca_resnet33ts"], width=1 / 8), 72
    ),
    # Residual networks with spatial self-attention
    "botnet26t_256": Architecture("CNN", ByobNet, _attention_byob("botnet26t", width=1 / 8), 96),
    "eca_botnext26ts_256": Architecture(
        "CNN",
        ByobNet,
        _attention_byob("eca_botnext26ts", width=1 / 8, kernels=dict(bottleneck=dict(dim_head=8))),
        96,
    ),
    "sebotnet33ts_256": Architecture("CNN", ByobNet, _attention_byob("sebotnet33ts", width=1 / 8), 96),
    "halonet50ts": Architecture(
        "CNN", ByobNet, _attention_byob("halonet50ts", width=1 / 8, kernels=dict(halo=_HALO)), 96
    ),
    "sehalonet33ts": Architecture(
        "CNN", ByobNet, _attention_byob("sehalonet33ts", width=1 / 8, kernels=dict(halo=_HALO)), 96
    ),
    "eca_halonext26ts": Architecture(
        "CNN",
        ByobNet,
        _attention_byob("eca_halonext26ts", width=1 / 8, kernels=dict(halo=_HALO | dict(dim_head=8))),
        96,
    ),
    "lambda_resnet50ts": Architecture(
        "CNN", ByobNet, _attention_byob("lambda_resnet50ts", width=1 / 8, kernels={"lambda": dict(r=3)}), 96
    ),
    "lamhalobotnet50ts_256": Architecture(
        "CNN",
        ByobNet,
        _attention_byob("lamhalobotnet50ts", width=1 / 8, kernels={"halo": _HALO, "lambda": dict(r=5)}),
        96,
    ),
    "halo2botnet50ts_256": Architecture(
        "CNN", ByobNet, _attention_byob("halo2botnet50ts", width=1 / 8, kernels=dict(halo=_HALO)), 96
    ),
    # Other convolutional networks
    "nf_resnet50": Architecture(
        "CNN",
        NormFreeNet,
        dict(cfg=nfnet.model_cfgs["nf_resnet50"], depths=(2, 2, 2, 1), width_factor=1 / 8, stem_chs=128),
        72,
    ),
    "nfnet_l0": Architecture(
        "CNN",
        NormFreeNet,
        dict(cfg=nfnet.model_cfgs["nfnet_l0"], depths=(1, 2, 2, 1), width_factor=1 / 8, group_size=8),
    ),
    "eca_nfnet_l0": Architecture(
        "CNN",
        NormFreeNet,
        dict(cfg=nfnet.model_cfgs["eca_nfnet_l0"], depths=(1, 2, 2, 1), width_factor=1 / 8, group_size=8),
    ),
    "cspresnet50": Architecture(
        "CNN", CspNet, _csp(cspnet.model_cfgs["cspresnet50"], width=1 / 8, depth=(1, 2, 2, 1)), 72
    ),
    "cspresnext50": Architecture(
        "CNN",
        CspNet,
        _csp(cspnet.model_cfgs["cspresnext50"], width=1 / 16, depth=(1, 2, 2, 1), groups=(4,) * 4),
        72,
    ),
    "cspdarknet53": Architecture(
        "CNN", CspNet, _csp(cspnet.model_cfgs["cspdarknet53"], width=1 / 8, depth=(1, 1, 2, 2, 1)), 72
    ),
    "xception65": Architecture(
        "CNN",
        _xception,
        dict(stem=(8, 12), widths=(16, 24, 56, 56, 56, (56, 80, 80), (112, 112, 160))),
        100,
    ),
    "dpn107": Architecture(
        "CNN",
        _dpn,
        dict(num_init_features=16, k_r=12, groups=3, k_sec=(1, 2, 2, 1), inc_sec=(4, 8, 8, 16)),
    ),
    "hrnet_w64": Architecture(
        "CNN",
        _NarrowHRNet,
        dict(cfg=hrnet.cfg_cls["hrnet_w64"], stem_width=8) | _hrnet_stages(8, 16, 24, 40),
    ),
    "dla102x2": Architecture(
        "CNN",
        DLA,
        dict(
            levels=(1, 1, 1, 2, 2, 1),
            channels=(4, 8, 16, 32, 48, 64),
            block=DlaBottleneck,
            cardinality=8,
            base_width=32,
            shortcut_root=True,
        ),
    ),
    "ese_vovnet39b": Architecture(
        "CNN",
        VovNet,
        dict(
            cfg=vovnet.model_cfgs["ese_vovnet39b"],
            stem_chs=(8, 8, 16),
            stage_conv_chs=(16, 20, 24, 28),
            stage_out_chs=(32, 64, 96, 128),
            layer_per_block=3,
            block_per_stage=(1, 1, 2, 1),
        ),
    ),
    "convnext_tiny": Architecture("CNN", ConvNeXt, dict(depths=(2, 2, 3, 1), dims=(24, 48, 80, 120))),
    "convmixer_1536_20": Architecture("CNN", ConvMixer, dict(dim=48, depth=4, kernel_size=9, patch_size=4)),
    "poolformer_m48": Architecture(
        "CNN",
        MetaFormer,
        dict(
            depths=(2, 2, 3, 1),
            dims=(24, 48, 80, 112),
            downsample_norm=None,
            mlp_act=nn.GELU,
            mlp_bias=True,
            norm_layers=GroupNorm1,
            layer_scale_init_values=1e-6,
            res_scale_init_values=None,
            use_mlp_head=False,
        ),
    ),
    # Found by search
    "efficientnet_b2": Architecture(
        "NAS",
        _efficientnet,
        dict(
            width=0.4,
            features=256,
            stages=(
                "ds_r1_k3_s1_e1_c16_se0.25",
                "ir_r1_k3_s2_e6_c24_se0.25",
                "ir_r1_k5_s2_e6_c40_se0.25",
                "ir_r2_k3_s2_e6_c80_se0.25",
                "ir_r2_k5_s1_e6_c112_se0.25",
                "ir_r2_k5_s2_e6_c192_se0.25",
                "ir_r1_k3_s1_e6_c320_se0.25",
            ),
        ),
        input_size=72,
    ),
    "mixnet_xl": Architecture(
        "NAS",
        _efficientnet,
        dict(
            width=0.4,
            features=256,
            stem_size=24,
            act_layer=nn.ReLU,
            stages=(
                "ds_r1_k3_s1_e1_c24",
                ("ir_r1_k3.5.7_a1.1_p1.1_s2_e6_c32", "ir_r1_k3_a1.1_p1.1_s1_e3_c32"),
                ("ir_r1_k3.5.7.9_s2_e6_c40_se0.5_nsw", "ir_r1_k3.5_a1.1_p1.1_s1_e6_c40_se0.5_nsw"),
                ("ir_r1_k3.5.7_s2_e6_c80_se0.25_nsw", "ir_r1_k3.5.7.9_a1.1_p1.1_s1_e6_c80_se0.25_nsw"),
                ("ir_r1_k3_s1_e6_c120_se0.5_nsw", "ir_r1_k3.5.7.9_a1.1_p1.1_s1_e3_c120_se0.5_nsw"),
                ("ir_r1_k3.5.7.9_s2_e6_c200_se0.5_nsw", "ir_r1_k3.5.7.9_p1.1_s1_e6_c200_se0.5_nsw"),
            ),
        ),
    ),
    "fbnetv3_g": Architecture(
        "NAS",
        _fbnetv3,
        dict(
            width=0.3,
            num_features=256,
            stem_size=32,
            stages=(
                ("ds_r1_k3_s1_e1_c24",),
                ("ir_r1_k5_s2_e4_c40",),
                ("ir_r1_k5_s2_e4_c56_se0.25", "ir_r1_k5_s1_e3_c56_se0.25"),
                ("ir_r1_k5_s2_e5_c104", "ir_r1_k3_s1_e3_c104"),
                ("ir_r1_k3_s1_e5_c160_se0.25", "ir_r1_k5_s1_e3_c160_se0.25"),
                ("ir_r1_k3_s2_e6_c264_se0.25", "ir_r1_k5_s1_e6_c288_se0.25"),
                ("cn_r1_k1_s1_c1728",),
            ),
        ),
        input_size=66,
    ),
    "rexnet_150": Architecture(
        "NAS", RexNet, dict(width_mult=0.4, depth_mult=0.5, ch_div=4, initial_chs=8, drop_rate=0.0)
    ),
    "regnetx_320": Architecture(
        "NAS",
        RegNet,
        dict(
            cfg=regnet.model_cfgs["regnetx_320"], w0=24, wa=20, wm=2.0, depth=7, group_size=12, stem_width=16
        ),
    ),
    "regnety_032": Architecture(
        "NAS",
        RegNet,
        dict(
            cfg=regnet.model_cfgs["regnety_032"], w0=16, wa=32, wm=2.66, depth=7, group_size=8, stem_width=16
        ),
    ),
    "nf_regnet_b1": Architecture(
        "NAS",
        NormFreeNet,
        dict(cfg=nfnet.model_cfgs["nf_regnet_b1"], depths=(1, 2, 2, 2), width_factor=0.25, num_features=512),
        72,
    ),
    "haloregnetz_b": Architecture(
        "NAS",
        ByobNet,
        _attention_byob(
            "haloregnetz_b",
            width=1 / 4,
            img_size=64,
            kernels=dict(halo=dict(block_size=2, halo_size=1, avg_down=True)),
        ),
    ),
    "swin_s3_tiny_224": Architecture("NAS", SwinTransformer, _SWIN | dict(window_size=(2, 2, 4, 2))),
    # Transformers
    "vit_small_patch16_224": Architecture("Transformer", VisionTransformer, _VIT, seed_offset=1000),
    "vit_base_patch32_224": Architecture(
        "Transformer", VisionTransformer, _VIT | dict(patch_size=16, embed_dim=80, num_heads=5)
    ),
    "deit_small_patch16_224": Architecture("Transformer", VisionTransformer, _VIT),
    "deit_base_patch16_224": Architecture(
        "Transformer", VisionTransformer, _VIT | dict(embed_dim=64, depth=3, num_heads=4)
    ),
    "convit_base": Architecture(
        "Transformer",
        ConVit,
        dict(img_size=64, patch_size=8, embed_dim=12, num_heads=4, depth=4, local_up_to_layer=3),
    ),
    "crossvit_base_240": Architecture(
        "Transformer",
        CrossVit,
        dict(
            img_size=66,
            img_scale=(1.0, 64 / 66),
            patch_size=(6, 8),
            embed_dim=(24, 40),
            depth=((1, 2, 0), (1, 2, 0)),
            num_heads=(2, 2),
            mlp_ratio=(4, 4, 1),
        ),
        input_size=66,
    ),
    "tnt_s_patch16_224": Architecture(
        "Transformer",
        TNT,
        dict(
            img_size=64,
            patch_size=8,
            first_stride=2,
            embed_dim=40,
            inner_dim=8,
            depth=3,
            num_heads_inner=2,
            num_heads_outer=2,
        ),
    ),
    "nest_tiny_jx": Architecture(
        "Transformer",
        Nest,
        dict(
            img_size=64,
            embed_dims=(16, 32, 64),
            num_heads=(1, 2, 4),
            depths=(2, 2, 3),
            drop_path_rate=0.0,
            pad_type="same",
        ),
    ),
    "swin_tiny_patch4_window7_224": Architecture("Transformer", SwinTransformer, _SWIN | dict(window_size=4)),
    "pit_s_224": Architecture(
        "Transformer",
        PoolingVisionTransformer,
        _PIT | dict(patch_size=10, stride=5, base_dims=(16, 16, 16), depth=(1, 2, 1), heads=(2, 4, 8)),
    ),
    # Multi-layer perceptrons
    "resmlp_24_224": Architecture(
        "MLP-Mixer",
        MlpMixer,
        _RESMLP
        | dict(patch_size=8, num_blocks=4, embed_dim=64, block_layer=partial(ResBlock, init_values=1e-5)),
    ),
    "resmlp_big_24_224": Architecture(
        "MLP-Mixer",
        MlpMixer,
        _RESMLP
        | dict(patch_size=4, num_blocks=2, embed_dim=32, block_layer=partial(ResBlock, init_values=1e-6)),
    ),
    "gmlp_s16_224": Architecture(
        "MLP-Mixer",
        MlpMixer,
        dict(
            img_size=64,
            patch_size=8,
            num_blocks=4,
            embed_dim=48,
            mlp_ratio=6,
            block_layer=SpatialGatingBlock,
            mlp_layer=GatedMlp,
        ),
    ),
    # Convolution and self-attention together
    "twins_svt_small": Architecture("Hybrid", Twins, _TWINS | dict(depths=(2, 2, 2, 2), wss=(4, 4, 4, 2))),
    "twins_pcpvt_base": Architecture(
        "Hybrid", Twins, _TWINS | dict(depths=(2, 2, 2, 1), mlp_ratios=(8, 8, 4, 4))
    ),
    "pit_b_224": Architecture(
        "Hybrid",
        PoolingVisionTransformer,
        _PIT | dict(patch_size=8, stride=4, base_dims=(12, 12, 12), depth=(1, 2, 1), heads=(2, 4, 8)),
    ),
    "coat_lite_small": Architecture(
        "Hybrid",
        CoaT,
        dict(
            img_size=64,
            patch_size=4,
            embed_dims=(16, 32, 64, 96),
            serial_depths=(2, 2, 2, 1),
            mlp_ratios=(8, 8, 4, 4),
        ),
    ),
    "visformer_small": Architecture(
        "Hybrid",
        Visformer,
        dict(
            img_size=64,
            init_channels=12,
            embed_dim=64,
            depth=(2, 2, 1),
            num_heads=4,
            mlp_ratio=4.0,
            group=8,
            attn_stage="011",
            spatial_conv="100",
            norm_layer=nn.BatchNorm2d,
            conv_init=True,
            embed_norm=nn.BatchNorm2d,
        ),
    ),
    "vit_small_r26_s32_224": Architecture(
        "Hybrid",
        _hybrid_vit,
        dict(channels=(32, 64, 96, 128), stem_chs=16, img_size=64, embed_dim=48, depth=4, num_heads=3),
    ),
    "xcit_medium_24_p16_224": Architecture(
        "Hybrid", Xcit, _XCIT | dict(patch_size=16, embed_dim=64, depth=4, num_heads=4, eta=1e-5)
    ),
    "xcit_tiny_12_p8_224": Architecture(
        "Hybrid", Xcit, _XCIT | dict(patch_size=8, embed_dim=32, depth=4, num_heads=2, eta=1.0)
    ),
}
"""Architectures by the name of the ImageNet model that each scales down; a new one is a new entry.

At most 0.45 million parameters and 20 MFLOP (2 × multiply-accumulate) an image, so that one core trains
each in minutes. Inputs keep the published order: 224 becomes 64, 240 becomes 66, 256 becomes 72 (96
where self-attention needs maps that halve without a remainder), 299 becomes 100.
"""
