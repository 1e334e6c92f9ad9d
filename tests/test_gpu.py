"""What only a GPU can prove; skipped where there is none."""

import time
from importlib.util import find_spec

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import modelsim as ms
from modelsim.images import to_canvas
from modelsim.transfer import Engine, _tensors
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


def test_255ths_on_the_gpu_are_those_of_the_cpu_to_the_bit():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_canvas(pixels.to("cuda")).cpu(), to_canvas(pixels))


@pytest.mark.parametrize("on_gpu", [0, 1, 2])
def test_networks_beyond_the_room_on_the_gpu_wait_in_memory_and_are_loaded_once(on_gpu, monkeypatch):
    images, loads = ms.fashion_mnist("test", n=50), []
    zoo = ms.Zoo(NAMES, lambda name: loads.append(name) or ms.load_zoo(names=NAMES)[name])
    plain = Engine(zoo, images, ms.fgsm, 250, "cuda")
    expected = {name: plain.first_predictions(name) for name in NAMES}
    assert {p.device.type for name in NAMES for p in plain.network(name).parameters()} == {"cuda"}
    taken = [sum(t.numel() * t.element_size() for t in _tensors(plain.network(name))) for name in NAMES]
    free = 2 * sum(taken[:on_gpu])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    loads.clear()
    engine = Engine(zoo, images, ms.fgsm, 250, "cuda")
    for name in 2 * NAMES:
        assert np.array_equal(engine.first_predictions(name), expected[name])
    kept = [next(engine._kept[name].parameters()).device.type for name in NAMES]
    assert (kept, loads) == (["cuda"] * on_gpu + ["cpu"] * (3 - on_gpu), NAMES)


def test_gradients_are_taken_in_parts_when_the_memory_of_the_gpu_runs_out():
    network = nn.Sequential(
        nn.Conv2d(1, 512, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(512 * 784, 10)
    )
    images = ms.fashion_mnist("test", n=100)
    network, x, y = network.to("cuda"), images.images.to("cuda"), images.labels.to("cuda")
    expected = ms.attacks.input_gradients(network, x, y)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # An image takes 3 to 6 MB here, and libraries some.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**27) / total)
    try:
        found = ms.attacks.input_gradients(network, x, y)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < ms.attacks._GRADIENTS[network] < 100
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_precision_is_that_of_the_networks():
    images, name = ms.fashion_mnist("test", n=50), "resnet50"
    told = {
        setting: Engine(ms.load_zoo(names=NAMES), images, ms.fgsm, 250, *setting).logits(name, images.pixels)
        for setting in [("cpu", True, 2, "fp32"), *(("cuda", True, 2, p) for p in ("fp32", "tf32", "bf16"))]
    }
    exact, *others = told.values()
    plain, tf32, bf16 = ((other - exact).abs().max() / exact.abs().max() for other in others)
    assert plain < 1e-4 < bf16 < 0.1
    assert plain <= tf32 < bf16
