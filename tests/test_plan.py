"""What a study will cost."""

import importlib
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch import nn
from typer.testing import CliRunner

import modelsim as ms
from modelsim.__main__ import app
from modelsim.pretrained import at_full_size

planning = importlib.import_module("modelsim.plan")  # whose name in the package is the function's


class Counting(nn.Module):
    """Counts the images that pass, and those of them whose gradient is taken."""

    def __init__(self):
        super().__init__()
        self.inside = tiny.linear(1)
        self.forward_only, self.with_gradient = [], []

    def forward(self, x):
        (self.with_gradient if x.requires_grad else self.forward_only).append(len(x))
        return self.inside(x)


class Fake(nn.Module):
    """So many multiplications and additions an image."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.head = nn.Linear(4, width, bias=False), nn.Linear(width, 3, bias=False)

    def forward(self, x):
        return self.head(self.layer(x.flatten(1)))


WIDTHS = {f"width {width}": width for width in (1, 2, 4, 8, 16, 32, 64, 128)}


@pytest.fixture
def exact(monkeypatch):
    """A clock by which a network takes as long as its width says, and a timing a second."""
    timed = []

    def seconds(classifier, canvas):
        timed.append(width := classifier.head.in_features)
        return {"forward": width * 1e-3, "gradient": width * 2e-3}

    monkeypatch.setattr(planning, "_seconds_an_image", seconds)
    monkeypatch.setattr(planning.time, "perf_counter", lambda: float(len(timed)))
    return timed


def planned(**changed):
    given = dict(images=10, steps=5, test_images=7, progress=False)
    return ms.plan(lambda name: Fake(WIDTHS[name]), list(WIDTHS), (1, 2, 2), **(given | changed))


def test_time_is_that_of_all_passes(exact):
    table = planned(seconds=100)
    width = np.array(list(WIDTHS.values()))
    np.testing.assert_allclose(table.attack, 2e-3 * width * 10 * 6)
    np.testing.assert_allclose(table.evaluations, 1e-3 * width * (10 * 9 + 7 + 180))
    np.testing.assert_allclose(table.operations, 2 * width * (4 + 3))
    np.testing.assert_allclose(table.parameters, width * 7)
    assert sorted(exact) == sorted(width)


def test_calibration_spans_the_networks_and_ends_in_time_and_the_rest_is_foretold(exact):
    table = planned(seconds=4)
    assert exact == [1, 16, 4, 64]
    assert table.timed.sum() == 4
    np.testing.assert_allclose(table.forward, 1e-3 * np.array(list(WIDTHS.values())), rtol=0.3)
    assert (table.forward[table.timed] == [1e-3, 4e-3, 16e-3, 64e-3]).all()


def test_no_network_is_foretold_a_faster_pace_than_any_had(exact, monkeypatch):
    """Where a network of twice the operations takes hardly longer, as far as it was timed."""

    def seconds(classifier, canvas):
        exact.append(width := classifier.head.in_features)
        return dict.fromkeys(("forward", "gradient"), width**0.1)

    monkeypatch.setattr(planning, "_seconds_an_image", seconds)
    table = planned(seconds=4)
    assert not table.timed["width 128"]
    pace = table.operations / table.forward
    assert pace["width 128"] == pytest.approx(pace["width 64"])


@pytest.mark.parametrize(
    ("attacks", "devices", "expected"), [([1, 1, 4], 2, 5), ([4, 1, 1], 2, 4), ([1, 2, 3], 1, 6), ([5], 8, 5)]
)
def test_devices_side_by_side_wait_for_the_last_source(attacks, devices, expected):
    table = pd.DataFrame({"attack": attacks, "evaluations": 0.0})
    assert planning.side_by_side_seconds(table, devices) == expected
    # Each source's images are shown to all networks.
    longer = planning.side_by_side_seconds(table.assign(evaluations=range(len(table))), 1)
    assert longer == sum(attacks) + sum(range(len(table)))


def test_a_study_makes_the_passes_that_the_plan_counts(tmp_path):
    """For each network: what is shown to it, and how often a gradient is taken."""
    n, steps, n_tested = 12, 3, 24
    zoo = {name: Counting() for name in ("one", "two", "three")}
    tested = tiny.image_set(n_tested, seed=1)
    tiny.transfer(tmp_path, zoo=zoo, fold=False, batch_size=n, test_images=tested)
    for network in zoo.values():
        assert sum(network.with_gradient) == n * (steps + 1)
        # Beside these a few images, to see that it works: eight on loading, one an attack.
        shown = n * (len(zoo) + 1) + n_tested + 3 * n
        assert 0 <= sum(network.forward_only) - shown <= 10


def test_perturbations_of_a_picture_without_black_take_what_is_foretold(tmp_path):
    grey = 0.2 + 0.6 * torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids, labels = tuple("abcdefgh"), torch.arange(8) % 3
    images = ms.ImageSet(grey, labels, ids, tiny.CLASSES, "grey")
    zoo = {"one": tiny.linear(0, pixels=3 * 64 * 64)}
    attack = partial(ms.pgd, eps=8 / 255, steps=3)
    ms.transfer(zoo, images, attack, tmp_path, device="cpu", progress=False)
    found = sum(file.stat().st_size for file in (tmp_path / "study.zarr" / "perturbation").glob("c*"))
    given = dict(names=["one"], canvas=(3, 64, 64), images=8, seconds=0, progress=False)
    table = ms.plan(lambda name: tiny.linear(0, pixels=3 * 64 * 64), **given)
    assert table.perturbation.sum() == pytest.approx(found, rel=0.25)


def test_activations_are_what_is_kept_for_the_gradient():

    def build(name):
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.GELU(), nn.Linear(5, 3))

    table = ms.plan(build, ["one"], (3, 2, 2), images=1, seconds=0, progress=False)
    assert table.activations.item() == 4 * 5  # the input of GELU; no weight takes a gradient


@pytest.mark.parametrize(("name", "side"), [("tf_efficientnet_lite1", 240), ("vit_small_patch16_224", 224)])
def test_network_of_full_size_is_traced_at_its_own_input(name, side):
    with torch.device("meta"):
        assert at_full_size(name).input_size == side
    traced = planning._traced(at_full_size, name, (3, 224, 224))
    # Multiply-accumulates as timm's own tables of results have them, in units of 10⁹.
    published = {"tf_efficientnet_lite1": 0.62, "vit_small_patch16_224": 4.25}
    assert traced["operations"] / 2e9 == pytest.approx(published[name], rel=0.1)


def test_command_tells_time_storage_and_memory(tmp_path):
    line = f"plan resmlp_24_224 gmlp_s16_224 --images 20 --steps 2 --csv {tmp_path / 'plan.csv'}"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    assert re.search(r"all +00:0.*2 of 2 networks were timed on this cpu.*\neight such", result.output, re.S)
    table = pd.read_csv(tmp_path / "plan.csv", index_col=0)
    assert list(table.index) == ["resmlp_24_224", "gmlp_s16_224"]
    assert table.threads.eq(torch.get_num_threads()).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("resnet51", "resnet51"),
        ("--zoo imagenet69 resnet51", "resnet51"),
        ("resnet50 --steps 0", "greater than or equal to 1"),
        ("--zoo nonsense", "unknown study 'nonsense'"),
    ],
)
def test_what_can_not_be_planned_is_one_line(line, message):
    result = CliRunner().invoke(app, ["plan", *line.split()])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_before_anything_is_traced():
    with pytest.raises(ValueError, match="there is no GPU"):
        ms.plan(ms.build, ["resnet50"], (1, 28, 28), images=1, device="cuda")
