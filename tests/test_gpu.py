"""What only a GPU can prove; skipped where there is none."""

import time
from importlib.util import find_spec

import numpy as np
import pytest
import tiny
import torch

import modelsim as ms
from modelsim.workers import side_by_side

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

NAMES = ["resnet50", "convnext_tiny", "deit_small_patch16_224"]


def test_study_and_comparison_on_the_gpu_are_those_of_the_cpu_and_memory_is_given_back(tmp_path):
    zoo = {name: ms.load_zoo(names=NAMES)[name] for name in NAMES}
    images, memory = ms.fashion_mnist("test", n=200), []
    for device in ("cpu", "cuda", "cuda"):  # the first time, libraries take memory for themselves
        out = tmp_path / str(len(memory))
        study = ms.transfer(zoo, images, out=out, device=device, progress=False)
        memory.append(torch.cuda.memory_allocated())
    cpu, gpu = ms.open_study(tmp_path / "0"), study
    assert memory[2] - memory[1] < 2**20
    assert {p.device.type for network in zoo.values() for p in network.parameters()} == {"cpu"}
    assert (cpu.clean_prediction == gpu.clean_prediction).mean() >= 0.99
    # Random starts are drawn on the device, so adversarial images differ, and a few outcomes with them.
    assert (cpu.adversarial_prediction == gpu.adversarial_prediction).mean() >= 0.9
    bounds = ms.interval(cpu, level=0.99)
    inside = (ms.sat(gpu) >= bounds.sel(bound="low")) & (ms.sat(gpu) <= bounds.sel(bound="high"))
    assert inside.values[~np.eye(len(NAMES), dtype=bool)].all()
    few = gpu.sel(source=NAMES[1:], target=NAMES[1:])
    again = ms.compare(zoo[NAMES[0]], few, name=NAMES[0], device="cuda", progress=False)
    names = {"source": NAMES[0], "target": NAMES[1:]}
    same = again.adversarial_prediction.sel(names) == gpu.adversarial_prediction.sel(names)
    assert same.mean() >= 0.98


def test_gpu_is_faster_than_the_cpu():
    network, images = ms.load_zoo(names=NAMES)[NAMES[0]], ms.fashion_mnist("test", n=500)

    def seconds(device):
        network.to(device)
        x, y, runs = images.images.to(device), images.labels.to(device), []
        for steps in (2, 10, 10, 10):
            start = time.perf_counter()
            ms.pgd(network, x, y, steps=steps).cpu()
            runs.append(time.perf_counter() - start)
        return np.median(runs[1:])

    assert seconds("cuda") < seconds("cpu")


@pytest.mark.skipif(find_spec("dask_cuda") is None, reason="no dask-cuda here")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")
def test_each_of_two_workers_has_a_gpu_of_its_own_and_makes_the_study_of_one(tmp_path):
    seen = {}
    side_by_side(visible, None, [0, 1, 2, 3], seen.__setitem__, workers=2, device="cuda")
    assert len(set(seen.values())) == 2
    given = dict(zoo=tiny.zoo(), images=tiny.image_set(), device="cuda", progress=False)
    one, two = (ms.transfer(out=tmp_path / str(n), workers=n, **given) for n in (1, 2))
    assert (two.adversarial_prediction == one.adversarial_prediction).mean() >= 0.95


def visible(_, item):
    time.sleep(1)
    return str(torch.cuda.get_device_properties(0).uuid)
