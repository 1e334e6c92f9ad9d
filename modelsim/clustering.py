"""Which models belong together: clusters, how firm they are, what marks them; an order and a map.

Similarities are symmetric (model, other) matrices of one of two kinds, told apart by the diagonal:

- SAT, or any similarity with a zero of its own. Its *affinity*, the weight of an edge, is the value itself,
  as in the paper, or 0 if that is less; a pair's *distance* is how far it is below the mean of its two
  diagonal entries.
- A relative similarity, NaN on the diagonal, such as `relative_sat`: logs of ratios, around 0. Its affinity
  is exp(value), the ratio; a pair's distance is how far it is below the most similar pair.

A matrix that isn't square, symmetric and finite, and names or numbers that don't fit it, raise ValueError.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage, optimal_leaf_ordering
from scipy.sparse.csgraph import laplacian
from scipy.spatial.distance import squareform
from scipy.stats import false_discovery_control, fisher_exact
from sklearn.cluster import SpectralClustering
from sklearn.manifold import MDS, TSNE
from sklearn.metrics import adjusted_rand_score, silhouette_score

from modelsim.scores import check_matrix, pairs, relative_sat, sat

Floats = NDArray[np.floating]
Labels: TypeAlias = xr.DataArray | pd.Series | Mapping[str, Any]
"""A group for every model, by name: from `spectral_clusters`, or a column of components."""


def check_similarity(similarity: xr.DataArray) -> None:
    """Raise unless `similarity` is symmetric and finite; its diagonal may be NaN as a whole."""
    names = check_matrix(similarity)
    if not _is_relative(similarity):
        for i in np.flatnonzero(~np.isfinite(np.diag(similarity.values))):
            raise ValueError(f"the value of {names[i]} and {names[i]} is NaN or infinite: leave it out")


def _is_relative(similarity: xr.DataArray) -> bool:
    return bool(np.isnan(np.diag(similarity.values)).all())


def _affinity(similarity: xr.DataArray) -> Floats:
    check_similarity(similarity)
    values = similarity.values
    weights: Floats = np.exp(values) if _is_relative(similarity) else values.clip(min=0)
    np.fill_diagonal(weights, 0)
    return weights


def distance(similarity: xr.DataArray) -> xr.DataArray:
    """Turn a similarity into a distance of the same form: 0 on the diagonal, at least 0 elsewhere."""
    check_similarity(similarity)
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
        Of the k-means step, the best of ten starts. Where it matters, look at `consensus`.

    Returns
    -------
    DataArray
        (model,), cluster numbers 0, 1, … by falling size, ties by the first member.

    References
    ----------
    Ng, Jordan and Weiss, NeurIPS 2001, as used on SAT in arXiv 2210.11407; as in scikit-learn, eigenvectors
    are scaled by degree (von Luxburg 2007), not rows to length 1.
    """
    affinity = _affinity(similarity)
    _check_number(n_clusters, similarity)
    model = SpectralClustering(n_clusters, affinity="precomputed", random_state=seed)
    found = model.fit_predict(affinity) if n_clusters < len(similarity) else np.arange(n_clusters)
    members = [np.flatnonzero(found == k) for k in np.unique(found)]
    numbers = np.empty(len(found), dtype=int)
    for number, who in enumerate(sorted(members, key=lambda who: (-len(who), who[0]))):
        numbers[who] = number
    return (
        similarity.isel({similarity.dims[1]: 0}).reset_coords(drop=True).copy(data=numbers).rename("cluster")
    )


def _check_number(n_clusters: int, similarity: xr.DataArray) -> None:
    if not 2 <= n_clusters <= len(similarity):
        raise ValueError(f"n_clusters must be 2 … {len(similarity)}, the number of models; got {n_clusters}")


def eigenvalues(similarity: xr.DataArray) -> xr.DataArray:
    """Eigenvalues of the symmetric normalised Laplacian: (number,) from 1, rising from 0 to 2 at the most.

    As many are near 0 as there are clusters well apart; if all pairs are alike, all others are n / (n - 1).
    """
    values = np.linalg.eigvalsh(laplacian(_affinity(similarity), normed=True))
    return xr.DataArray(values, {"number": np.arange(1, len(values) + 1)}, ("number",), name="eigenvalue")


def choose_k(similarity: xr.DataArray, *, max_k: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Rate every number of clusters by two criteria; the greatest value of each is its pick.

    A DataFrame with a row for each K from 2 to `max_k`: less than the number of models, 15 if not given.
    `eigengap`: eigenvalue K + 1 less eigenvalue K. `silhouette`: mean over models, by `distance`, -1 … 1.
    Neither can say that there are no clusters at all; `structure` can.

    Examples
    --------
    >>> choose_k(published_sat()).idxmax()
    """
    gaps, apart, most = np.diff(eigenvalues(similarity)), distance(similarity).values, len(similarity) - 1
    max_k = min(15, most) if max_k is None else max_k
    if not 2 <= max_k <= most:
        raise ValueError(f"max_k must be 2 … {most}, the number of models less one; got {max_k}")
    numbers = pd.RangeIndex(2, max_k + 1, name="K")
    found = [spectral_clusters(similarity, k, seed=seed).values for k in numbers]
    silhouettes = [silhouette_score(apart, labels, metric="precomputed") for labels in found]
    return pd.DataFrame({"eigengap": gaps[1:max_k], "silhouette": silhouettes}, numbers)


def resampled(
    study: xr.Dataset, score: Callable[[xr.Dataset], xr.DataArray] = sat, *, n: int = 100, seed: int = 0
) -> Iterator[xr.DataArray]:
    """Yield a study's score, such as `sat`, in `n` bootstrap samples of its images."""
    predictions = study[["label", "clean_prediction", "adversarial_prediction"]].drop_vars("image").compute()
    size, random = study.sizes["image"], np.random.default_rng(seed)
    for _ in range(n):
        yield score(predictions.isel(image=random.integers(size, size=size)))


def perturbed(
    similarity: xr.DataArray, *, scale: float | None = None, n: int = 100, seed: int = 0
) -> Iterator[xr.DataArray]:
    """Yield `n` copies with independent Gaussian noise on every pair; the diagonal stays as it is.

    `scale` is the noise's standard deviation; if not given, half that of the pairs' `relative_sat`.
    """
    before, random = _pairs(similarity), np.random.default_rng(seed)
    scale = float(_pairs(relative_sat(similarity)).std()) / 2 if scale is None else scale
    for _ in range(n):
        yield _with_pairs(similarity, before + random.normal(0, scale, len(before)))


def shuffled(similarity: xr.DataArray, *, n: int = 99, seed: int = 0) -> Iterator[xr.DataArray]:
    """Yield `n` copies without clusters: single models keep their effects, the rest changes pairs.

    The rest is `relative_sat`: that a model is similar to all others, or to none, makes no cluster.
    """
    before, random = _pairs(similarity), np.random.default_rng(seed)
    rest = _pairs(relative_sat(similarity))
    for _ in range(n):
        # Shuffling makes new effects of single models by chance. Left in, they would take from the spread
        # of the rest, and the copies would look less clustered than noise does.
        moved = _pairs(relative_sat(_with_pairs(similarity, random.permutation(rest))))
        yield _with_pairs(similarity, before - rest + moved * rest.std() / moved.std())


def _pairs(similarity: xr.DataArray) -> Floats:
    check_similarity(similarity)
    return pairs(similarity).to_numpy()


def _with_pairs(similarity: xr.DataArray, values: Floats) -> xr.DataArray:
    values = squareform(values)
    np.fill_diagonal(values, np.diag(similarity.values))
    return similarity.copy(data=values)


def consensus(similarities: Iterable[xr.DataArray], n_clusters: int, *, seed: int = 0) -> xr.DataArray:
    """Share of clusterings in which two models fall into one cluster: (model, other), 0 … 1.

    The matrices, such as from `perturbed` or `resampled`, must hold the same models. The first is clustered
    with `seed`, each further one with the next number: the luck of k-means is doubt too (Monti et al. 2003).

    Examples
    --------
    >>> together = consensus(perturbed(published_sat()), 10)
    """
    each = enumerate(similarities, start=seed)
    found = [spectral_clusters(matrix, n_clusters, seed=number).to_series() for number, matrix in each]
    if not found:
        raise ValueError("similarities must hold at least one matrix, got none")
    table = pd.concat(found, axis=1)
    for name in table.index[table.isna().any(axis=1)]:
        raise ValueError(f"every matrix must hold the same models: {name} is not in all")
    labels, names = table.to_numpy(), table.index.to_numpy()
    together = (labels[:, None] == labels).mean(axis=2)
    return xr.DataArray(together, {"model": names, "other": names}, ("model", "other"), name="consensus")


def stability(consensus: xr.DataArray, clusters: Labels) -> xr.DataArray:
    """How much more firmly each model belongs to its own cluster than to the next best: (model,), -1 … 1.

    The mean `consensus` with the others of its cluster, or 1 if it is alone, less the mean with the other
    cluster where that is greatest.
    """
    groups = _groups(clusters)
    names = groups.index.to_numpy()
    _check_known(names, consensus[consensus.dims[0]].values, "the consensus")
    shares = consensus.sel(dict.fromkeys(consensus.dims, names)).values - np.eye(len(names))
    member = pd.get_dummies(groups).to_numpy(dtype=int)
    others = member.sum(axis=0) - member
    mean = np.divide(shares @ member, others, out=np.ones(member.shape), where=others > 0)
    next_best = np.where(member, -np.inf, mean).max(axis=1)
    return xr.DataArray(mean[member == 1] - next_best, {"model": names}, ("model",), name="stability")


def _groups(labels: Labels, what: str = "the clusters") -> pd.Series:
    groups = labels.to_series() if isinstance(labels, xr.DataArray) else pd.Series(labels)
    for name in groups.index[groups.isna()]:
        raise ValueError(f"{what} must have a value for every model, but {name} has none")
    if groups.nunique() < 2:
        raise ValueError(f"{what} must have several values, but all models have {groups.unique()}")
    return groups


def _check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if known.count(name) != 1:
            raise ValueError(f"{where} must name {name} once, got {known.count(name)} times")


class ChanceTest(NamedTuple):
    """A number against what chance gives.

    `null` holds what each permutation gave; its quantiles say what is no surprise. `p_value` is that of at
    least as great a value by chance: (1 + permutations that give one) / (1 + permutations).
    """

    value: float
    null: Floats
    p_value: float


def _chance_test(value: float, by_chance: Iterable[float]) -> ChanceTest:
    null = np.fromiter(by_chance, dtype=float)
    return ChanceTest(value, null, float((1 + (null >= value).sum()) / (1 + len(null))))


def structure(
    similarity: xr.DataArray,
    n_clusters: int,
    *,
    by: Literal["eigenvalues", "stability"] = "eigenvalues",
    permutations: int = 99,
    seed: int = 0,
) -> ChanceTest:
    """Test whether there are clusters at all, against `shuffled` copies; p above 0.05 says: no clusters.

    By `"eigenvalues"`, the value is how far those from the second to number `n_clusters` are below 1, on
    average: the cut that spectral clustering seeks. By `"stability"`, it is the mean over models, from ten
    `perturbed` copies: some 20 times slower, and it misses clusters among few models. A gradual change from
    model to model is structure too.
    """
    if by not in ("eigenvalues", "stability"):
        raise ValueError(f"by must be 'eigenvalues' or 'stability', got {by!r}")
    _check_number(n_clusters, similarity)

    def statistic(matrix: xr.DataArray) -> float:
        if by == "eigenvalues":
            return 1 - float(eigenvalues(matrix)[1:n_clusters].mean())
        together = consensus(perturbed(matrix, n=10, seed=seed), n_clusters, seed=seed)
        return float(stability(together, spectral_clusters(matrix, n_clusters, seed=seed)).mean())

    nulls = shuffled(similarity, n=permutations, seed=seed)
    return _chance_test(statistic(similarity), map(statistic, nulls))


def cluster_agreement(first: Labels, second: Labels, *, permutations: int = 999, seed: int = 0) -> ChanceTest:
    """Compare two groupings by adjusted Rand index, and with `second` shuffled among the models.

    1 is full agreement, 0 what chance gives. `second` needs a group for every model of `first`.
    """
    left, right = _groups(first), _groups(second)
    _check_known(left.index, right.index, "the second grouping")
    codes, random = pd.factorize(right[left.index])[0], np.random.default_rng(seed)
    nulls = (adjusted_rand_score(left, random.permutation(codes)) for _ in range(permutations))
    return _chance_test(adjusted_rand_score(left, codes), nulls)


def enrichment(clusters: Labels, components: pd.DataFrame) -> pd.DataFrame:
    """Find the components (columns, a row for every model of `clusters`) that mark each cluster.

    Returns
    -------
    DataFrame
        A row for each cluster, component and value, most significant first. `inside`, `outside`: models
        with the value; `size`: of the cluster; `odds_ratio`: of the sample, 0 … infinity; `p_value`: of
        Fisher's exact test, one-sided, that the value isn't more frequent inside; `q_value`: corrected
        for all rows by Benjamini and Hochberg.
    """
    groups = _groups(clusters)
    _check_known(groups.index, components.index, "the components")
    table = components.loc[groups.index]
    for column in table:
        _groups(table[column], f"component {column!r}")
    rows = [
        (cluster, column, value, *_enriched(groups == cluster, table[column] == value))
        for cluster in sorted(groups.unique())
        for column in table
        for value in table[column].unique()
    ]
    names = ["cluster", "component", "value", "inside", "outside", "size", "odds_ratio", "p_value"]
    result = pd.DataFrame(rows, columns=names)
    result["q_value"] = false_discovery_control(result.p_value)
    return result.sort_values(["p_value", "cluster"], kind="stable", ignore_index=True)


def _enriched(within: pd.Series, has: pd.Series) -> tuple[int, int, int, float, float]:
    inside, outside, size = int((within & has).sum()), int((~within & has).sum()), int(within.sum())
    rest = len(within) - size - outside
    test = fisher_exact([[inside, size - inside], [outside, rest]], alternative="greater")
    return inside, outside, size, float(test.statistic), float(test.pvalue)


def tree(similarity: xr.DataArray) -> NDArray[np.float64]:
    """Average-linkage tree of the models, in scipy's linkage format, leaves in their best order."""
    condensed = squareform(distance(similarity).values, checks=False)
    return np.asarray(optimal_leaf_ordering(linkage(condensed, "average"), condensed))


def embed(similarity: xr.DataArray, *, method: Literal["mds", "tsne"] = "mds", seed: int = 0) -> xr.DataArray:
    """Place the models in the plane by their `distance`.

    `"mds"`, metric multidimensional scaling, keeps distances as well as a plane can. `"tsne"`, as in the
    paper, starts from that map and keeps neighbours; how far apart it puts groups means nothing.

    Returns
    -------
    DataArray
        (model, axis) with axis `"x"`, `"y"`, in log units with `"mds"`. Attributes: `method`, `seed`; of
        `"mds"` `stress`, 0 (distances kept exactly) … 1 (Kruskal's stress-1); of `"tsne"` `perplexity`, a
        third of the other models, 30 at the most.
    """
    if method not in ("mds", "tsne"):
        raise ValueError(f"method must be 'mds' or 'tsne', got {method!r}")
    apart, dimension = distance(similarity).values, similarity.dims[0]
    given: dict[str, Any] = {"metric": "precomputed", "random_state": seed}
    scaling = MDS(2, metric_mds=True, init="classical_mds", n_init=1, normalized_stress=True, **given)
    place = scaling.fit_transform(apart)
    attributes: dict[str, Any] = {"method": method, "seed": seed, "stress": float(scaling.stress_)}
    if method == "tsne":
        start = place / place.std() * 1e-4  # as scikit-learn scales its own start from PCA
        perplexity = min(30.0, (len(apart) - 1) / 3)
        neighbours = TSNE(2, perplexity=perplexity, method="exact", init=start, **given)
        place = neighbours.fit_transform(apart)
        attributes = {"method": method, "seed": seed, "perplexity": perplexity}
    coordinates = {dimension: similarity[dimension].values, "axis": ["x", "y"]}
    return xr.DataArray(place, coordinates, (dimension, "axis"), name="map", attrs=attributes)
