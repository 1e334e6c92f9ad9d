from itertools import pairwise

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from test_clustering import BLOCKS, from_points, matrix, planted

from modelsim import plots
from modelsim.clustering import embed

GROUPS = {f"m{i}": ("CNN", "Transformer", "Hybrid")[block] for i, block in enumerate(BLOCKS)}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def cell_texts(ax):
    """Text of every cell by the names of its row and column."""
    rows, columns = (
        {
            tick: label.get_text()
            for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        }
        for axis in (ax.yaxis, ax.xaxis)
    )
    return {(rows[t.get_position()[1]], columns[t.get_position()[0]]): t.get_text() for t in ax.texts}


def test_heatmap_writes_every_number_into_its_cell():
    values = np.array([[4.0, 1.25, -2.5], [3.0, 2.0, 0.125]])
    rates = xr.DataArray(
        values, {"source": ["a", "b"], "target": ["x", "y", "z"]}, ("source", "target"), name="rate"
    )
    ax = plots.heatmap(rates)
    expected = {
        (row, column): f"{values[i, j]:.2f}" for i, row in enumerate("ab") for j, column in enumerate("xyz")
    }
    assert cell_texts(ax) == expected
    assert ax.yaxis_inverted()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("target", "source")


def test_heatmap_leaves_a_missing_number_blank():
    ax = plots.heatmap(matrix([[1.0, np.nan], [np.nan, 2.0]]))
    assert cell_texts(ax) == {("m0", "m0"): "1.00", ("m1", "m1"): "2.00"}


def test_heatmap_draws_on_the_axes_it_is_given():
    _, ax = plt.subplots()
    assert plots.heatmap(planted(), ax) is ax
    assert len(ax.texts) == 81


def test_clustered_heatmap_puts_planted_blocks_together_with_their_numbers():
    similarity = planted()
    figure = plots.clustered_heatmap(similarity, GROUPS)
    ax = next(ax for ax in figure.axes if len(ax.texts) == 81)
    order = [label.get_text() for label in ax.get_yticklabels()]
    assert sorted(order) == sorted(similarity.model.values)
    blocks = [BLOCKS[int(name[1:])] for name in order]
    assert sum(a != b for a, b in pairwise(blocks)) == 2
    for (row, column), text in cell_texts(ax).items():
        assert text == f"{float(similarity.sel(model=row, other=column)):.1f}"


def test_map_puts_every_name_and_its_colour_where_the_embedding_says():
    similarity = from_points(np.random.default_rng(0).normal(size=(9, 2)))
    ax, places = plots.model_map(similarity, GROUPS), embed(similarity)
    named = {text.get_text(): text.xy for text in ax.texts}
    drawn = {
        tuple(dots.get_offsets()[0]): tuple(dots.get_facecolor()[0])
        for dots in ax.collections
        if len(dots.get_offsets())
    }
    assert len(drawn) == 9
    for name, place in zip(places.model.values, places.values, strict=True):
        assert tuple(named[name]) == tuple(place)
        assert drawn[tuple(place)] == to_rgba(plots.BASE_COLOURS[GROUPS[name]])
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(legend) == ["CNN", "Hybrid", "Transformer"]


def test_pairs_are_ordered_by_score_with_the_most_similar_on_top():
    score = matrix([[4.6, 1.0, 3.0, 2.0], [1.0, 4.6, 1, 1], [3.0, 1, 4.6, 1], [2.0, 1, 1, 4.6]])
    bounds = xr.concat([score - 0.25, score + 0.5], xr.IndexVariable("bound", ["low", "high"]))
    ax = plots.pairs_with_intervals(score, bounds, "m0")
    points, _, (bars,) = ax.containers[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["m1", "m3", "m2"]
    assert points.get_xdata().tolist() == [1.0, 2.0, 3.0]
    assert not ax.yaxis_inverted()
    ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert ends == [[0.75, 1.5], [1.75, 2.5], [2.75, 3.5]]


def test_image_grid_draws_the_pixels_of_every_row_and_column():
    clean, change = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4) - 0.7
    figure = plots.image_grid({"clean": clean, "change": change}, ["a", "b", "c"], symmetric={"change"})
    drawn = [ax.images[0] for ax in figure.axes]
    for image, expected in zip(drawn, [*clean, *change], strict=True):
        np.testing.assert_array_equal(image.get_array(), expected[0].numpy())
    assert {image.get_clim() for image in drawn[:3]} == {(0.0, 1.0)}
    limit = float(change.abs().max())
    assert {image.get_clim() for image in drawn[3:]} == {(-limit, limit)}
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["clean", "", "", "change", "", ""]


def test_feature_maps_are_drawn_in_proportion_to_side_and_channels():
    # A quarter of the side is half as high, a quarter of the channels half as wide.
    network = torch.nn.Identity()
    network.feature_info = [
        {"num_chs": 16, "reduction": 1, "module": "stem"},
        {"num_chs": 64, "reduction": 4, "module": "stages"},
    ]
    ax = plots.feature_maps(network, 32)
    first, second = ax.patches
    assert first.get_height() == pytest.approx(2 * second.get_height())
    assert first.get_width() == pytest.approx(second.get_width() / 2)
    assert [text.get_text() for text in ax.texts] == ["32²\n×16", "8²\n×64"]


def test_scatter_shows_each_pair_once_and_colours_pairs_of_one_base():
    values = np.arange(16.0).reshape(4, 4)
    first = matrix(values + values.T)
    names = list(first.model.values)
    second = (10 * first).sel(model=names[::-1], other=names[::-1])
    ax = plots.agreement_scatter(first, second, dict.fromkeys(names[:3], "CNN") | {names[3]: "NAS"})
    mixed, convolutional = (np.asarray(points.get_offsets()) for points in ax.collections)
    assert len(mixed) == len(convolutional) == 3
    everything = np.vstack([mixed, convolutional])
    assert np.allclose(everything[:, 1], 10 * everything[:, 0])
    colours = [to_rgba(points.get_facecolors()[0]) for points in ax.collections]
    assert colours[1] == to_rgba(plots.BASE_COLOURS["CNN"])
    assert colours[0] != colours[1]
