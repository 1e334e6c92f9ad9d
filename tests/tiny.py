"""Small image sets, classifiers and studies of known contents."""

import os
import time
from types import SimpleNamespace

import numpy as np
import torch
import xarray as xr
from torch import nn

import modelsim as ms

CLASSES = ("ant", "bee", "cow")


def pattern(n_classes, pixels=64):
    """One row a class: 1 on the pixels that are brighter in its images, 0 elsewhere."""
    return (torch.arange(pixels) % n_classes == torch.arange(n_classes)[:, None]).float()


def image_set(n=12, *, side=8, seed=0):
    """Noise, a quarter brighter on the pixels of the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(CLASSES)
    noise = torch.randint(0, 256 - 64, (n, 1, side, side), generator=generator)
    pixels = noise + 64 * pattern(len(CLASSES), side * side)[labels].view_as(noise)
    return ms.ImageSet(
        images=pixels.float() / 255,
        labels=labels,
        ids=tuple(f"tiny/{i:02d}" for i in range(n)),
        classes=CLASSES,
        name="tiny",
    )


# Networks are initialised at random, and then told by hand what the classes look like: without any
# rounding that depends on the processor, they know their classes, and each makes mistakes of its own.


def linear(seed, *, n_classes=3, pixels=64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(pixels, n_classes))
    network[1].weight.data += pattern(n_classes, pixels) / 4
    return network


def mlp(seed, *, n_classes=3, pixels=64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, n_classes)
        )
    network[1].weight.data[:n_classes] += pattern(n_classes, pixels) / 4
    network[4].weight.data[:, :n_classes] += torch.eye(n_classes)
    return network


def convolutional(seed, *, n_classes=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, n_classes)
        )
    network[0].weight.data[0, 0, 1, 1] += 1
    inner = pattern(n_classes).view(n_classes, 8, 8)[:, 1:-1, 1:-1].flatten(1)
    network[4].weight.data[:, :36] += inner / 4
    return network


def zoo():
    return {"first": linear(1), "second": mlp(2), "third": convolutional(3)}


WATCHING = SimpleNamespace(watchers=[])
"""Who is called with the classifier, the number of images and the seed of every attack; no setting of it."""


def attack(classifier, images, labels, *, eps=0.1, steps=3, seed=0):
    """PGD that can be watched, and made slow from outside."""
    for watcher in WATCHING.watchers:
        watcher(classifier, len(images), seed)
    time.sleep(float(os.environ.get("TINY_SLEEP", "0")))
    return ms.pgd(classifier, images, labels, eps=eps, steps=steps, step_size=0.05, seed=seed)


def transfer(out, *, watcher=None, **changed):
    given = dict(zoo=zoo(), images=image_set(), attack=attack, batch_size=5, device="cpu", progress=False)
    WATCHING.watchers = [watcher] if watcher else []
    return ms.transfer(out=out, **(given | changed))


def study(labels, clean, adversarial):
    """Lay out predictions as `open_study` does; models are named a, b, c …"""
    labels, clean, adversarial = (
        np.asarray(values, dtype=np.int16) for values in (labels, clean, adversarial)
    )
    names = np.array([chr(ord("a") + i) for i in range(len(clean))])
    return xr.Dataset(
        {
            "label": ("image", labels),
            "clean_prediction": (("target", "image"), clean),
            "adversarial_prediction": (("source", "target", "image"), adversarial),
            "images_without_gradient": ("source", np.zeros(len(names), dtype=np.int32)),
            "perturbation": (
                ("source", "image", "channel", "y", "x"),
                np.zeros((len(names), len(labels), 1, 1, 1), dtype=np.int8),
            ),
        },
        {
            "source": names,
            "target": names,
            "image": np.array([f"tiny/{i:02d}" for i in range(len(labels))]),
            "class": np.array(CLASSES),
            "image_sha256": ("image", np.array(["0" * 16] * len(labels))),
            "model_sha256": ("target", np.array(["0" * 64] * len(names))),
        },
    )


def learned(network, *, steps=60):
    """Train a network on other images of the same kind; what it becomes may depend on the processor."""
    images = image_set(90, seed=99)
    updates = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(steps):
        updates.zero_grad()
        nn.functional.cross_entropy(network(images.images), images.labels).backward()
        updates.step()
    updates.zero_grad()
    return network.eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inside = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.inside(self.norm(x).relu_())


class Attentive(nn.Module):
    """A transformer on the eight rows of the canvas, with a class token."""

    def __init__(self):
        super().__init__()
        self.embed, self.token = nn.Linear(8, 16), nn.Parameter(torch.zeros(1, 1, 16))
        self.place = nn.Parameter(0.1 * torch.randn(9, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x[:, 0])], 1)
        return self.head(self.block(x + self.place)[:, 0])


def _separable():
    return nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1), nn.SiLU()


_ORDINARY = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 3)),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(288, 3),
    ),
    "pooled": lambda: nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 3),
    ),
    "separable": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), *_separable(), nn.Flatten(), nn.Linear(256, 3)
    ),
    "group norm": lambda: nn.Sequential(nn.Conv2d(1, 8, 3), Residual(), nn.Flatten(), nn.Linear(288, 3)),
    "layer norm": lambda: nn.Sequential(
        nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 3)
    ),
    "instance norm": lambda: nn.Sequential(
        nn.InstanceNorm2d(1), nn.Conv2d(1, 8, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(288, 3)
    ),
    "transformer": Attentive,
    "tokens mixed": lambda: nn.Sequential(
        nn.Flatten(1, 2), nn.Linear(8, 16), nn.Mish(), nn.LayerNorm(16), nn.Flatten(), nn.Linear(128, 3)
    ),
    "channels last": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ELU(), nn.Flatten(), nn.Linear(288, 3)
    ).to(memory_format=torch.channels_last),
    "resized": lambda: ms.Classifier(
        nn.Sequential(nn.Conv2d(1, 8, 4, stride=2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(8 * 49, 3)),
        input_size=16,
    ),
}


def ordinary():
    """Twelve networks as people have them, which know their classes; nothing may be said against them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: learned(make()) for name, make in _ORDINARY.items()}
