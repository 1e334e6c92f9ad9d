from functools import partial

import pytest
import tiny
import torch
from pages import page
from torch import nn

import modelsim as ms

pair = page("one_pair")


@pytest.mark.parametrize("steps", [1, 4])
def test_attack_on_the_page_is_that_of_the_package_rounded_to_grey_levels(steps, images, zoo):
    x, y = images.images, images.labels
    for classifier in map(nn.Module.eval, zoo.values()):
        by_package = ms.pgd(classifier, x, y, eps=9 / 255, steps=steps, step_size=3 / 255, seed=0)
        by_hand = pair.attack(classifier, x, y, eps=9 / 255, steps=steps, step_size=3 / 255)
        assert torch.equal(by_hand, (by_package * 255).round() / 255)


class Bright(nn.Module):
    """Tells bright images (class 1) from dark ones (0)."""

    def forward(self, x):
        return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1)


def test_fooled_counts_what_is_told_otherwise_than_the_label():
    canvas = torch.tensor([0.1, 0.9, 0.6, 0.2]).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    assert pair.says(Bright(), canvas).tolist() == [0, 1, 1, 0]
    assert pair.fooled(Bright(), canvas, torch.tensor([0, 1, 0, 1])).tolist() == [0, 0, 1, 1]


def test_counted_by_hand_the_rates_are_those_of_the_package(images, zoo, tmp_path):
    attack = partial(ms.pgd, eps=60 / 255, steps=3, step_size=30 / 255, seed=0)
    study = tiny.transfer(tmp_path, zoo=zoo, images=images, attack=attack, fold=False, batch_size=12)
    rate, y = ms.transferability(study), images.labels
    for source in zoo:
        zoo[source].eval()
    for source in zoo:
        made = pair.attack(zoo[source], images.images, y, 60 / 255, 3, 30 / 255)
        for target in zoo:
            both = (pair.says(zoo[source], images.images) == y) & (pair.says(zoo[target], images.images) == y)
            by_hand = pair.fooled(zoo[target], made, y)[both].mean().item()
            expected = rate.sel(source=source, target=target).item()
            assert by_hand == pytest.approx(expected, nan_ok=True)
