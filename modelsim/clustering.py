"""Which models belong together: distance and spectral clusters.

Similarities are symmetric (model, other) matrices of one of two kinds, told apart by the diagonal:

- SAT, or any similarity with a zero of its own. Its *affinity*, the weight of an edge, is the value itself,
  as in the paper, or 0 if that is less; a pair's *distance* is how far it is below the mean of its two
  diagonal entries.
- A relative similarity, NaN on the diagonal, such as `relative_sat`: logs of ratios, around 0. Its affinity
  is exp(value), the ratio; a pair's distance is how far it is below the most similar pair.

A matrix that isn't square, symmetric and finite, and names or numbers that don't fit it, raise ValueError.
"""

import numpy as np
import xarray as xr
from sklearn.cluster import SpectralClustering

from modelsim.scores import Floats, check_matrix


def _check_similarity(similarity: xr.DataArray) -> None:
    """Raise unless `similarity` is symmetric and finite; its diagonal may be NaN as a whole."""
    names = check_matrix(similarity)
    if not _is_relative(similarity):
        for i in np.flatnonzero(~np.isfinite(np.diag(similarity.values))):
            raise ValueError(f"the value of {names[i]} and {names[i]} is NaN or infinite: leave it out")


def _is_relative(similarity: xr.DataArray) -> bool:
    return bool(np.isnan(np.diag(similarity.values)).all())


def affinity(similarity: xr.DataArray) -> xr.DataArray:
    """Turn a similarity into weights of edges, of the same form: 0 on the diagonal, at least 0 elsewhere."""
    _check_similarity(similarity)
    values = similarity.values
    weights: Floats = np.exp(values) if _is_relative(similarity) else values.clip(min=0)
    np.fill_diagonal(weights, 0)
    return similarity.copy(data=weights).rename("affinity")


def distance(similarity: xr.DataArray) -> xr.DataArray:
    """Turn a similarity into a distance of the same form: 0 on the diagonal, at least 0 elsewhere."""
    _check_similarity(similarity)
    values = similarity.values
    own = np.full(len(values), np.nanmax(values)) if _is_relative(similarity) else np.diag(values)
    apart = ((own[:, None] + own) / 2 - values).clip(min=0)
    np.fill_diagonal(apart, 0)
    return similarity.copy(data=apart).rename("distance")


def spectral_clusters(similarity: xr.DataArray, n_clusters: int, *, seed: int = 0) -> xr.DataArray:
    """Cluster models on the symmetric normalised Laplacian of their affinities.

    Examples
    --------
    >>> spectral_clusters(sat(study), 3).sel(model="resnet50")

    Parameters
    ----------
    similarity : DataArray
        Symmetric (model, other), SAT or relative. The diagonal doesn't count.
    n_clusters : int
        2 … number of models.
    seed : int
        Of the k-means step, the best of ten starts. Where it matters, average over several.

    Returns
    -------
    DataArray
        (model,), cluster numbers 0, 1, … by falling size, ties by the first member.

    References
    ----------
    Ng, Jordan and Weiss, NeurIPS 2001, as used on SAT in arXiv 2210.11407; as in scikit-learn, eigenvectors
    are scaled by degree (von Luxburg 2007), not rows to length 1.
    """
    weights = affinity(similarity).values
    if not 2 <= n_clusters <= len(weights):
        raise ValueError(f"n_clusters must be 2 … {len(weights)}, the number of models; got {n_clusters}")
    model = SpectralClustering(n_clusters, affinity="precomputed", random_state=seed)
    found = model.fit_predict(weights) if n_clusters < len(weights) else np.arange(n_clusters)
    members = [np.flatnonzero(found == k) for k in np.unique(found)]
    numbers = np.empty(len(found), dtype=int)
    for number, who in enumerate(sorted(members, key=lambda who: (-len(who), who[0]))):
        numbers[who] = number
    first = similarity.isel({similarity.dims[1]: 0}).reset_coords(drop=True)
    return first.copy(data=numbers).rename("cluster")
