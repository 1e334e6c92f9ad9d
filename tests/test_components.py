import functools
import os
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from pages import page
from torch import nn
from torch.nn.utils import prune

import modelsim as ms
from modelsim.components import components, read_components

BASE, HIERARCHY, STEM, SIZE = "Base architecture", "Hierarchical structure", "Stem layer", "Input resolution"
NORM, ACT, STEM_POOL, POOL = "Normalization", "Activation", "Pooling (stem)", "Pooling (final)"
CW, PLACE, DEPTHWISE, GROUPED = "CW attention", "Location of CW attention", "DW conv", "Group conv"
# Models outside the paper's 69, and what their papers and timm's code say about them.
UNSEEN = pd.read_csv(Path(__file__).with_name("unseen_components.csv"), index_col="model", na_filter=False)
SHIPPED = ms.components_table()
normalised = page("zoo").normalised


class Parts(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)


class Block(Parts):
    """A residual block whose parts are those of the test."""

    def forward(self, x):
        y = x
        for part in self.parts:
            y = part(y)
        return x + y


class Branches(Parts):
    """Add what several layers make of the same input."""

    def forward(self, x):
        return sum(part(x) for part in self.parts)


class Computed(nn.Module):
    """Call a function, with tensors that are neither weights nor buffers."""

    def __init__(self, function, *tables):
        super().__init__()
        self.function, self.tables = function, [*tables]

    def forward(self, x):
        return self.function(x, *self.tables)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.convolution = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x):
        self.act(x)
        return self.convolution(x)


def network(*body, stem=None, head=None, **attributes):
    """Chain a stem that halves a grey image, a body of 8 channels and a classifier."""
    stem = nn.Conv2d(1, 8, 3, 2, 1) if stem is None else stem
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if head is None else head
    chained = nn.Sequential(stem, nn.Sequential(*body), head, nn.Linear(8, 10))
    for name, value in attributes.items():
        setattr(chained, name, value)
    return chained


def blocks(*parts, n=2):
    return [Block(nn.Conv2d(8, 8, 1), *parts, nn.Conv2d(8, 8, 1)) for _ in range(n)]


def on_meta(name):
    with torch.device("meta"):
        return components(timm.create_model(name))


@pytest.mark.skipif("MODELSIM_CACHE" not in os.environ, reason="the published table may not be redistributed")
def test_readings_agree_with_the_published_labels_and_name_the_proof_where_they_do_not():
    labelled = ms.published_components()
    table = SHIPPED.loc[labelled.index]
    assert list(table.columns) == list(labelled.columns)
    same = table.map(normalised) == labelled.map(normalised)
    assert same.size == 897
    assert same.to_numpy().mean() >= 0.98
    proofs = read_components("convmixer_1536_20", evidence=True)
    assert same.loc["convmixer_1536_20"].idxmin() == HIERARCHY
    assert table.at["convmixer_1536_20", HIERARCHY] == "No"
    assert proofs.at["convmixer_1536_20", HIERARCHY] == "no module after the stem lowers the resolution"


@pytest.mark.parametrize("name", UNSEEN.index.unique())
def test_reading_of_an_unseen_model_matches_its_description(name):
    facts = UNSEEN.loc[name].set_index("component").value
    assert on_meta(name)[facts.index].to_dict() == facts.to_dict()


@pytest.mark.parametrize("name", ms.CATALOGUE)
def test_scaled_build_has_the_components_of_the_full_model(name):
    classifier = ms.build(name)
    scaled = components(classifier.network, input_size=classifier.input_size, name=name)
    assert scaled.drop([STEM, SIZE]).to_dict() == SHIPPED.loc[name].drop([STEM, SIZE]).to_dict()


@pytest.mark.parametrize("name", SHIPPED.drop_duplicates(STEM, keep="last").index)
def test_shipped_table_is_what_is_read_for_every_kind_of_stem(name):
    assert SHIPPED.loc[name].to_dict() == on_meta(name).to_dict()


def test_convolutional_network_made_by_hand():
    model = network(*blocks(nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)))
    expected = ["CNN", "No", "3s2", "32 x 32", "BN", "SiLU", "No", "GAP", "No", "No", "~", "No", "No"]
    assert components(model, input_size=32).tolist() == expected


def with_unused_layers():
    model = network(*blocks())
    model[1][0].unused = nn.Sequential(nn.GroupNorm(2, 8), nn.GELU(), timm.layers.SEModule(8))
    return model


def after_the_stem(*modules):
    stem, _, head, classes = network()
    return nn.Sequential(stem, *modules, *blocks(), head, classes)


def with_stem_and_body_in_one():
    stem, body, head, classes = network(*blocks(nn.Conv2d(8, 8, 3, 1, 1)))
    return nn.Sequential(nn.Sequential(stem, *body), nn.Sequential(head, classes))


def two_sequences():
    sizes = ((3, 1), (5, 2))
    return Branches(*(nn.Sequential(nn.Conv2d(1, 8, n, 2, p), nn.Conv2d(8, 8, 3, 1, 1)) for n, p in sizes))


CONVOLUTION = nn.Conv2d(8, 8, 3, 1, 1)
LONG_STEM = nn.Sequential(nn.Conv2d(1, 4, 5, 2, 2), nn.ReLU(), nn.Conv2d(4, 8, 3, 1, 1), nn.MaxPool2d(2))
PARALLEL_STEM = Branches(nn.Conv2d(1, 8, 1, 2), nn.Conv2d(1, 8, 5, 2, 2))
BRANCH = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU(), CONVOLUTION)
GROUP_NORM = Computed(lambda x: nn.functional.leaky_relu(nn.functional.group_norm(x, 2)))
TABLE = Computed(torch.mul, torch.ones(1, 8, 1, 1))
SCALED_HEAD = nn.Sequential(
    Computed(lambda x: x / x.mean((2, 3), keepdim=True)), nn.AdaptiveMaxPool2d(1), nn.Flatten()
)
THERE_AND_BACK = nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2))
UNSHUFFLED = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(48, 8, 3, 1, 1))
ATTENTION = timm.layers.SEModule(8)
TRACED = torch.fx.symbolic_trace(network())
SCALE, BLUR = nn.Conv2d(8, 8, 1, groups=8), timm.layers.BlurPool2d(8, stride=1)
NEITHER = {DEPTHWISE: "No", GROUPED: "No"}
MADE = {
    "depthwise": (network(*blocks(nn.Conv2d(8, 8, 3, 1, 1, groups=8))), NEITHER | {DEPTHWISE: "Yes"}),
    "grouped": (network(*blocks(nn.Conv2d(8, 8, 3, 1, 1, groups=4))), NEITHER | {GROUPED: "Yes"}),
    "neither scale nor blur nor attention": (
        network(*blocks(SCALE, BLUR, timm.layers.EcaModule(8))),
        NEITHER,
    ),
    "frozen is normalisation": (network(*blocks(timm.layers.FrozenBatchNormAct2d(8))), {NORM: "BN"}),
    "only what runs counts": (with_unused_layers(), {NORM: "Norm-free", ACT: "-", CW: "No"}),
    "functions count": (network(*blocks(GROUP_NORM)), {NORM: "GN", ACT: "Leaky ReLU"}),
    "gates are no activation": (network(*blocks(nn.Sigmoid(), nn.Softmax(1), nn.Hardsigmoid())), {ACT: "-"}),
    "no gate": (network(*blocks(nn.ReLU6())), {ACT: "ReLU6"}),
    "stem before blocks": (
        network(*blocks(), stem=LONG_STEM),
        {STEM: "5s2/3", STEM_POOL: "Yes", HIERARCHY: "No"},
    ),
    "parallel": (network(*blocks(CONVOLUTION), stem=PARALLEL_STEM), {STEM: "5s2"}),
    "two sequences": (network(*blocks(nn.GELU()), stem=two_sequences()), {STEM: "5s2/3/3", HIERARCHY: "No"}),
    "branches end it": (after_the_stem(Branches(CONVOLUTION, BRANCH)), {STEM: "3s2"}),
    "pool in branches": (after_the_stem(Branches(nn.MaxPool2d(3, 1, 1), BRANCH)), {STEM: "3s2"}),
    "in place is no branch": (after_the_stem(InPlace()), {STEM: "3s2/3"}),
    "whole body is no stem": (with_stem_and_body_in_one(), {STEM: "3s2", BASE: "CNN"}),
    "shrinks inside a block only": (network(*blocks(THERE_AND_BACK)), {HIERARCHY: "No"}),
    "shrinks": (network(*blocks(), nn.AvgPool2d(2), *blocks()), {HIERARCHY: "Yes"}),
    "an average that scales is no pool": (network(*blocks(), head=SCALED_HEAD), {POOL: "max"}),
    "twelve channels": (network(*blocks(), stem=nn.Conv2d(12, 8, 3, 2, 1)), {STEM: "3s2"}),
    "twelve channels, unshuffled": (network(*blocks(), stem=UNSHUFFLED, in_chans=12), {STEM: "3s1"}),
    "twelve channels, no convolution": (
        network(stem=nn.Flatten(), head=nn.Linear(12 * 32 * 32, 8), in_chans=12),
        {BASE: "MLP-Mixer", STEM: "~"},
    ),
    "tensors beside weights": (network(*blocks(TABLE)), {BASE: "CNN"}),
    "attention before a convolution": (network(*blocks(ATTENTION)), {PLACE: "Middle"}),
    "attention at the end": (
        network(*(Block(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), ATTENTION) for _ in range(2))),
        {PLACE: "End"},
    ),
}


@pytest.mark.parametrize(("model", "expected"), MADE.values(), ids=MADE)
def test_component_of_a_network_made_by_hand(model, expected):
    assert components(model, input_size=32)[[*expected]].to_dict() == expected


@pytest.mark.parametrize(
    ("norm", "kind"), [(nn.LayerNorm, "LN"), (timm.layers.RmsNorm, "RMSNorm"), (nn.RMSNorm, "RMSNorm")]
)
@pytest.mark.parametrize(("pool", "value"), [("token", "CLS token"), ("avg", "GAP"), ("map", "Attention")])
def test_vision_transformer_ends_with_its_token_average_or_attention(pool, value, norm, kind):
    size = dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)
    settings = dict(class_token=pool == "token", global_pool=pool, norm_layer=norm)
    found = components(timm.models.VisionTransformer(**size, **settings))
    assert found[[BASE, SIZE, NORM, POOL]].tolist() == ["Transformer", "32 x 32", kind, value]


def test_name_decides_only_on_the_search():
    model = network(*blocks())
    changed = components(model, input_size=32).compare(components(model, input_size=32, name="nf_regnet_b1"))
    assert changed.index.tolist() == [BASE]
    assert changed.other.tolist() == ["NAS (CNN)"]


def test_model_and_global_state_stay_as_they_were():
    model = timm.create_model("levit_128s")
    model.head.eval()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = {key: set(vars(module)) for key, module in model.named_modules()}
    random, default = torch.get_rng_state(), torch.get_default_dtype()
    components(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert {key: set(vars(module)) for key, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(getattr(module, "attention_bias_cache", None) for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert torch.zeros(1).device.type == "cpu"
    assert torch.get_default_dtype() == default


def test_weights_and_precision_do_not_matter():
    model = timm.create_model("resnet18")
    assert components(model).equals(components(model.half()))
    assert components(model).equals(on_meta("resnet18"))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        functools.partial(prune.l1_unstructured, name="weight", amount=0.5),
    ],
)
def test_computed_weights_are_read_as_others(change):
    model = network(*blocks(nn.ReLU()))
    expected = components(model, input_size=32)
    change(model[0])
    logits = model.eval()(torch.ones(1, 1, 32, 32))
    assert components(model, input_size=32).equals(expected)
    assert torch.equal(model(torch.ones(1, 1, 32, 32)), logits)


def test_models_are_read_by_name_and_evidence_names_the_modules():
    assert list(SHIPPED.index) == list(ms.CATALOGUE)
    table = read_components(["seresnet18", "convnext_atto"])
    assert table[CW].to_dict() == {"seresnet18": "Yes (SE)", "convnext_atto": "No"}
    proof = read_components(["seresnet18"], evidence=True).loc["seresnet18"]
    assert proof[STEM] == "conv1: 7x7, stride 2, 3 to 64 channels, 1 groups"
    assert proof[CW] == "layer1.0.se: SEModule"
    assert proof[STEM_POOL] == "maxpool: MaxPool2d"
    assert proof[HIERARCHY] == "layer2: 3136 to 784 places"
    proof = components(network(*blocks(ATTENTION, n=1), *blocks(n=1)), input_size=32, evidence=True)
    assert proof[PLACE] == "Middle: 1.0.parts.1 before 1.0.parts.2"


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: components("resnet50", input_size=32), TypeError, "not exported, got str"),
        (lambda: components(TRACED, input_size=32), TypeError, "not exported, got Sequential"),
        (lambda: components(network(*blocks())), ValueError, "tells the input size none: give input_size"),
        (lambda: components(nn.Embedding(3, 4), input_size=8), ValueError, "Embedding does not .*1, 3, 8, 8"),
        (lambda: components(nn.Conv2d(3, 8, 3), input_size=32), ValueError, "Conv2d is no .* returns logits"),
        (lambda: read_components(["resnet51"]), ValueError, "unknown model of timm 'resnet51'.*'resnet50'"),
    ],
)
def test_what_can_not_be_read_is_refused(use, error, message):
    with pytest.raises(error, match=message):
        use()


LABELS = """GeLU + ReLU = ReLU+GELU | ~ = - | 3s1 = 3 | Yes (Halo, BoT) = yes (bot,halo) | 7s2/3s1 = 7s2/3
| 3s2 | 16s16 | 6s6 | No | Yes | Yes (SE) | LN | LN + BN | 3s16 | 36"""


def test_spellings_of_the_same_are_equal_and_different_labels_stay_different():
    forms = [{normalised(one.strip()) for one in same.split(" = ")} for same in LABELS.split("|")]
    assert [len(same) for same in forms] == [1] * 15
    assert len(set.union(*forms)) == 15
