import re

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from sklearn.metrics import adjusted_rand_score

import modelsim as ms
from modelsim.clustering import tree

BLOCKS = np.array([0, 1, 2, 0, 1, 0, 2, 1, 0])


def matrix(values):
    names = [f"m{i}" for i in range(len(values))]
    return xr.DataArray(
        np.asarray(values, float), {"model": names, "other": names}, ("model", "other"), name="SAT"
    )


def planted(blocks=BLOCKS, *, within=4.0, across=1.0, seed=0):
    noise = np.random.default_rng(seed).uniform(-0.2, 0.2, (len(blocks), len(blocks)))
    values = np.where(blocks[:, None] == blocks, within, across) + (noise + noise.T) / 2
    np.fill_diagonal(values, np.log(100))
    return matrix(values)


def from_points(points):
    """A similarity whose distance is that of points in the plane."""
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    return matrix(np.log(100) - apart)


@pytest.mark.parametrize("seed", range(5))
def test_planted_blocks_are_recovered_and_numbered_by_size(seed):
    clusters = ms.spectral_clusters(planted(seed=seed), 3, seed=seed)
    assert adjusted_rand_score(BLOCKS, clusters) == 1
    assert clusters.values.tolist() == BLOCKS.tolist()
    assert clusters.model.values.tolist() == [f"m{i}" for i in range(9)]


def test_blocks_of_one_size_are_numbered_by_their_first_member():
    clusters = ms.spectral_clusters(planted(np.array([1, 0, 1, 0, 2, 2])), 3)
    assert clusters.values.tolist() == [0, 1, 0, 1, 2, 2]


def test_as_many_clusters_as_models_gives_each_its_own():
    assert sorted(ms.spectral_clusters(planted(BLOCKS[:4]), 4).values) == [0, 1, 2, 3]


@given(st.permutations(range(9)))
def test_clusters_follow_the_models_when_these_are_permuted(order):
    similarity = planted()
    permuted = ms.spectral_clusters(similarity[order, order], 3)
    assert adjusted_rand_score(BLOCKS[order], permuted) == 1
    assert permuted.model.values.tolist() == similarity.model.values[order].tolist()


def test_clusters_ignore_the_diagonal_and_count_negative_similarity_as_none():
    similarity = planted()
    none, negative = similarity.where(similarity > 2, 0.0), similarity.where(similarity > 2, -3.0)
    np.fill_diagonal(negative.values, 50.0)
    with pytest.warns(UserWarning, match="not fully connected"):
        expected, result = ms.spectral_clusters(none, 3), ms.spectral_clusters(negative, 3)
    assert result.identical(expected)


def test_analyses_leave_the_matrix_as_it_was():
    similarity = planted()
    before = similarity.copy(deep=True)
    ms.spectral_clusters(similarity, 3)
    ms.distance(similarity)
    ms.embed(similarity)
    tree(similarity)
    assert similarity.identical(before)


def test_distance_is_how_far_a_pair_is_below_the_mean_of_its_own_entries():
    result = ms.distance(matrix([[4, 1, 5], [1, 3, 2], [5, 2, 4]]))
    assert result.values.tolist() == [[0, 2.5, 0], [2.5, 0, 1.5], [0, 1.5, 0]]


@given(st.integers(0, 1000))
def test_distance_is_symmetric_with_a_zero_diagonal_and_never_negative(seed):
    values = ms.distance(planted(seed=seed)).values
    np.testing.assert_array_equal(values, values.T)
    assert (np.diag(values) == 0).all()
    assert (values >= 0).all()


def test_map_keeps_the_distances_of_points_planted_in_the_plane():
    points = np.random.default_rng(0).normal(size=(8, 2))
    places = ms.embed(from_points(points))
    assert places.stress < 1e-3
    np.testing.assert_allclose(pdist(places.values), pdist(points), rtol=1e-2, atol=1e-2)


def test_map_of_permuted_models_keeps_their_distances():
    similarity, order = from_points(np.random.default_rng(1).normal(size=(6, 2))), [3, 1, 5, 0, 2, 4]
    straight, permuted = ms.embed(similarity), ms.embed(similarity[order, order])
    assert permuted.model.values.tolist() == straight.model.values[order].tolist()
    np.testing.assert_allclose(pdist(permuted.values), pdist(straight.values[order]), atol=1e-2)


def test_stress_is_large_where_the_plane_cannot_hold_the_distances():
    all_equally_far = matrix(np.full((8, 8), 1.0) + 3.6 * np.eye(8))
    assert ms.embed(all_equally_far).stress > 0.1


def test_tree_joins_the_nearest_pair_first():
    links = tree(matrix([[4, 1, 3], [1, 4, 2], [3, 2, 4]]))
    assert sorted(links[0, :2]) == [0, 2]
    assert links[:, 2].tolist() == [1.0, 2.5]


def with_entry(i, j, value):
    similarity = planted()
    similarity.values[i, j] = value
    return similarity


@pytest.mark.parametrize("analysis", [ms.distance, ms.embed, tree, lambda s: ms.spectral_clusters(s, 2)])
@pytest.mark.parametrize(
    ("similarity", "culprit"),
    [
        (planted()[:3], "got shape (3, 9)"),
        (planted()[0], "got shape (9,)"),
        (with_entry(2, 5, np.nan), "m2 and m5 is NaN"),
        (with_entry(2, 5, 0.0), "m2 and m5 differs with their order"),
        (planted()[:, [0, 1, 2, 3, 5, 4, 6, 7, 8]], "m4 against m5"),
    ],
)
def test_matrix_that_is_no_similarity_is_refused_naming_the_culprit(analysis, similarity, culprit):
    with pytest.raises(ValueError, match=re.escape(culprit)):
        analysis(similarity)


@pytest.mark.parametrize("n_clusters", [-1, 0, 1, 10])
def test_number_of_clusters_that_does_not_fit_is_refused(n_clusters):
    with pytest.raises(ValueError, match=f"2 … 9, the number of models; got {n_clusters}"):
        ms.spectral_clusters(planted(), n_clusters)
