"""Time the attacks against another implementation, and the engine against a naive loop.

Run by `make bench`. Prints ratios, not seconds: the median over runs that alternate, and the smallest
and largest.
"""

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torchattacks

import modelsim as ms

RUNS, STEPS, EPS, STEP_SIZE = 5, 10, 16 / 255, 2 / 255


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def show_ratio(title: str, slow: Callable[[], object], quick: Callable[[], object]) -> None:
    slow(), quick()
    ratios = [seconds(slow) / seconds(quick) for _ in range(RUNS)]
    print(f"{title}: {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})")


def compare_pgd() -> None:
    classifier, images = (
        ms.load_zoo(names=["resnet50"])["resnet50"],
        ms.fashion_mnist("test", n=70)[range(64)],
    )
    theirs = torchattacks.PGD(classifier, eps=EPS, alpha=STEP_SIZE, steps=STEPS)
    show_ratio(
        f"torchattacks.PGD / modelsim.pgd, resnet50, {len(images)} images, {STEPS} steps",
        lambda: theirs(images.images, images.labels),
        lambda: ms.pgd(classifier, images.images, images.labels, eps=EPS, steps=STEPS, step_size=STEP_SIZE),
    )


def compare_engine() -> None:
    zoo = {f"model {seed}": ms.build("deit_small_patch16_224", seed=seed).eval() for seed in range(3)}
    images, attack = (
        ms.fashion_mnist("test", n=40),
        partial(ms.pgd, eps=EPS, steps=STEPS, step_size=STEP_SIZE),
    )

    def naive() -> None:
        for source in zoo.values():
            for target in zoo.values():
                adversarial = attack(source, images.images, images.labels)
                with torch.inference_mode():
                    target(adversarial).argmax(1)

    def engine() -> None:
        with tempfile.TemporaryDirectory() as folder:
            ms.transfer(zoo, images, attack, folder, device="cpu", progress=False)

    show_ratio(
        f"one attack a pair / modelsim.transfer, {len(zoo)} models, {len(images)} images, {STEPS} steps",
        naive,
        engine,
    )


if __name__ == "__main__":
    print(f"{cpu_name()}, torch on {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, torchattacks {version('torchattacks')}")
    print(f"ratio of times: median (smallest … largest) of {RUNS} alternating runs after one to warm up")
    compare_pgd()
    compare_engine()
