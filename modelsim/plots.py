"""Figures. Each function draws on an Axes (or makes a figure where it needs several) and returns it."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import cdist, squareform
from sklearn.manifold import MDS

from modelsim.clustering import distance

Labels: TypeAlias = Mapping[str, Any] | pd.Series
"""A label for every model, such as its base or its cluster; a model without one is drawn grey."""

BASE_COLOURS: Mapping[str, str] = {
    "CNN": "#0072B2", "Transformer": "#D55E00", "MLP-Mixer": "#009E73", "Hybrid": "#CC79A7", "NAS": "#E69F00",
}  # fmt: skip
"""One colour a base architecture (Okabe and Ito's, told apart by colour-blind readers)."""

UNLABELLED = "without a label"
_GREY = "#999999"
_MOST_NUMBERS = 16  # models up to which a matrix is drawn with its numbers, and a map with all names
_MOST_NAMES = 40  # models up to which a matrix is drawn with their names


def label_colours(labels: Iterable[Any]) -> dict[Any, str]:
    """Return a colour for every label: a base's own, the others' from a palette, in the order of their names.

    Examples
    --------
    >>> label_colours(["CNN", "NAS"])
    {'CNN': '#0072B2', 'NAS': '#E69F00'}
    """
    present = set(labels)
    others = sorted((label for label in present if label not in BASE_COLOURS and pd.notna(label)), key=str)
    palette = sns.color_palette("husl", len(others)).as_hex()
    bases = {base: colour for base, colour in BASE_COLOURS.items() if base in present}
    return bases | dict(zip(others, palette, strict=True))


def legend_for_groups(ax: Axes, groups: Iterable[Any], **options: Any) -> None:
    """Add a legend entry for every label among `groups`; None and NaN are models without one."""
    groups = list(groups)
    for label, colour in label_colours(groups).items():
        ax.scatter([], [], color=colour, label=str(label))
    if any(pd.isna(label) for label in groups):
        ax.scatter([], [], color=_GREY, label=UNLABELLED)
    ax.legend(frameon=False, **options)


def _labels_and_colours(models: Iterable[str], groups: Labels) -> tuple[list[Any], list[str]]:
    labels = [groups.get(name) for name in models]
    colours = label_colours(labels)
    return labels, [colours.get(label, _GREY) for label in labels]


def clustered_heatmap(similarity: xr.DataArray, groups: Labels) -> Figure:
    """Draw a similarity matrix in the order of its average-linkage tree.

    Up to 16 models have their numbers and up to 40 their names; of more, the strips tell the groups.

    Parameters
    ----------
    similarity : DataArray
        Symmetric, such as SAT.
    groups : mapping or Series
        Label of every model, such as its base, for the coloured strips; a model without one is grey.
    """
    frame = similarity.to_pandas()
    links = linkage(squareform(distance(similarity).values, checks=False), "average", optimal_ordering=True)
    labels, colours = _labels_and_colours(frame.index, groups)
    strip = pd.Series(colours, frame.index, name="")
    trees = {"row_linkage": links, "col_linkage": links, "row_colors": strip, "col_colors": strip}
    numbers = {"annot": len(frame) <= _MOST_NUMBERS, "fmt": ".1f", "annot_kws": {"size": 8}}
    ticks = dict.fromkeys(["xticklabels", "yticklabels"], len(frame) <= _MOST_NAMES)
    bar = {"cbar_pos": (0.03, 0.84, 0.03, 0.13), "cbar_kws": {"label": str(similarity.name)}}
    most = similarity.values[~np.eye(len(frame), dtype=bool)].max()
    shape = {"vmax": most, "figsize": (7, 7), "dendrogram_ratio": 0.14}
    grid = sns.clustermap(frame, cmap="mako", **trees, **numbers, **ticks, **bar, **shape)
    grid.ax_heatmap.set(xlabel="", ylabel="")
    grid.ax_heatmap.tick_params(labelsize=min(10, 320 / len(frame)))
    grid.ax_row_colors.set(xticks=[])
    grid.ax_col_colors.set(yticks=[])
    legend_for_groups(grid.ax_col_dendrogram, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return grid.figure


def model_map(
    similarity: xr.DataArray, groups: Labels, ax: Axes | None = None, *, names: bool | Collection[str] = True
) -> Axes:
    """Place models in the plane, as far apart as they are dissimilar (metric MDS); colour by base.

    Parameters
    ----------
    similarity : DataArray
        Symmetric, such as SAT.
    groups : mapping or Series
        Label of every model, such as its base or its cluster; a model without one is grey.
    ax : Axes, optional
        Where to draw.
    names : bool or collection of str
        Whose names to write. True is all of up to 16 models; of more, the one nearest to the middle of
        each label.
    """
    ax = ax or plt.subplots(figsize=(6.5, 5.5), layout="constrained")[1]
    # Started from the classical solution, nothing in it is random.
    scaling = MDS(2, metric="precomputed", init="classical_mds", n_init=1, normalized_stress=True)
    points: NDArray[np.floating] = scaling.fit_transform(distance(similarity).values)
    models = [str(name) for name in similarity[similarity.dims[0]].values]
    labels, colours = _labels_and_colours(models, groups)
    ax.scatter(points[:, 0], points[:, 1], s=90, c=colours, edgecolors="white", linewidths=0.8)
    if isinstance(names, bool):
        names = _few_names(models, points, labels) if names else []
    _write_names(ax, dict(zip(models, points, strict=True)), names)
    ax.set(xlabel=f"log units of {similarity.name}", ylabel=f"log units of {similarity.name}")
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.25 if len(names) else 0.05, 0.08)
    legend_for_groups(ax, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return ax


def _few_names(models: list[str], points: NDArray[np.floating], labels: list[Any]) -> list[str]:
    if len(models) <= _MOST_NUMBERS:
        return models
    table = pd.DataFrame(points, models).groupby(labels)
    off = pd.DataFrame(points, models) - table.transform("median")
    return (off**2).sum(axis=1).groupby(labels).idxmin().tolist()


def _write_names(ax: Axes, places: Mapping[str, NDArray[np.floating]], names: Iterable[str]) -> None:
    """Write each name on the side of its point where the nearest other point is farthest."""
    points = np.array(list(places.values())) * [1, 4]  # names are wide: what is at one height is in the way
    width = np.ptp(points[:, 0]) / 8
    for name in names:
        x, y = places[name]
        right, left = cdist([[x + width, 4 * y], [x - width, 4 * y]], points).min(axis=1)
        shift, side = ((7, -3), "left") if right > left else ((-7, -3), "right")
        text = ax.annotate(name, (x, y), xytext=shift, textcoords="offset points", ha=side, fontsize=9)
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
