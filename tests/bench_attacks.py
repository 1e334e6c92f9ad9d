"""Time the attacks beside those of other libraries, a study beside a plain script, one process beside two.

`make bench` prints ratios of times that were taken in turns: the median, the smallest and the largest.
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import modelsim as ms
from modelsim.attacks import frozen
from modelsim.workers import side_by_side
from modelsim.zoo import fold

NETWORKS = (
    "resnet50",
    "efficientnet_b2",
    "convnext_tiny",
    "deit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
)
SIX = (*NETWORKS, "resmlp_24_224")
EPS, STEP_SIZE = 18 / 255, 2 / 255

Attack = Callable[[], Tensor]


def of_torchattacks(classifier: nn.Module, x: Tensor, y: Tensor, steps: int) -> Attack:
    import torchattacks

    return partial(torchattacks.PGD(classifier, eps=EPS, alpha=STEP_SIZE, steps=steps), x, y)


def of_foolbox(classifier: nn.Module, x: Tensor, y: Tensor, steps: int) -> Attack:
    import foolbox

    model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=steps)
    return partial(attack.run, model, x, y, epsilon=EPS)


def of_art(classifier: nn.Module, x: Tensor, y: Tensor, steps: int) -> Attack:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(classifier, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1))
    settings = dict(eps=EPS, eps_step=STEP_SIZE, max_iter=steps, num_random_init=1, batch_size=len(x))
    attack = ProjectedGradientDescentPyTorch(model, verbose=False, **settings)
    return lambda: torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def of_adv_lib(classifier: nn.Module, x: Tensor, y: Tensor, steps: int) -> Attack:
    # It imports a plotting server that its attacks don't need.
    sys.modules.setdefault("visdom", ModuleType("visdom"))
    from adv_lib.attacks import pgd_linf

    return partial(pgd_linf, classifier, x, y, EPS, steps=steps, absolute_step_size=STEP_SIZE)


PEERS = {
    "torchattacks": of_torchattacks,
    "foolbox": of_foolbox,
    "adversarial-robustness-toolbox": of_art,
    "adv-lib": of_adv_lib,
}


def of_modelsim(classifier: nn.Module, x: Tensor, y: Tensor, steps: int) -> Attack:
    return partial(ms.pgd, classifier, x, y, eps=EPS, steps=steps, step_size=STEP_SIZE)


def folded(classifier: nn.Module, x: Tensor, y: Tensor, steps: int) -> Attack:
    # As the engine does it, once for all batches and evaluations of a network.
    return of_modelsim(fold(classifier, x[:8]), x, y, steps)


def bare_passes(classifier: nn.Module, x: Tensor, y: Tensor, steps: int) -> Callable[[], None]:
    def passes() -> None:
        with frozen(classifier):
            for part, labels in list(zip(x.split(125), y.split(125), strict=True)) * steps:
                canvas = part.clone().requires_grad_()
                torch.autograd.grad(cross_entropy(classifier(canvas), labels, reduction="sum"), canvas)

    return passes


def usable_peers() -> dict[str, Callable[..., Attack]]:
    """Try every peer on a few images, and say of those that don't run or leave the ball why not."""
    images, usable = ms.fashion_mnist("test", n=10), {}
    for name, peer in PEERS.items():
        try:
            adversarial = peer(ms.build("resnet50").eval(), images.images, images.labels, 2)()
            change = (adversarial - images.images).abs().max()
            if not STEP_SIZE / 2 < change < EPS + 1e-6:
                raise ValueError(f"it changes a pixel by {change:.3f}, with eps={EPS:.3f}")
        except Exception as error:  # whatever another library raises
            print(f"without {name}: {type(error).__name__}: {error}".splitlines()[0])
        else:
            usable[name] = peer
    return usable


def in_turns(actions: Mapping[str, Callable[[], object]], runs: int) -> pd.DataFrame:
    """Return the seconds that each action takes in each of the runs."""

    def seconds(action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return pd.DataFrame([{name: seconds(action) for name, action in actions.items()} for _ in range(runs)])


def row(title: str, what: str, values: pd.Series) -> dict[str, object]:
    spread = {"median": values.median(), "smallest": values.min(), "largest": values.max()}
    return {"what": what, "of": title} | spread | {"runs": len(values)}


def bench_attacks(
    name: str, peers: Mapping[str, Callable[..., Attack]], *, runs: int, steps: int, n: int
) -> Iterator[dict[str, object]]:
    classifier, images = ms.load_zoo(names=[name])[name], ms.fashion_mnist("test", n=n)
    ours = {"ms.pgd": of_modelsim, "ms.pgd, folded": folded, "bare passes": bare_passes}

    def actions(steps: int) -> dict[str, Callable[[], object]]:
        makers = (ours | peers).items()
        return {title: make(classifier, images.images, images.labels, steps) for title, make in makers}

    in_turns(actions(1), 1)
    seconds = in_turns(actions(steps), runs)
    for peer in peers:
        yield row(name, f"{peer} / ms.pgd", seconds[peer] / seconds["ms.pgd"])
    if peers:
        fastest = seconds[list(peers)].median().idxmin()
        for title in ("ms.pgd", "ms.pgd, folded"):
            yield row(name, f"fastest of them / {title}", seconds[fastest] / seconds[title])
    yield row(name, "ms.pgd / bare passes", seconds["ms.pgd"] / seconds["bare passes"])


def plain_script(zoo: Mapping[str, nn.Module], images: ms.ImageSet, steps: int) -> None:
    """Do what `transfer` does, as one would write it down with torchattacks."""
    for source in zoo.values():
        batches = zip(images.images.split(250), images.labels.split(250), strict=True)
        adversarial = torch.cat([of_torchattacks(source, x, y, steps)() for x, y in batches])
        adversarial = (adversarial * 255).round() / 255
        for target in zoo.values():
            with torch.no_grad():
                torch.cat([target(x).argmax(1) for x in adversarial.split(250)])


def study(zoo: Mapping[str, nn.Module], images: ms.ImageSet, steps: int, *, workers: int = 1) -> None:
    attack = partial(ms.pgd, eps=EPS, steps=steps, step_size=STEP_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        ms.transfer(zoo, images, attack, folder, device="cpu", workers=workers, progress=False)


def start_up() -> None:
    side_by_side(max, 0, [1, 2], lambda *_: None, workers=2)


def bench_studies(*, runs: int, steps: int, n: int, script: bool) -> Iterator[dict[str, object]]:
    zoo, images, six = dict(ms.load_zoo(names=SIX)), ms.fashion_mnist("test", n=n), f"{len(SIX)} networks"
    actions: dict[str, Callable[[], object]] = {
        "one": partial(study, zoo, images, steps),
        "two": partial(study, zoo, images, steps, workers=2),
        "start-up": start_up,
    }
    if script:
        actions["script"] = partial(plain_script, zoo, images, steps)
    study(zoo, ms.fashion_mnist("test", n=10), steps)
    seconds = in_turns(actions, runs)
    if script:
        yield row(six, "script with torchattacks / ms.transfer", seconds["script"] / seconds["one"])
    yield row(six, "two workers / one process", seconds["two"] / seconds["one"])
    net = (seconds["two"] - seconds["start-up"]) / seconds["one"]
    yield row(six, "two workers less their start-up / one process", net)
    yield row(six, "start-up of two workers, seconds", seconds["start-up"])


def surroundings() -> dict[str, str]:
    """Say what the numbers hold for."""
    info, versions = Path("/proc/cpuinfo"), []
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    processor = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    for package in ("torch", "timm", "numpy", *PEERS):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    hardware = f"{processor}, {os.cpu_count()} cores, torch on {torch.get_num_threads()} threads"
    return {"hardware": hardware, "versions": ", ".join(versions)}


def main(
    runs: Annotated[int, typer.Option(help="Measurements of each action.")] = 5,
    steps: Annotated[int, typer.Option(help="Gradient steps of an attack.")] = 10,
    images: Annotated[int, typer.Option(help="Attacked at once; twice as many in a study.")] = 250,
    csv: Annotated[Path | None, typer.Option(help="Keep the ratios here.")] = None,
) -> None:
    """Time the attacks and the engine; ratios of times, each the median (smallest … largest)."""
    about = surroundings()
    print(f"{about['hardware']}; {platform.system()}\n{about['versions']}")
    print(f"median (smallest … largest) of {runs} runs in turns; {images} images, {steps} steps")
    peers = usable_peers()
    rows = [
        line for name in NETWORKS for line in bench_attacks(name, peers, runs=runs, steps=steps, n=images)
    ]
    rows += bench_studies(runs=-(-runs // 2), steps=steps, n=2 * images, script="torchattacks" in peers)
    table = pd.DataFrame(rows)
    spread = table["smallest"].map("({:.2f}".format) + table["largest"].map(" … {:.2f})".format)
    shown = table.assign(ratio=table["median"].map("{:.2f} ".format) + spread)
    for _, part in shown.groupby(shown["of"].isin(NETWORKS), sort=False):
        wide = part.pivot(index="what", columns="of", values="ratio")
        print("\n" + wide.reindex(part["what"].unique()).rename_axis(index=None, columns=None).to_string())
    if csv:
        table.assign(**about).to_csv(csv, index=False, float_format="%.3f")


if __name__ == "__main__":
    typer.run(main)
