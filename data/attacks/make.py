"""Attack twenty-four networks in other ways than the study does, and keep what every target says.

`python data/attacks/make.py` runs every variation that isn't there yet, in `runs/attacks`, and gathers all of
them in `data/attacks/predictions.zarr`: adversarial_prediction (variation, source, target, image), on every
fourth image of the study. Names after the command are the variations to run, all by default.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchattacks
import xarray as xr
from torch import Tensor, nn

import modelsim as ms
from modelsim.attacks import logits, mi_fgsm

EPS = 18 / 255
HERE = Path(__file__).parent
STORE = HERE / "predictions.zarr"
RUNS = HERE.parents[1] / "runs" / "attacks"


def without_random_start(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float = EPS, steps: int = 50
) -> Tensor:
    """PGD from the clean image, which is the basic iterative method."""
    return torchattacks.BIM(classifier, eps=eps, alpha=2 / 255, steps=steps)(images, labels)


def apgd(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = EPS,
    steps: int = 50,
    seed: int = 0,
) -> Tensor:
    """Auto-PGD: its step shrinks by itself. The iterate of largest loss, also where the attack failed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attack = torchattacks.APGD(classifier, eps=eps, steps=steps)
        return attack.attack_single_run(images, labels)[0]


def noise(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float = EPS, seed: int = 0
) -> Tensor:
    """No attack: every pixel goes up or down by `eps`, at random, the same for all networks."""
    generator = torch.Generator().manual_seed(seed)
    return (images + eps * torch.randn(images.shape, generator=generator).sign()).clamp(0, 1)


VARIATIONS: dict[str, Callable[..., Tensor]] = {
    "noise": noise,
    "FGSM": partial(ms.fgsm, eps=EPS),
    "MI-FGSM": mi_fgsm,
    "1 step": partial(ms.pgd, steps=1, step_size=EPS),
    "10 steps": partial(ms.pgd, steps=10),
    "other random start": partial(ms.pgd, seed=1),
    "not rounded": partial(ms.pgd, seed=1),
    "no random start": without_random_start,
    "APGD": apgd,
    "ε = 4/255": partial(ms.pgd, eps=4 / 255),
    "ε = 24/255": partial(ms.pgd, eps=24 / 255),
    "step of 1/255": partial(ms.pgd, step_size=1 / 255),
    "step of 4/255": partial(ms.pgd, step_size=4 / 255),
    "200 steps": partial(ms.pgd, steps=200),
}

FIRST_SEEDS_ONLY = {"200 steps"}
"""To save time."""


def main() -> None:
    """Run the variations, then gather them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variation", nargs="*", default=[*VARIATIONS], help=", ".join(VARIATIONS))
    asked = parser.parse_args().variation
    if unknown := {*asked} - {*VARIATIONS}:
        parser.error(f"unknown variation {unknown}, known are {', '.join(VARIATIONS)}")
    for name in asked:
        print(name, flush=True)
        _run(name)
    gather()


def _folder(name: str) -> Path:
    return RUNS / name.replace("/", "∕").replace(" ", "-")


def _run(name: str) -> None:
    """Run one variation; what is there already is kept."""
    seeds = (0,) if name in FIRST_SEEDS_ONLY else (0, 1)
    study = ms.open_study(HERE.parent / "fashion69")
    twelve = [model.removesuffix("-seed1") for model in study.source.values if model.endswith("-seed1")]
    zoo = ms.load_zoo(names=[f"{model}-seed{seed}" if seed else model for seed in seeds for model in twelve])
    images = ms.fashion_mnist("test", n=1000)[::4]
    if name == "not rounded":
        _without_rounding(zoo, images, VARIATIONS[name], _folder(name))
        return
    with warnings.catch_warnings():
        # A weak attack fails on its own network too, and that is what is to be measured.
        warnings.filterwarnings("ignore", message=".*the attack on itself succeeds")
        ms.transfer(
            zoo, images, attack=VARIATIONS[name], out=_folder(name), perturbations=False, progress=False
        )


def _without_rounding(zoo: ms.Zoo, images: ms.ImageSet, attack: Callable[..., Tensor], folder: Path) -> None:
    """Show what an attack makes to all networks as it is, not rounded to 8 bit; a file a source."""
    folder.mkdir(parents=True, exist_ok=True)
    networks = dict(zoo)
    for source in networks:
        if (path := folder / f"{source}.npy").exists():
            continue
        adversarial = attack(networks[source], images.images, images.labels)
        said = [logits(networks[target], adversarial).argmax(1) for target in networks]
        np.save(path, torch.stack(said).numpy().astype(np.int16))


def _stored() -> dict[str, xr.DataArray]:
    if not STORE.exists():
        return {}
    stored = xr.open_zarr(STORE, consolidated=False).adversarial_prediction.load()
    return {name: stored.sel(variation=name, drop=True) for name in stored.variation.values.tolist()}


def gather() -> None:
    """Write one store of all variations that are finished, here or in the store that is there already."""
    found = _stored()
    for name in VARIATIONS:
        store = _folder(name) / "study.zarr"
        if store.exists() and bool(xr.open_zarr(store, consolidated=False).finished.all()):
            found[name] = ms.open_study(_folder(name)).adversarial_prediction
    full = found["other random start"]
    rows = {path.stem: np.load(path) for path in _folder("not rounded").glob("*.npy")}
    if len(rows) == full.sizes["source"]:
        found["not rounded"] = full.copy(data=np.stack([rows[name] for name in full.source.values]))
    order = [name for name in VARIATIONS if name in found]
    aligned = [found[name].reindex_like(full, fill_value=-1) for name in order]
    gathered = xr.concat(aligned, xr.Variable("variation", order), coords="minimal", compat="override")
    gathered = gathered.drop_vars([name for name in gathered.coords if name not in gathered.dims])
    gathered = gathered.assign_coords({name: gathered[name].astype(object) for name in gathered.dims})
    dataset = gathered.astype(np.int8).rename("adversarial_prediction").to_dataset()
    chunks = {"adversarial_prediction": {"chunks": (1, *dataset.adversarial_prediction.shape[1:])}}
    dataset.to_zarr(STORE, mode="w", encoding=chunks, consolidated=False)


if __name__ == "__main__":
    main()
