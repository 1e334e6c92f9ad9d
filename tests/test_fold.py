import threading
from functools import partial

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.functional import conv2d, dropout
from torch.nn.utils.parametrizations import spectral_norm

import modelsim as ms
from modelsim.zoo import fingerprint, fold

CANVAS = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def disturbed(network):
    """Give every normalisation statistics and weights that are far from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.uniform_(-3, 3, generator=generator)
            module.running_var.uniform_(0.01, 30, generator=generator)
            if module.affine:
                module.weight.data.uniform_(-2, 2, generator=generator)
                module.bias.data.uniform_(-2, 2, generator=generator)
    return network.eval()


def classifier(*layers):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return disturbed(nn.Sequential(*(make() for make in layers), *head))


conv, norm = partial(nn.Conv2d, 1, 4, 3), partial(nn.BatchNorm2d, 4)


def kinds(network):
    return [type(module).__name__ for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


class Block(nn.Module):
    """One convolution and two normalisations, put together by `flow(block, canvas)`."""

    def __init__(self, flow, *, kind=nn.Conv2d):
        super().__init__()
        torch.manual_seed(0)
        self.flow, self.conv, self.norm = flow, kind(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.again = (self.norm,)
        disturbed(self)

    def forward(self, canvas):
        return self.head(self.flow(self, canvas).mean((2, 3)))


FOLDABLE = {
    "plain": (conv, norm),
    "bias, stride, groups": (conv, nn.GELU, partial(nn.Conv2d, 4, 4, 3, stride=2, groups=2), norm),
    "no affine": (partial(conv, bias=False), partial(norm, affine=False)),
    "large eps": (conv, partial(norm, eps=0.7)),
    "in-place activation": (conv, norm, partial(nn.SiLU, inplace=True), partial(nn.Dropout, 0.5)),
    "reflected padding": (partial(conv, padding=1, padding_mode="reflect"), norm),
    "timm's activation": (conv, partial(BatchNormAct2d, 4, act_layer=nn.SiLU)),
    "timm's padding": (partial(Conv2dSame, 1, 4, 3, stride=2), norm),
    "nested": (lambda: nn.Sequential(nn.Sequential(conv()), nn.Sequential(nn.Identity(), norm())),),
}
FOLDABLE = {name: partial(classifier, *layers) for name, layers in FOLDABLE.items()} | {
    "reached by another name": lambda: Block(lambda b, x: b.again[0](b.conv(x))),
    "attribute asked for": lambda: Block(lambda b, x: b.norm(b.conv(x)) / b.norm.num_features),
    "writes into its input": lambda: Block(lambda b, x: b.norm(b.conv(x.mul_(0.5)))),
}


@pytest.mark.parametrize("make", FOLDABLE.values(), ids=FOLDABLE)
def test_folded_convolution_gives_the_logits_and_gradients_of_both(make):
    network, canvas = make().train(), CANVAS.clone()
    before = fingerprint(network)
    folded = fold(network, canvas)
    assert (fingerprint(network), torch.equal(canvas, CANVAS)) == (before, True)
    assert all(module.training for module in network.modules())
    assert not any(module.training for module in folded.modules())
    assert "_Folded" not in kinds(network)
    assert kinds(folded) == ["_Folded", *["BatchNorm2d"] * (len(kinds(network)) - 1)]
    x, y = (CANVAS.clone().requires_grad_() for _ in range(2))
    expected, logits = network.eval()(x.clone()), folded(y.clone())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    # An attack follows the gradient of the folded one.
    expected.square().sum().backward()
    logits.square().sum().backward()
    assert (x.grad - y.grad).abs().max() < 1e-4 * x.grad.abs().max()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        folded(CANVAS.clone())
    names = {event.key for event in profile.key_averages()}
    assert "aten::convolution" in names
    assert not [name for name in names if "batch_norm" in name]


def with_lock():
    network = classifier(conv, norm)
    network.lock = threading.Lock()
    return network


class Stubborn(nn.Sequential):
    """Stays in training mode."""

    def train(self, mode=True):
        return self


NOT_FOLDABLE = {
    "residual": lambda b, x: b.norm(made := b.conv(x)) + made,
    "residual too faint for the logits": lambda b, x: b.norm(made := b.conv(x)) + 1e-5 * made,
    "seen through a view": lambda b, x: b.norm(made := b.conv(x)) + made[:, :, :1].detach(),
    "called twice": lambda b, x: b.norm(b.conv(x)) + b.norm(b.conv(x.flip(3))),
    "two normalisations of one convolution": lambda b, x: b.norm(made := b.conv(x)) + b.other(made),
    "activation between": lambda b, x: b.norm(b.conv(x).relu()),
    "activation between, in place": lambda b, x: b.norm(b.conv(x).relu_()),
    "normalisation first": lambda b, x: b.conv(b.norm(x.expand(-1, 4, -1, -1))[:, :1]),
    "weight used elsewhere": lambda b, x: b.norm(b.conv(x)) + conv2d(x, b.conv.weight, padding=1),
    "scale used elsewhere": lambda b, x: b.norm(b.conv(x)) * b.norm.weight.view(1, -1, 1, 1),
    "wiring that the logits alone reveal": lambda b, x: b.norm(m := b.conv(x)) + torch.as_tensor(m.numpy()),
    "random": lambda b, x: dropout(b.norm(b.conv(x)), 0.5),
}
COMPUTED = [
    StdConv2d,
    ScaledStdConv2d,
    lambda *given, **settings: spectral_norm(nn.Conv2d(*given, **settings)),
]
NOT_FOLDABLE = {name: partial(Block, flow) for name, flow in NOT_FOLDABLE.items()} | {
    **{
        f"computed weight {i}": partial(Block, lambda b, x: b.norm(b.conv(x)), kind=k)
        for i, k in enumerate(COMPUTED)
    },
    "statistics of the batch": lambda: classifier(conv, partial(norm, track_running_stats=False)),
    "another normalisation": lambda: classifier(conv, partial(nn.GroupNorm, 2, 4)),
    "no normalisation": lambda: classifier(conv),
    "not to be copied": with_lock,
    "always in training mode": lambda: Stubborn(conv(), norm(), nn.Flatten(), nn.Linear(4 * 36, 3)),
}


@pytest.mark.parametrize("make", NOT_FOLDABLE.values(), ids=NOT_FOLDABLE)
def test_what_anything_else_reads_or_cannot_be_folded_is_the_classifier_itself(make):
    network = make()
    assert fold(network, CANVAS) is network


UNFOLDED = dict(resnet50=0, efficientnet_b2=0, cspdarknet53=0, hrnet_w64=0, xception65=0, dpn107=11)
"""How many batch normalisations follow something else than one convolution."""


@pytest.mark.parametrize("name", ms.CATALOGUE)
def test_shipped_network_keeps_logits_predictions_and_memory_format(name):
    network, images = ms.load_zoo(names=[name])[name], ms.fashion_mnist("test", n=100, seed=5).images
    folded = fold(network, images[:8])
    with torch.no_grad():
        expected, logits = network(images), folded(images)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    strides = {key: weight.stride() for key, weight in network.named_parameters()}
    kept = {key: weight.stride() for key, weight in folded.named_parameters() if key in strides}
    assert kept == strides
    if name in UNFOLDED:
        assert "_Folded" in kinds(folded)
        assert len(kinds(folded)) - kinds(folded).count("_Folded") == UNFOLDED[name]
