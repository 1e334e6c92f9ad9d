"""Time the attacks beside those of other libraries, a study beside a plain script, one process beside two.

`make bench` prints ratios of times that were taken in turns: the median, the smallest and the largest.
"""

import os
import platform
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import nn
from torch.nn.functional import cross_entropy

import modelsim as ms
from modelsim.attacks import frozen
from modelsim.workers import side_by_side
from modelsim.zoo import fold

TRANSFORMERS = ("deit_small_patch16_224", "swin_tiny_patch4_window7_224")
NETWORKS = ("resnet50", "efficientnet_b2", "convnext_tiny", *TRANSFORMERS)
SIX = (*NETWORKS, "resmlp_24_224")
EPS, STEP_SIZE = 18 / 255, 2 / 255


def of_torchattacks(classifier, x, y, steps):
    import torchattacks

    return partial(torchattacks.PGD(classifier, eps=EPS, alpha=STEP_SIZE, steps=steps), x, y)


def of_foolbox(classifier, x, y, steps):
    import foolbox

    model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=steps)
    return partial(attack.run, model, x, y, epsilon=EPS)


def of_art(classifier, x, y, steps):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(classifier, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1))
    settings = dict(eps=EPS, eps_step=STEP_SIZE, max_iter=steps, num_random_init=1, batch_size=len(x))
    attack = ProjectedGradientDescentPyTorch(model, verbose=False, **settings)
    return lambda: torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def of_adv_lib(classifier, x, y, steps):
    # It imports a plotting server that its attacks don't need.
    sys.modules.setdefault("visdom", ModuleType("visdom"))
    from adv_lib.attacks import pgd_linf

    return partial(pgd_linf, classifier, x, y, EPS, steps=steps, absolute_step_size=STEP_SIZE)


def of_modelsim(classifier, x, y, steps):
    return partial(ms.pgd, classifier, x, y, eps=EPS, steps=steps, step_size=STEP_SIZE)


def folded(classifier, x, y, steps):
    # As the engine does it, once for all batches and evaluations of a network.
    return of_modelsim(fold(classifier, x[:8]), x, y, steps)


def bare_passes(classifier, x, y, steps):
    def passes():
        with frozen(classifier):
            for part, labels in list(zip(x.split(125), y.split(125), strict=True)) * steps:
                canvas = part.clone().requires_grad_()
                torch.autograd.grad(cross_entropy(classifier(canvas), labels, reduction="sum"), canvas)

    return passes


OURS = {"ms.pgd": of_modelsim, "ms.pgd, folded": folded, "bare passes": bare_passes}
PEERS = {
    "torchattacks": of_torchattacks,
    "foolbox": of_foolbox,
    "adversarial-robustness-toolbox": of_art,
    "adv-lib": of_adv_lib,
}


def is_usable(name):
    """Try a peer on a few images, and say, if it doesn't run or leaves the ball, why not."""
    images = ms.fashion_mnist("test", n=10)
    try:
        adversarial = PEERS[name](ms.build("resnet50").eval(), images.images, images.labels, 2)()
        change = (adversarial - images.images).abs().max()
        if not STEP_SIZE / 2 < change < EPS + 1e-6:
            raise ValueError(f"it changes a pixel by {change:.3f}, with eps={EPS:.3f}")
    except Exception as error:  # whatever another library raises
        print(f"without {name}: {type(error).__name__}: {error}".splitlines()[0])
        return False
    return True


def in_turns(actions, runs):
    """Return the seconds that each action takes in each of the runs."""

    def seconds(action):
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return pd.DataFrame([{name: seconds(action) for name, action in actions.items()} for _ in range(runs)])


def bench_attacks(name, peers, *, runs, steps, n):
    """Yield titles and ratios, one a run."""
    classifier, images = ms.load_zoo(names=[name])[name], ms.fashion_mnist("test", n=n)
    given, makers = (classifier, images.images, images.labels), OURS | {peer: PEERS[peer] for peer in peers}
    in_turns({title: make(*given, 1) for title, make in makers.items()}, 1)
    seconds = in_turns({title: make(*given, steps) for title, make in makers.items()}, runs)
    for peer in peers:
        yield f"{peer} / ms.pgd", seconds[peer] / seconds["ms.pgd"]
    for title in ("ms.pgd", "ms.pgd, folded") if peers else ():
        yield f"fastest of them / {title}", seconds[seconds[peers].median().idxmin()] / seconds[title]
    yield "ms.pgd / bare passes", seconds["ms.pgd"] / seconds["bare passes"]


def plain_script(zoo, images, steps):
    """Do what `transfer` does, as one would write it down with torchattacks."""
    for source in zoo.values():
        batches = zip(images.images.split(250), images.labels.split(250), strict=True)
        adversarial = torch.cat([of_torchattacks(source, x, y, steps)() for x, y in batches])
        adversarial = (adversarial * 255).round() / 255
        for target in zoo.values():
            with torch.no_grad():
                torch.cat([target(x).argmax(1) for x in adversarial.split(250)])


def study(zoo, images, steps, *, workers=1):
    attack = partial(ms.pgd, eps=EPS, steps=steps, step_size=STEP_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        ms.transfer(zoo, images, attack, folder, device="cpu", workers=workers, progress=False)


def bench_studies(*, runs, steps, n, script):
    """Yield titles and ratios, one a run."""
    zoo, images = dict(ms.load_zoo(names=SIX)), ms.fashion_mnist("test", n=n)
    actions = {
        "one": partial(study, zoo, images, steps),
        "two": partial(study, zoo, images, steps, workers=2),
        "start-up": partial(side_by_side, max, 0, [1, 2], lambda *_: None, workers=2),
    }
    if script:
        actions["script"] = partial(plain_script, zoo, images, steps)
    study(zoo, ms.fashion_mnist("test", n=10), steps)
    seconds = in_turns(actions, runs)
    if script:
        yield "script with torchattacks / ms.transfer", seconds["script"] / seconds["one"]
    yield "two workers / one process", seconds["two"] / seconds["one"]
    net = (seconds["two"] - seconds["start-up"]) / seconds["one"]
    yield "two workers less their start-up / one process", net
    yield "start-up of two workers, seconds", seconds["start-up"]


def surroundings():
    """Say what the numbers hold for."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    processor = names[0] if names else platform.processor() or platform.machine()
    found = {one.name: f"{one.name} {one.version}" for one in distributions()}
    return {
        "hardware": f"{processor}, {os.cpu_count()} cores, torch on {torch.get_num_threads()} threads",
        "versions": ", ".join(found.get(name, f"no {name}") for name in ("torch", "timm", "numpy", *PEERS)),
    }


def main(
    runs: Annotated[int, typer.Option(help="Measurements of each action.")] = 5,
    steps: Annotated[int, typer.Option(help="Gradient steps of an attack.")] = 10,
    images: Annotated[int, typer.Option(help="Attacked at once; twice as many in a study.")] = 250,
    csv: Annotated[Path | None, typer.Option(help="Keep the ratios here.")] = None,
) -> None:
    """Time the attacks and the engine; ratios of times, each the median (smallest … largest)."""
    about, of_studies = surroundings(), f"{len(SIX)} networks"
    print(f"{about['hardware']}; {platform.system()}\n{about['versions']}")
    print(f"median (smallest … largest) of {runs} runs in turns; {images} images, {steps} steps")
    peers = [name for name in PEERS if is_usable(name)]
    found = [(name, bench_attacks(name, peers, runs=runs, steps=steps, n=images)) for name in NETWORKS]
    script = "torchattacks" in peers
    found += [(of_studies, bench_studies(runs=-(-runs // 2), steps=steps, n=2 * images, script=script))]
    rows = [
        (what, of, ratio.median(), ratio.min(), ratio.max(), len(ratio))
        for of, ratios in found
        for what, ratio in ratios
    ]
    table = pd.DataFrame(rows, columns=["what", "of", "median", "smallest", "largest", "runs"])
    ratio = [f"{row.median:.2f} ({row.smallest:.2f} … {row.largest:.2f})" for row in table.itertuples()]
    for _, part in table.assign(ratio=ratio).groupby(table["of"] == of_studies):
        wide = part.pivot(index="what", columns="of", values="ratio")
        print("\n" + wide.reindex(part["what"].unique()).rename_axis(index=None, columns=None).to_string())
    if csv:
        table.assign(**about).to_csv(csv, index=False, float_format="%.3f")


if __name__ == "__main__":
    typer.run(main)
