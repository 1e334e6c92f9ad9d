"""Small image sets, classifiers and studies of known contents."""

import os
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
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


QUICK = partial(ms.pgd, eps=0.15, steps=3, step_size=0.1)
"""An attack that fools every one of these networks."""


def _same(x):
    return x


class Odd(nn.Module):
    """A network that knows its classes, with something of one's own before it and after it."""

    def __init__(self, before=None, after=None, inside=None):
        super().__init__()
        self.inside = linear(1) if inside is None else inside
        self.before, self.after = before or _same, after or _same

    def forward(self, x):
        return self.after(self.inside(self.before(x)))


def compare(study, classifier, **changed):
    """Compare with a study of `{"plain": linear(2)}` under the quick attack, if nothing else is said."""
    given = dict(name="odd", images=image_set(), zoo={"plain": linear(2)}, attack=QUICK)
    return ms.compare(classifier, study, device="cpu", progress=False, **(given | changed))


class Killed(BaseException):
    """Ends a run without any of its own cleaning up."""


def killing(function, at, *, counts=lambda *given: True):
    """A function that raises Killed in place of call number `at` of those that count."""
    calls = []

    def called(*args, **options):
        calls.extend([args] if counts(*args) else [])
        if len(calls) == at + 1:
            raise Killed
        return function(*args, **options)

    return called


@contextmanager
def killed_at(owner, name, at, **options):
    """What runs inside must end, killed, at a call of a method."""
    changed = patch.object(owner, name, killing(getattr(owner, name), at, **options))
    with changed, pytest.raises(Killed):
        yield


def files(folder):
    """Everything of a study in a folder, but not the locks beside it."""
    names = {path.relative_to(folder): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    return {str(n): path.read_bytes() for n, path in names.items() if not n.parts[0].startswith(".")}


def same_predictions(one, other):
    names = ("clean_prediction", "adversarial_prediction")
    return all(np.array_equal(one[name], other[name]) for name in names)


def predicted(network, canvas):
    with torch.no_grad():
        return network.eval()(canvas).argmax(1).tolist()


def said_of(caught, name):
    return [str(w.message) for w in caught if str(w.message).startswith(f"model {name!r}")]


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
