"""What only a GPU can prove; skipped where there is none."""

import statistics
import time

import numpy as np
import pytest
import torch

import modelsim as ms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

NAMES = ["resnet50", "convnext_tiny", "deit_small_patch16_224"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same study, made on the CPU and on the GPU."""
    zoo, images = ms.load_zoo(names=NAMES), ms.fashion_mnist("test", n=200)
    folder = tmp_path_factory.mktemp("gpu")
    return [
        ms.transfer(zoo, images, out=folder / device, device=device, progress=False)
        for device in ("cpu", "cuda")
    ]


def test_gpu_predicts_what_the_cpu_predicts(both):
    cpu, gpu = both
    assert (cpu.clean_prediction == gpu.clean_prediction).mean() >= 0.99
    # Random starts are drawn on the device, so adversarial images differ, and a few outcomes with them.
    assert (cpu.adversarial_prediction == gpu.adversarial_prediction).mean() >= 0.9


def test_score_of_the_gpu_lies_within_the_interval_of_the_cpu(both):
    cpu, gpu = both
    bounds = ms.interval(cpu, level=0.99)
    inside = (ms.sat(gpu) >= bounds.sel(bound="low")) & (ms.sat(gpu) <= bounds.sel(bound="high"))
    assert inside.values[~np.eye(len(NAMES), dtype=bool)].all()


def test_compare_on_the_gpu_finds_what_is_in_the_study(both):
    few = both[1].sel(source=NAMES[1:], target=NAMES[1:])
    again = ms.compare(ms.load_zoo(names=NAMES)[NAMES[0]], few, name=NAMES[0], device="cuda", progress=False)
    stored = both[1].adversarial_prediction.sel(source=NAMES[0], target=NAMES[1:])
    same = again.adversarial_prediction.sel(source=NAMES[0], target=NAMES[1:]) == stored
    assert same.mean() >= 0.98


def test_memory_is_given_back_and_the_networks_stay_where_they_were(tmp_path):
    zoo = {name: ms.load_zoo(names=NAMES)[name] for name in NAMES}
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    ms.transfer(zoo, ms.fashion_mnist("test", n=50), out=tmp_path, device="cuda", progress=False)
    assert torch.cuda.memory_allocated() - before < 2**20
    assert {p.device.type for network in zoo.values() for p in network.parameters()} == {"cpu"}


def test_gpu_is_faster_than_the_cpu():
    network, images = ms.load_zoo(names=NAMES)[NAMES[0]], ms.fashion_mnist("test", n=500)

    def seconds(device):
        on_device = network.to(device)
        x, y = images.images.to(device), images.labels.to(device)
        ms.pgd(on_device, x, y, steps=2)
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            ms.pgd(on_device, x, y, steps=10).cpu()
            runs.append(time.perf_counter() - start)
        return statistics.median(runs)

    assert seconds("cuda") < seconds("cpu")
