"""Time studies of more and more networks, and of more and more images, in turns.

`python tests/bench_scaling.py --csv data/scaling.csv` keeps the seconds, a row a run, and prints the
exponents of a power law for either.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from bench_attacks import in_turns, study, surroundings

import modelsim as ms

NETWORKS, IMAGES = (2, 4, 8, 16), (50, 100, 200, 400)
FEW = 4
"""Networks whose number of images grows."""


def actions(steps):
    """Return studies by number of networks, all of one architecture and so of one cost, and of images."""
    networks = {f"seed {seed}": ms.build("resnet50", seed=seed).eval() for seed in range(max(NETWORKS))}
    sizes = [(n, IMAGES[1]) for n in NETWORKS] + [(FEW, n) for n in IMAGES if n != IMAGES[1]]
    return {
        (m, n): partial(study, dict([*networks.items()][:m]), ms.fashion_mnist("test", n=n), steps)
        for m, n in sizes
    }


def exponent(seconds):
    """Fit seconds = a · size^b by least squares of logarithms; return b."""
    return np.polyfit(np.log(seconds.index), np.log(seconds), 1)[0]


def main(
    runs: Annotated[int, typer.Option(help="Measurements of each study.")] = 3,
    steps: Annotated[int, typer.Option(help="Gradient steps of an attack.")] = 10,
    csv: Annotated[Path | None, typer.Option(help="Keep the seconds here.")] = None,
) -> None:
    """Time studies of several sizes."""
    about, made = surroundings(), actions(steps)
    in_turns({"warm": made[min(made)]}, 1)
    sizes = pd.MultiIndex.from_tuples(made, names=["networks", "images"])
    long = in_turns(made, runs).set_axis(sizes, axis=1).melt(value_name="seconds")
    median = long.groupby(["networks", "images"]).seconds.median()
    print(
        f"{about['hardware']}\n{about['versions']}\n{runs} runs in turns, {steps} steps\n{median.to_string()}"
    )
    print(f"networks: exponent {exponent(median.xs(IMAGES[1], level='images')):.2f}")
    print(f"images: exponent {exponent(median.xs(FEW, level='networks')):.2f}")
    if csv:
        long.assign(steps=steps, **about).to_csv(csv, index=False, float_format="%.3f")


if __name__ == "__main__":
    typer.run(main)
