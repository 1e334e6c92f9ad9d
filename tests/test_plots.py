from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from scipy.spatial.distance import pdist

from modelsim import plots
from modelsim.plots import BASE_COLOURS

POINTS = np.array([[0, 0], [0.4, 0], [0, 0.4], [3, 0], [3.4, 0], [3, 0.4], [0, 5], [0.4, 5], [0, 5.4]])
BASES = {f"m{i}": ["CNN", "NAS", "Hybrid"][i // 3] for i in range(8)}  # m8 has none


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def near(points=POINTS, own=6.0):
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    names = [f"m{i}" for i in range(len(points))]
    return xr.DataArray(own - apart, {"model": names, "other": names}, ("model", "other"), name="SAT")


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_clustered_heatmap_puts_planted_blocks_together_with_their_numbers():
    similarity = near()[::-1, ::-1][[0, 3, 6, 1, 4, 7, 2, 5, 8], [0, 3, 6, 1, 4, 7, 2, 5, 8]]
    figure = plots.clustered_heatmap(similarity, BASES)
    ax = next(ax for ax in figure.axes if len(ax.texts) == 81)
    order = [label.get_text() for label in ax.get_yticklabels()]
    assert sorted(order) == sorted(similarity.model.values)
    assert sum(int(a[1]) // 3 != int(b[1]) // 3 for a, b in pairwise(order)) == 2
    shown = np.reshape([float(text.get_text()) for text in ax.texts], (9, 9))
    assert shown == pytest.approx(similarity.sel(model=order, other=order).values, abs=0.051)
    assert [legend(ax) for ax in figure.axes if ax.get_legend()] == [
        ["CNN", "Hybrid", "NAS", plots.UNLABELLED]
    ]


def test_many_models_are_drawn_without_names():
    figure = plots.clustered_heatmap(near(np.random.default_rng(0).normal(size=(41, 2)), 20.0), {})
    assert not any(label.get_text().startswith("m") for ax in figure.axes for label in ax.get_yticklabels())


@pytest.mark.parametrize("labels", [BASES, pd.Series(BASES)])
def test_map_keeps_distances_and_draws_a_model_without_a_label_in_grey(labels):
    ax = plots.model_map(near(), labels)
    dots = next(dots for dots in ax.collections if len(dots.get_offsets()) == 9)
    assert pdist(dots.get_offsets()) == pytest.approx(pdist(POINTS), abs=0.01)
    expected = [*(BASE_COLOURS[base] for base in BASES.values()), plots._GREY]
    assert [tuple(colour) for colour in dots.get_facecolor()] == [to_rgba(colour) for colour in expected]
    named = {text.get_text(): text.xy for text in ax.texts}
    assert [named[f"m{i}"] for i in range(9)] == [tuple(place) for place in dots.get_offsets()]
    assert legend(ax) == ["CNN", "Hybrid", "NAS", plots.UNLABELLED]


def test_map_of_many_names_one_model_a_label_or_those_asked_for():
    similarity = near(np.vstack([POINTS, POINTS + 20]), 50.0)
    clusters = {f"m{i}": i // 9 for i in range(18)}
    texts = [plots.model_map(similarity, clusters, names=names).texts for names in (True, ["m4"], False)]
    assert [[int(text.get_text()[1:]) // 9 for text in shown] for shown in texts] == [[0, 1], [0], []]
