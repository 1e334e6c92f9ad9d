"""Which models belong together: clusters, an order and a map, all from a SAT matrix."""

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform
from sklearn.cluster import SpectralClustering
from sklearn.manifold import MDS


def check_similarity(similarity: xr.DataArray) -> None:
    """Raise unless `similarity` is a square, symmetric matrix without NaN, same names on both sides.

    Raises
    ------
    ValueError
        Naming the first model at fault.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"expected a square similarity matrix, got shape {similarity.shape}")
    rows, columns = (similarity[dim].values for dim in similarity.dims)
    if list(rows) != list(columns):
        first = next((r, c) for r, c in zip(rows, columns, strict=True) if r != c)
        raise ValueError(
            f"rows and columns must name the same models in one order: {first[0]} against {first[1]}"
        )
    values = similarity.values
    if np.isnan(values).any():
        i, j = np.argwhere(np.isnan(values))[0]
        raise ValueError(f"the similarity of {rows[i]} and {rows[j]} is NaN: leave one of them out")
    if not np.allclose(values, values.T):
        i, j = np.argwhere(~np.isclose(values, values.T))[0]
        raise ValueError(
            f"the similarity of {rows[i]} and {rows[j]} differs with their order: symmetrise it first"
        )


def spectral_clusters(similarity: xr.DataArray, n_clusters: int, *, seed: int = 0) -> xr.DataArray:
    """Cluster models on the symmetric normalised Laplacian of their similarities.

    Examples
    --------
    >>> clusters = spectral_clusters(sat(study), 3)
    >>> clusters.sel(model="resnet50")

    Parameters
    ----------
    similarity : DataArray
        Symmetric (model, other), such as SAT. Values below 0 count as 0; the diagonal doesn't count.
    n_clusters : int
        2 … number of models.
    seed : int
        Of the k-means step.

    Returns
    -------
    DataArray
        (model,), cluster numbers 0, 1, … by falling size, ties by the first member.

    Raises
    ------
    ValueError
        If the matrix is not symmetric, holds NaN, or `n_clusters` doesn't fit it.

    References
    ----------
    Ng, Jordan and Weiss, *On Spectral Clustering*, NeurIPS 2001; used on SAT in arXiv 2210.11407.
    """
    check_similarity(similarity)
    if not 2 <= n_clusters <= len(similarity):
        raise ValueError(f"n_clusters must be 2 … {len(similarity)}, the number of models; got {n_clusters}")
    if n_clusters == len(similarity):
        alone = np.arange(n_clusters)
        return similarity.isel({similarity.dims[1]: 0}, drop=True).copy(data=alone).rename("cluster")
    affinity = similarity.values.clip(min=0)
    np.fill_diagonal(affinity, 0)
    model = SpectralClustering(n_clusters, affinity="precomputed", assign_labels="kmeans", random_state=seed)
    found = model.fit_predict(affinity)
    members = [np.flatnonzero(found == k) for k in np.unique(found)]
    numbers = np.empty(len(found), dtype=int)
    for number, who in enumerate(sorted(members, key=lambda who: (-len(who), who[0]))):
        numbers[who] = number
    return similarity.isel({similarity.dims[1]: 0}, drop=True).copy(data=numbers).rename("cluster")


def distance(similarity: xr.DataArray) -> xr.DataArray:
    """Turn SAT into a distance: how far a pair is below the mean of its two diagonal entries.

    Returns
    -------
    DataArray
        Like `similarity`, 0 on the diagonal, at least 0 elsewhere, in log units.

    Raises
    ------
    ValueError
        If the matrix is not symmetric or holds NaN.
    """
    check_similarity(similarity)
    own = np.diag(similarity.values)
    values = ((own[:, None] + own[None, :]) / 2 - similarity.values).clip(min=0)
    np.fill_diagonal(values, 0)
    return similarity.copy(data=values).rename("distance")


def tree(similarity: xr.DataArray) -> NDArray[np.float64]:
    """Average-linkage tree of the models, in scipy's linkage format, leaves in their best order."""
    condensed = squareform(distance(similarity).values, checks=False)
    return np.asarray(optimal_leaf_ordering(linkage(condensed, "average"), condensed))


def embed(similarity: xr.DataArray, *, seed: int = 0) -> xr.DataArray:
    """Place the models in the plane so that distances are kept as well as a plane allows.

    Metric multidimensional scaling, started from the classical solution.

    Returns
    -------
    DataArray
        (model, axis) with axis `"x"`, `"y"`, in log units; attribute `stress`: 0 (distances kept
        exactly) … 1 (Kruskal's stress-1).

    Raises
    ------
    ValueError
        If the matrix is not symmetric or holds NaN.
    """
    apart = distance(similarity)
    scaling = MDS(
        2,
        metric="precomputed",
        metric_mds=True,
        init="classical_mds",
        n_init=1,
        normalized_stress=True,
        random_state=seed,
    )
    model = similarity.dims[0]
    return xr.DataArray(
        scaling.fit_transform(apart.values),
        {model: similarity[model].values, "axis": ["x", "y"]},
        (model, "axis"),
        name="map",
        attrs={"stress": float(scaling.stress_)},
    )
