"""Train networks otherwise than the zoo's: with another normalisation, or by another recipe.

`python data/variants/make.py` trains all that aren't there yet, some three hours on one core; names after the
command are the networks to train. Weights go to `data/variants`. `python data/variants/make.py --compare`
then compares every network that is there, and the third seeds of the retrained, with the study, on every
fourth of its images, and writes `data/variants/study.zarr`.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2
from tqdm import tqdm

import modelsim as ms
from modelsim.distillation import teacher_logits

HERE = Path(__file__).parent
RUNS = HERE.parents[1] / "runs" / "variants"

SWAPPED = ("visformer_small", "convnext_tiny", "poolformer_m48", "deit_small_patch16_224", "efficientnet_b2")
"""Here batch normalisation becomes group normalisation, and group or layer normalisation the reverse."""

RETRAINED = ("resnet50", "deit_small_patch16_224")

THIRD_SEEDS = [f"{name}-seed2" for name in RETRAINED]
"""Trained with the zoo, but not in the study."""

NEW_SEED = 3
"""Of the retrained: none of the zoo's, so that no two networks begin with the same weights."""


class BatchNormOfTokens(nn.BatchNorm1d):
    """Batch normalisation of whatever has its channels last."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over all dimensions but the last."""
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


def other_normalisation(layer: nn.Module) -> nn.Module | None:
    """Return what takes the place of a normalisation; None of any other layer."""
    match layer:
        case nn.BatchNorm2d():  # timm's own also drops and activates
            groups = nn.GroupNorm(gcd(8, layer.num_features), layer.num_features)
            rest = [getattr(layer, name) for name in ("drop", "act") if hasattr(layer, name)]
            return nn.Sequential(groups, *rest) if rest else groups
        case LayerNorm2d():
            return nn.BatchNorm2d(layer.normalized_shape[0])
        case nn.LayerNorm():
            return BatchNormOfTokens(layer.normalized_shape[0])
        case nn.GroupNorm():
            return nn.BatchNorm2d(layer.num_channels)
    return None


def swap_normalisation(network: nn.Module) -> None:
    """Put the other normalisation in the place of every one of a network."""
    for name, child in network.named_children():
        if (other := other_normalisation(child)) is None:
            swap_normalisation(child)
        else:
            setattr(network, name, other)


def swapped(architecture: str, *, seed: int = 0) -> ms.Classifier:
    """Build an untrained classifier with the other normalisation."""
    classifier = ms.build(architecture, seed=seed)
    swap_normalisation(classifier.network)
    return classifier


def _swapped_trained(architecture: str, seed: int) -> nn.Module:
    classifier = swapped(architecture, seed=seed)
    return ms.fit(classifier, ms.fashion_mnist("train"), seed=seed, progress=False)


def _fit(architecture: str, images: ms.ImageSet, **settings: Any) -> nn.Module:
    classifier = ms.build(architecture, seed=NEW_SEED)
    return ms.fit(classifier, images, seed=NEW_SEED, progress=False, **settings)


def half(architecture: str) -> nn.Module:
    """As many steps on every second image."""
    return _fit(architecture, ms.fashion_mnist("train")[::2], recipe=ms.Recipe(epochs=6))


def augmented(architecture: str) -> nn.Module:
    """Three differently cut, turned and erased copies of the images instead of three passes over them."""
    images = ms.fashion_mnist("train")
    transform = v2.Compose([v2.RandomCrop(28, 3), v2.RandomRotation(10), v2.RandomErasing(0.5)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(NEW_SEED)
        copies = torch.stack([transform(image) for _ in range(3) for image in images.images])
    ids = tuple(f"{name}, copy {copy}" for copy in range(3) for name in images.ids)
    made = ms.ImageSet(copies.clamp(0, 1), images.labels.repeat(3), ids, images.classes, "augmented")
    return _fit(architecture, made, recipe=ms.Recipe(epochs=1))


def distilled(architecture: str) -> nn.Module:
    """Taught by the other architecture, at temperature 3, as much as by the labels."""
    other = next(name for name in RETRAINED if name != architecture)
    images = ms.fashion_mnist("train")
    teacher = ms.Teacher(teacher_logits(ms.load_zoo(names=[other])[other], images))
    return _fit(architecture, images, teacher=teacher)


def adversarial(architecture: str, *, eps: float = 8 / 255) -> nn.Module:
    """Go on from the zoo's first seed for one pass over images attacked by PGD of three steps."""
    classifier, images = ms.load_zoo(names=[architecture])[architecture], ms.fashion_mnist("train")
    torch.manual_seed(NEW_SEED)
    batches = torch.randperm(len(images)).split(64)[: len(images) // 64]
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, len(batches), pct_start=0.15)
    for seed, batch in enumerate(tqdm(batches, disable=None)):
        x, y = images.images[batch], images.labels[batch]
        attacked = ms.pgd(classifier.eval(), x, y, eps=eps, steps=3, step_size=eps / 2, seed=seed)
        optimiser.zero_grad()
        cross_entropy(classifier.train()(attacked), y).backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return classifier.eval()


def other_settings(architecture: str, **settings: Any) -> nn.Module:
    """Train by the recipe but for some settings."""
    return _fit(architecture, ms.fashion_mnist("train"), recipe=ms.Recipe(**settings))


def adamw(architecture: str) -> nn.Module:
    """Train by AdamW, with the better of its two learning rates in the recipe's pilot."""
    recipe = ms.Recipe(learning_rate=3e-3)
    return _fit(architecture, ms.fashion_mnist("train"), recipe=recipe, optimiser="adamw")


HOW: dict[str, Callable[[str], nn.Module]] = {
    "half": half,
    "augmented": augmented,
    "adamw": adamw,
    "distilled": distilled,
    "adversarial": adversarial,
    "learning-rate": partial(other_settings, learning_rate=3e-3),
    "weight-decay": partial(other_settings, weight_decay=0.2),
}

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"{name}-swapped-seed{seed}": partial(_swapped_trained, name, seed)
        for name in SWAPPED
        for seed in (0, 1)
    },
    **{f"{name}-{how}": partial(HOW[how], name) for how in HOW for name in RETRAINED},
}


def load(name: str) -> nn.Module:
    """Load a network of `data/variants`, or a third seed of the zoo."""
    if name in THIRD_SEEDS:
        return ms.load_zoo(names=[name])[name]
    architecture, how = next((a, name[len(a) + 1 :]) for a in (*SWAPPED, *RETRAINED) if name.startswith(a))
    classifier = swapped(architecture) if how.startswith("swapped") else ms.build(architecture)
    ms.load_weights(classifier, HERE / f"{name}.safetensors")
    return classifier.eval()


def _train(name: str) -> None:
    path = HERE / f"{name}.safetensors"
    if path.exists():
        return
    classifier, test = NETWORKS[name](), ms.fashion_mnist("test")
    said = f"{ms.accuracy(classifier, test):.4f}"
    print(name, said, flush=True)
    ms.save_weights(classifier, path, {"test_accuracy": said, "torch": torch.__version__})


def _compare(asked: list[str]) -> None:
    """Compare one network after the other with the study and with those before, in the order asked for."""
    names = [name for name in asked if (HERE / f"{name}.safetensors").exists()] + THIRD_SEEDS
    study = ms.open_study(HERE.parent / "fashion69").isel(image=slice(None, None, 4))
    done: list[str] = []
    for name in tqdm(names, "compared"):
        zoo = {other: load(other) for other in done}
        with warnings.catch_warnings():
            # Training against attacks makes them fail, and that is what is to be measured.
            warnings.filterwarnings("ignore", message=".*the attack on itself succeeds")
            study = ms.compare(load(name), study, name=name, zoo=zoo, out=RUNS / name, progress=False)
        done.append(name)
    kept = study.drop_dims(["channel", "test_image"], errors="ignore")
    said = kept[["adversarial_prediction", "clean_prediction", "label"]]
    dataset = said.drop_vars([c for c in said.coords if c not in said.dims]).astype(np.int8)
    encoding = {"adversarial_prediction": {"chunks": said.adversarial_prediction.shape}}
    dataset = dataset.assign_coords({name: dataset[name].astype(object) for name in dataset.dims})
    dataset.attrs["perturbations"] = "false"
    dataset.to_zarr(HERE / "study.zarr", mode="w", encoding=encoding, consolidated=False)


def main() -> None:
    """Train, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="*", default=[*NETWORKS], help=", ".join(NETWORKS))
    parser.add_argument("--compare", action="store_true", help="compare what is there with the study")
    given = parser.parse_args()
    if unknown := {*given.network} - {*NETWORKS}:
        parser.error(f"unknown network {unknown}, known are {', '.join(NETWORKS)}")
    if given.compare:
        _compare(given.network)
        return
    torch.set_num_threads(1)
    for name in given.network:
        _train(name)


if __name__ == "__main__":
    main()
