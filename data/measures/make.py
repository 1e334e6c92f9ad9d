"""Compare the zoo and six untaught students by features and gradients.

`python data/measures/make.py` trains the students of the book that have no teacher again and keeps their
weights in `data/measures`, with what they say of the study's images (`students.nc`). `measures.nc` then holds
linear CKA and cosine of input gradients of all 81 networks of the study and the students, on these images.
"""

from collections import ChainMap
from pathlib import Path

import numpy as np
import xarray as xr
from torch import nn

import modelsim as ms
from modelsim import distillation
from modelsim.attacks import logits

HERE = Path(__file__).parent


def student(run: distillation.Run) -> nn.Module:
    """Load a student, or train it."""
    path = HERE / f"{run.student}-seed{run.seed}.safetensors"
    if not path.exists():
        trained = distillation.distill(run.student, seed=run.seed)
        ms.save_weights(trained, path)
    classifier = distillation.build_student(run.student)
    ms.load_weights(classifier, path)
    return classifier.eval()


def main() -> None:
    """Train, ask, compare."""
    study, images = ms.open_study(HERE.parent / "fashion69"), ms.fashion_mnist("test", n=1000)
    runs = distillation.plan(teachers=[distillation.NONE], seeds=[0, 1, 2])
    students = {f"student-{run.student}-seed{run.seed}": student(run) for run in runs}
    said = np.stack([logits(one, images.images).softmax(1).numpy() for one in students.values()])
    told = {"clean_prediction": (("target", "image"), said.argmax(-1).astype(np.int8))}
    probability = {"clean_probability": (("target", "image", "class"), said.astype(np.float32))}
    names = {"target": [*students], "image": [*images.ids]}
    xr.Dataset(told | probability, names).to_netcdf(HERE / "students.nc", engine="scipy")
    zoo = ms.load_zoo(names=study.source.values.tolist())
    ms.measure(ChainMap(students, zoo), images, out=HERE)


if __name__ == "__main__":
    main()
