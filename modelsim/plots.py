"""Figures. Each function draws on an Axes (or makes a figure where it needs several) and returns it."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from modelsim import clustering
from modelsim.scores import pairs

BASE_COLOURS: Mapping[str, str] = {
    "CNN": "#0072B2",
    "Transformer": "#D55E00",
    "MLP-Mixer": "#009E73",
    "Hybrid": "#CC79A7",
    "NAS": "#E69F00",
}
"""One colour a base architecture (Okabe and Ito's, told apart by colour-blind readers)."""

_MOST_NUMBERS = 16
"""Models up to which a matrix is drawn with its numbers."""


def heatmap(
    matrix: xr.DataArray,
    ax: Axes | None = None,
    *,
    fmt: str = ".2f",
    label: str | None = None,
    cmap: str = "mako",
) -> Axes:
    """Draw a labelled matrix, rows from top to bottom, with its numbers where there is room for them."""
    numbers = max(matrix.shape) <= _MOST_NUMBERS
    width, height = (0.5, 0.42) if numbers else (0.14, 0.13)
    ax = ax or plt.subplots(figsize=(width * matrix.shape[1] + 2.4, height * matrix.shape[0] + 1.6))[1]
    title = label or str(matrix.name)
    sns.heatmap(
        matrix.to_pandas(),
        ax=ax,
        annot=numbers,
        fmt=fmt,
        xticklabels=True,
        yticklabels=True,
        cmap=cmap,
        cbar_kws={"label": title},
        annot_kws={"size": 8},
    )
    ax.set(xlabel=matrix.dims[1], ylabel=matrix.dims[0])
    ax.tick_params(axis="x", rotation=45 if numbers else 90)
    if numbers:
        plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    else:
        ax.tick_params(labelsize=6)
    return ax


def clustered_heatmap(similarity: xr.DataArray, groups: Mapping[str, str]) -> Figure:
    """Draw a similarity matrix in the order of its average-linkage tree.

    Parameters
    ----------
    similarity : DataArray
        Symmetric, such as SAT.
    groups : mapping
        Base of every model, for the coloured strips.
    """
    frame = similarity.to_pandas()
    links = clustering.tree(similarity)
    colours = pd.Series({name: BASE_COLOURS[groups[name]] for name in frame.index}, name="base")
    off_diagonal = similarity.values[~np.eye(len(frame), dtype=bool)]
    grid = sns.clustermap(
        frame,
        row_linkage=links,
        col_linkage=links,
        row_colors=colours,
        col_colors=colours,
        cmap="mako",
        vmax=off_diagonal.max(),
        figsize=(9, 9),
        annot=len(frame) <= _MOST_NUMBERS,
        fmt=".1f",
        annot_kws={"size": 8},
        xticklabels=True,
        yticklabels=True,
        dendrogram_ratio=0.14,
        cbar_pos=(0.02, 0.85, 0.03, 0.13),
        cbar_kws={"label": str(similarity.name)},
    )
    grid.ax_heatmap.set(xlabel="", ylabel="")
    grid.ax_heatmap.tick_params(labelsize=min(10, 420 / len(frame)))
    legend_for_groups(grid.ax_col_dendrogram, groups.values(), loc="center left", bbox_to_anchor=(1.0, 0.5))
    return grid.figure


def legend_for_groups(ax: Axes, groups: Iterable[str], **options: Any) -> None:
    """Add one legend entry for every base among `groups`."""
    present = set(groups)
    for base, colour in BASE_COLOURS.items():
        if base in present:
            ax.scatter([], [], color=colour, label=base)
    ax.legend(frameon=False, **options)


def model_map(
    similarity: xr.DataArray,
    groups: Mapping[str, str],
    ax: Axes | None = None,
    *,
    method: Literal["mds", "tsne"] = "mds",
    names: bool = True,
    seed: int = 0,
) -> Axes:
    """Place models in the plane, near where they are similar; colour by base.

    Parameters
    ----------
    similarity : DataArray
        Symmetric, such as SAT.
    groups : mapping
        Base of every model.
    ax : Axes, optional
        Where to draw.
    method : {"mds", "tsne"}
        MDS keeps distances, t-SNE neighbours.
    names : bool
        Write the names beside the points; better not for dozens.
    seed : int
        Of the embedding.
    """
    ax = ax or plt.subplots(figsize=(8, 6))[1]
    place = clustering.embed(similarity, method=method, seed=seed)
    points = place.values
    stretched = points * [1, 4]  # names are wide: points at one height are the ones in each other's way
    apart = cdist(stretched, stretched) + np.diag(np.full(len(points), np.inf))
    models = similarity[similarity.dims[0]].values
    for name, point, nearest in zip(models, points, apart.argmin(0), strict=True):
        ax.scatter(point[0], point[1], s=70, color=BASE_COLOURS[groups[name]])
        if not names:
            continue
        # The name goes on the side away from the nearest other point, so that few overlap.
        shift, side = ((7, -3), "left") if point[0] > points[nearest, 0] else ((-7, -3), "right")
        ax.annotate(name, point, xytext=shift, textcoords="offset points", ha=side, fontsize=8)
    if method == "mds":
        ax.set(xlabel="log units of SAT", ylabel="log units of SAT")
    else:
        ax.set(xticks=[], yticks=[])
    ax.set_aspect("equal")
    ax.margins(0.38 if names else 0.05, 0.12)
    beside = {} if names else {"bbox_to_anchor": (1, 1), "fontsize": 8}
    legend_for_groups(ax, groups.values(), loc="best" if names else "upper left", **beside)
    return ax


def pairs_with_intervals(
    score: xr.DataArray, bounds: xr.DataArray, model: str, ax: Axes | None = None, *, most: int | None = None
) -> Axes:
    """Draw one model's score with others (the `most` similar only), with intervals, most similar on top."""
    row = score.sel({score.dims[0]: model}).drop_sel({score.dims[1]: model})
    row = row[np.argsort(row.values)][-most if most else None :]
    low, high = bounds.sel({score.dims[0]: model, score.dims[1]: row[score.dims[1]].values}).values
    ax = ax or plt.subplots(figsize=(7, 0.32 * len(row) + 1.2))[1]
    names = row[score.dims[1]].values
    ax.errorbar(row.values, names, xerr=[row.values - low, high - row.values], fmt="o", capsize=3)
    ax.set(xlabel=f"{score.name} with {model}")
    ax.grid(axis="x", alpha=0.3)
    return ax


def image_grid(
    rows: Mapping[str, Tensor], titles: list[str] | None = None, *, symmetric: set[str] | None = None
) -> Figure:
    """Draw rows of images, one column an image.

    Parameters
    ----------
    rows : mapping
        Row title to a canvas (n, 1, height, width).
    titles : list of str, optional
        One a column.
    symmetric : set of str, optional
        Rows that hold signed changes: drawn red and blue around 0 instead of grey.
    """
    n = len(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), n, figsize=(1.25 * n + 1, 1.35 * len(rows) + 0.3), squeeze=False)
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        signed = title in (symmetric or set())
        limit = float(images.abs().max()) if signed else 1.0
        for ax, image in zip(line, images, strict=True):
            ax.imshow(
                image[0].numpy(), cmap="RdBu" if signed else "gray", vmin=-limit if signed else 0, vmax=limit
            )
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    for ax, title in zip(axes[0], titles or [], strict=False):
        ax.set_title(title, fontsize=8)
    figure.tight_layout(pad=0.4)
    return figure


def feature_maps(network: nn.Module, input_size: int, ax: Axes | None = None) -> Axes:
    """Draw the feature maps of a timm network from first to last, on the scale of its own input and width.

    Parameters
    ----------
    network : nn.Module
        With timm's `feature_info`; weights don't matter.
    input_size : int
        Side of its image, in pixels. A map as high as the axes has this side.
    ax : Axes, optional
        Where to draw.
    """
    ax = ax or plt.subplots(figsize=(7, 1.6))[1]
    maps = [(input_size / info["reduction"], info["num_chs"]) for info in cast("Any", network).feature_info]
    widest = max(channels for _, channels in maps)
    left = 0.0
    for side, channels in maps:
        width, height = (channels / widest) ** 0.5, (side / input_size) ** 0.5
        ax.add_patch(
            Rectangle((left, 0.5 - height / 2), width, height, facecolor="#9ecae1", edgecolor="white")
        )
        ax.text(left + width / 2, 0.5, f"{side:.0f}²\n×{channels}", ha="center", va="center", fontsize=7)
        left += width + 0.08
    ax.set(xlim=(-0.05, left), ylim=(0, 1), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return ax


def agreement_scatter(
    first: xr.DataArray, second: xr.DataArray, groups: Mapping[str, str], ax: Axes | None = None
) -> Axes:
    """Draw every pair of models by its value in two symmetric matrices; pairs of one group are coloured.

    Parameters
    ----------
    first, second : DataArray
        Symmetric, such as SAT in two studies; the models of both are drawn.
    groups : mapping
        Base of every model.
    ax : Axes, optional
        Where to draw.
    """
    ax = ax or plt.subplots(figsize=(6, 5))[1]
    names = [name for name in first[first.dims[0]].values if name in second[second.dims[0]].values]
    x, y = (pairs(matrix.sel(dict.fromkeys(matrix.dims, names))) for matrix in (first, second))
    bases, others = (x.index.get_level_values(end).map(groups) for end in ("model", "other"))
    one_base = bases == others
    ax.scatter(x[~one_base], y[~one_base], s=14, color="0.75", label="two bases")
    for base, colour in BASE_COLOURS.items():
        chosen = one_base & (bases == base)
        if chosen.any():
            ax.scatter(x[chosen], y[chosen], s=18, color=colour, label=f"both {base}")
    ax.legend(frameon=False, fontsize=8)
    return ax
