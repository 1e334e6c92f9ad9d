"""What the page on one's own network computes beside the package."""

import re

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from pages import BOOK, code_cells, markdown, page
from torch import nn

import modelsim as ms

PAGE = page("your_network")


def test_lead_is_the_difference_of_two_means():
    row = pd.DataFrame({"base": ["NAS", "CNN", "NAS", "Hybrid"], "relative SAT": [1.0, 0.0, 3.0, 1.0]})
    assert PAGE.lead(row, "NAS") == 2 - 0.5


def test_estimate_of_a_training_leaves_the_network_as_it_was_and_grows_with_its_steps(monkeypatch):
    network = ms.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), input_size=8)
    before = network.network[1].weight.clone()
    clock = iter([0.0, 3.0, 0.0, 3.0])
    monkeypatch.setattr(PAGE.time, "perf_counter", lambda: next(clock))
    assert PAGE.minutes_to_train(network, 100, tried=5) == pytest.approx(1.0)  # 3 s for 5 steps
    assert PAGE.minutes_to_train(network, 300, tried=5) == pytest.approx(3.0)
    assert torch.equal(network.network[1].weight, before)


def test_what_somebody_else_might_have_written_says_what_the_zoo_says():
    classifier = ms.load_zoo(names=["resnet50"])["resnet50"]
    x = ms.fashion_mnist("test", n=20).images
    with torch.no_grad():
        torch.testing.assert_close(PAGE.Plain(classifier.network)(x), classifier(x))


def test_every_cell_runs_with_a_module_of_ones_own_in_the_cell_to_change(monkeypatch):
    """Word for word what *Adapt this* says; against every third network, so that it takes seconds."""
    cells = code_cells("your_network")
    (adapted,) = re.findall(r"```python\n(NAME = .*?)```", markdown(BOOK / "your_network.ipynb"), re.S)
    (place,) = (k for k, cell in enumerate(cells) if cell.startswith("NAME = "))
    whole, names = ms.first_seeds, [*ms.CATALOGUE][::3]
    monkeypatch.setattr(ms, "first_seeds", lambda study: whole(study).sel(source=names, target=names))
    glued = {}
    monkeypatch.setattr("myst_nb.glue", lambda key, value, **_: glued.update({key: value}))
    space = {"display": print}
    for cell in [*cells[:place], adapted, *cells[place + 1 :]]:
        exec(compile(cell, "your_network.ipynb", "exec"), space)
    plt.close("all")
    assert space["mine"] is space["short"]
    assert ms.accuracy(space["mine"], ms.fashion_mnist("test", n=1000)) > 0.7
    assert space["extended"].source.values.tolist() == [*names, "mine"]
    assert float(glued["yn_accuracy"].rstrip("%")) > 70
