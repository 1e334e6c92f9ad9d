"""Small image sets, classifiers and studies of known contents."""

import os
import time

import numpy as np
import torch
import xarray as xr
from torch import nn

import modelsim as ms

CLASSES = ("ant", "bee", "cow")


def image_set(n=12, *, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 1, side, side), generator=generator)
    return ms.ImageSet(
        images=pixels.float() / 255,
        labels=torch.arange(n) % len(CLASSES),
        ids=tuple(f"tiny/{i:02d}" for i in range(n)),
        classes=CLASSES,
        name="tiny",
    )


def linear(seed, *, n_classes=3, pixels=64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, n_classes))


def mlp(seed, *, n_classes=3, pixels=64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, n_classes)
        )


def convolutional(seed, *, n_classes=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, n_classes)
        )


def zoo():
    return {"first": linear(1), "second": mlp(2), "third": convolutional(3)}


WATCHERS = []
"""Called with the classifier, the number of images and the seed of every attack."""


def attack(classifier, images, labels, *, eps=0.1, steps=3, seed=0):
    """PGD that can be watched, and made slow from outside."""
    for watcher in WATCHERS:
        watcher(classifier, len(images), seed)
    time.sleep(float(os.environ.get("TINY_SLEEP", "0")))
    return ms.pgd(classifier, images, labels, eps=eps, steps=steps, step_size=0.05, seed=seed)


def transfer(out, *, watcher=None, **changed):
    given = dict(zoo=zoo(), images=image_set(), attack=attack, batch_size=5, device="cpu", progress=False)
    WATCHERS[:] = [watcher] if watcher else []
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
