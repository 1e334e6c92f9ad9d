import re

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

import modelsim as ms
from modelsim.clustering import affinity
from modelsim.scores import relative_sat

BLOCKS = np.array([0, 1, 2, 0, 1, 0, 2, 1, 0])


def matrix(values):
    names = [f"m{i}" for i in range(len(values))]
    return xr.DataArray(np.array(values, float), dict(model=names, other=names), ("model", "other"), "SAT")


def planted(blocks=BLOCKS, *, within=4.0, across=1.0, seed=0):
    noise = np.random.default_rng(seed).uniform(-0.2, 0.2, (len(blocks), len(blocks)))
    values = np.where(blocks[:, None] == blocks, within, across) + (noise + noise.T) / 2
    np.fill_diagonal(values, np.log(100))
    return matrix(values)


def relative(similarity):
    values = similarity.values - similarity.values.mean()
    np.fill_diagonal(values, np.nan)
    return similarity.copy(data=values)


@pytest.mark.parametrize("kind", [lambda s: s, relative, relative_sat])
@pytest.mark.parametrize("seed", range(3))
def test_planted_blocks_are_recovered_and_numbered_by_size(kind, seed):
    clusters = ms.spectral_clusters(kind(planted(seed=seed)), 3, seed=seed)
    assert clusters.values.tolist() == BLOCKS.tolist()
    assert clusters.model.values.tolist() == [f"m{i}" for i in range(9)]


def test_clusters_of_one_size_are_numbered_by_their_first_member_down_to_one_model_each():
    clusters = ms.spectral_clusters(planted(np.array([1, 0, 1, 0, 2, 2])), 3)
    assert clusters.values.tolist() == [0, 1, 0, 1, 2, 2]
    assert ms.spectral_clusters(planted(BLOCKS[:4]), 4).values.tolist() == [0, 1, 2, 3]


@given(st.permutations(range(9)))
def test_clusters_follow_the_models_when_these_are_permuted(order):
    similarity = planted()
    permuted = ms.spectral_clusters(similarity[order, order], 3)
    assert adjusted_rand_score(BLOCKS[order], permuted) == 1
    assert permuted.model.values.tolist() == similarity.model.values[order].tolist()


def test_affinity_ignores_the_diagonal_and_what_is_negative_and_is_a_ratio_if_relative():
    nan, clipped = np.nan, affinity(matrix([[4, 1, -3], [1, 50, 2], [-3, 2, 4]]))
    assert clipped.values.tolist() == [[0, 1, 0], [1, 0, 2], [0, 2, 0]]
    ratios = affinity(matrix(np.log([[nan, 0.5, 2], [0.5, nan, 3], [2, 3, nan]])))
    np.testing.assert_allclose(ratios, [[0, 0.5, 2], [0.5, 0, 3], [2, 3, 0]])


def test_distance_is_how_far_a_pair_is_below_its_own_entries_or_the_most_similar_pair():
    nan = np.nan
    own = ms.distance(matrix([[4, 1, 5], [1, 3, 2], [5, 2, 4]]))
    assert own.values.tolist() == [[0, 2.5, 0], [2.5, 0, 1.5], [0, 1.5, 0]]
    most = ms.distance(matrix([[nan, -1, 0.5], [-1, nan, 0], [0.5, 0, nan]]))
    assert most.values.tolist() == [[0, 1.5, 0], [1.5, 0, 0.5], [0, 0.5, 0]]


def test_similarity_stays_as_it_was_and_what_stands_beside_it_is_not_kept():
    similarity = planted().assign_coords(accuracy=("model", np.ones(9)))
    before = similarity.copy(deep=True)
    assert ms.spectral_clusters(similarity, 3).identical(ms.spectral_clusters(planted(), 3))
    assert ms.distance(similarity).shape == affinity(similarity).shape == (9, 9)
    assert similarity.identical(before)


WRONG = {
    "got shape (3, 9)": planted()[:3],
    "m0 and m7 is NaN or infinite": planted().where(np.add.outer(np.arange(9), np.arange(9)) != 7, np.inf),
    "m4 and m4 is NaN": planted().where(np.arange(9) != np.where(np.arange(9) == 4, 4, -1)[:, None]),
    "differs with their order": planted() + np.arange(9),
    "m4 against m5": planted()[:, [0, 1, 2, 3, 5, 4, 6, 7, 8]],
}


@pytest.mark.parametrize("analysis", [ms.distance, affinity])
@pytest.mark.parametrize(("culprit", "similarity"), WRONG.items())
def test_matrix_that_is_no_similarity_is_refused_naming_the_culprit(analysis, culprit, similarity):
    with pytest.raises(ValueError, match=re.escape(culprit)):
        analysis(similarity)


def test_number_of_clusters_that_does_not_fit_is_refused():
    for k in (1, 10):
        with pytest.raises(ValueError, match=f"2 … 9, the number of models; got {k}"):
            ms.spectral_clusters(planted(), k)
