"""What the page on one's own network computes beside the package."""

import pandas as pd
import pytest
import torch
from pages import page
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
