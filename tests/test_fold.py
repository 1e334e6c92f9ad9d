import threading
from functools import partial

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.functional import conv2d
from torch.nn.utils.parametrizations import spectral_norm

import modelsim as ms
from modelsim.zoo import fold

CANVAS = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def disturbed(network, *, seed=0):
    """Give every normalisation statistics and weights that are far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.uniform_(-3, 3, generator=generator)
            module.running_var.uniform_(0.01, 30, generator=generator)
            if module.affine:
                module.weight.data.uniform_(-2, 2, generator=generator)
                module.bias.data.uniform_(-2, 2, generator=generator)
    return network.eval()


def classifier(*middle, channels=4):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]
    return disturbed(nn.Sequential(*(make() for make in middle), *head))


def conv(**settings):
    return partial(nn.Conv2d, 1, 4, 3, **settings)


def norm(**settings):
    return partial(nn.BatchNorm2d, 4, **settings)


def kinds(network):
    return [type(module).__name__ for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


class Block(nn.Module):
    """One convolution and one normalisation, put together by `flow(block, canvas)`."""

    def __init__(self, flow, *, kind=nn.Conv2d):
        super().__init__()
        torch.manual_seed(0)
        self.flow, self.conv, self.norm = flow, kind(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        disturbed(self)

    def forward(self, canvas):
        return self.head(self.flow(self, canvas).mean((2, 3)))


FOLDABLE = {
    "plain": (conv(), norm()),
    "bias, stride, groups": (conv(), nn.GELU, partial(nn.Conv2d, 4, 4, 3, stride=2, groups=2), norm()),
    "no affine": (conv(bias=False), norm(affine=False)),
    "large eps": (conv(), norm(eps=0.7)),
    "in-place activation": (conv(), norm(), partial(nn.SiLU, inplace=True), partial(nn.Dropout, 0.5)),
    "reflected padding": (conv(padding=1, padding_mode="reflect"), norm()),
    "timm's activation": (conv(), partial(BatchNormAct2d, 4, act_layer=nn.SiLU)),
    "timm's padding": (partial(Conv2dSame, 1, 4, 3, stride=2), norm()),
    "nested": (lambda: nn.Sequential(nn.Sequential(conv()()), nn.Sequential(nn.Identity(), norm()())),),
}


@pytest.mark.parametrize("layers", FOLDABLE.values(), ids=FOLDABLE)
def test_folded_convolution_gives_the_logits_of_both(layers):
    network = classifier(*layers)
    folded = fold(network, CANVAS)
    assert kinds(folded) == ["_Folded"]
    x, y = (CANVAS.clone().requires_grad_() for _ in range(2))
    expected, logits = network(x), folded(y)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    # An attack follows the gradient of the folded one.
    expected.square().sum().backward()
    logits.square().sum().backward()
    assert (x.grad - y.grad).abs().max() < 1e-4 * x.grad.abs().max()


def test_normalisation_is_computed_no_more():
    folded = fold(classifier(conv(), norm()), CANVAS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        folded(CANVAS)
    names = {event.key for event in profile.key_averages()}
    assert "aten::convolution" in names
    assert not [name for name in names if "batch_norm" in name]


def shared(block, canvas):
    return block.norm(block.conv(canvas)) + block.norm(block.conv(canvas.flip(3)))


def kept_and_faint(block, canvas):
    made = block.conv(canvas)
    return block.norm(made) + 1e-5 * made


def through_a_view(block, canvas):
    made = block.conv(canvas)
    return block.norm(made) + made[:, :, :1].detach()


def weight_elsewhere(block, canvas):
    return block.norm(block.conv(canvas)) + conv2d(canvas, block.conv.weight, padding=1)


def scale_elsewhere(block, canvas):
    return block.norm(block.conv(canvas)) * block.norm.weight.view(1, -1, 1, 1)


NOT_FOLDABLE = {
    "residual": lambda b, x: b.norm(made := b.conv(x)) + made,
    "residual too faint for the logits": kept_and_faint,
    "seen through a view": through_a_view,
    "called twice": shared,
    "two normalisations of one convolution": lambda b, x: b.norm(made := b.conv(x)) + b.other(made),
    "activation between": lambda b, x: b.norm(b.conv(x).relu()),
    "activation between, in place": lambda b, x: b.norm(b.conv(x).relu_()),
    "normalisation first": lambda b, x: b.conv(b.norm(x.expand(-1, 4, -1, -1))[:, :1]),
    "weight used elsewhere": weight_elsewhere,
    "scale used elsewhere": scale_elsewhere,
    "wiring that the logits alone reveal": lambda b, x: (
        b.norm(made := b.conv(x)) + torch.as_tensor(made.numpy())
    ),
}


@pytest.mark.parametrize("flow", NOT_FOLDABLE.values(), ids=NOT_FOLDABLE)
def test_what_anything_else_reads_is_not_folded(flow):
    network = Block(flow)
    assert fold(network, CANVAS) is network


def test_normalisation_reached_by_another_name_stays_folded():
    network = Block(lambda b, x: b.again[0](b.conv(x)))
    network.again = [network.norm]
    folded = fold(network, CANVAS)
    assert kinds(folded) == ["_Folded", "BatchNorm2d"]
    torch.testing.assert_close(folded(CANVAS), network(CANVAS), rtol=1e-4, atol=1e-4)


def test_attributes_of_a_normalisation_can_still_be_asked_for():
    network = Block(lambda b, x: b.norm(b.conv(x)) / b.norm.num_features)
    assert fold(network, CANVAS) is not network


@pytest.mark.parametrize(
    "kind", [StdConv2d, ScaledStdConv2d, lambda *a, **k: spectral_norm(nn.Conv2d(*a, **k))]
)
def test_weights_that_are_computed_in_every_pass_are_not_folded(kind):
    network = Block(lambda b, x: b.norm(b.conv(x)), kind=kind)
    assert fold(network, CANVAS) is network


@pytest.mark.parametrize("layer", [norm(track_running_stats=False), partial(nn.GroupNorm, 2, 4), nn.Identity])
def test_nothing_to_fold_is_the_classifier_itself(layer):
    network = classifier(conv(), layer)
    assert fold(network, CANVAS) is network


def test_normalisation_that_stays_in_training_mode_is_not_folded():
    class Stubborn(nn.Sequential):
        def train(self, mode=True):
            return self

    network = Stubborn(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    assert fold(network, CANVAS) is network


def test_random_network_is_not_folded():
    network = Block(lambda b, x: nn.functional.dropout(b.norm(b.conv(x)), 0.5))
    assert fold(network, CANVAS) is network


def test_what_cannot_be_copied_is_returned():
    network = classifier(conv(), norm())
    network.lock = threading.Lock()
    assert fold(network, CANVAS) is network


def test_given_classifier_and_canvas_stay_as_they_were():
    network = Block(lambda b, x: b.norm(b.conv(x.mul_(0.5)))).train()
    before, canvas = {k: v.clone() for k, v in network.state_dict().items()}, CANVAS.clone()
    folded = fold(network, canvas)
    assert not any(module.training for module in folded.modules())
    assert all(module.training for module in network.modules())
    assert kinds(network) == ["BatchNorm2d", "BatchNorm2d"]
    assert torch.equal(canvas, CANVAS)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


UNFOLDED = {
    "resnet50": 0,
    "efficientnet_b2": 0,
    "cspdarknet53": 0,
    "hrnet_w64": 0,
    "xception65": 0,
    "dpn107": 11,
}
"""How many batch normalisations follow something else than one convolution."""


@pytest.mark.parametrize("name", ms.CATALOGUE)
def test_shipped_network_keeps_logits_predictions_and_memory_format(name):
    network, images = ms.load_zoo(names=[name])[name], ms.fashion_mnist("test", n=200, seed=5).images
    folded = fold(network, images[:8])
    with torch.no_grad():
        expected, logits = network(images), folded(images)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    strides = {key: weight.stride() for key, weight in network.named_parameters()}
    kept = {key: weight.stride() for key, weight in folded.named_parameters() if key in strides}
    assert kept == strides
    if name in UNFOLDED:
        assert kinds(folded).count("BatchNorm2d") + kinds(folded).count("BatchNormAct2d") == UNFOLDED[name]
        assert "_Folded" in kinds(folded)
