import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from sklearn.metrics import adjusted_rand_score

import modelsim as ms
from modelsim.clustering import (
    choose_k,
    cluster_agreement,
    consensus,
    eigenvalues,
    embed,
    enrichment,
    perturbed,
    resampled,
    shuffled,
    stability,
    structure,
    tree,
)
from modelsim.scores import relative_sat, transferability

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


def relative(similarity):
    values = similarity.values - similarity.values.mean()
    np.fill_diagonal(values, np.nan)
    return similarity.copy(data=values)


def noise_only(n=14, *, seed=0, effects=0.0):
    """Independent pairs, but for what single models add to all of theirs."""
    random = np.random.default_rng(seed)
    own = random.normal(0, effects, n)
    pairs = np.triu(random.normal(3, 0.2, (n, n)), 1)
    return matrix(np.where(np.eye(n), np.log(100), pairs + pairs.T + own[:, None] + own))


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
    embed(similarity)
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
    places = embed(from_points(points))
    assert places.stress < 1e-3
    np.testing.assert_allclose(pdist(places.values), pdist(points), rtol=1e-2, atol=1e-2)


def test_map_of_permuted_models_keeps_their_distances():
    similarity, order = from_points(np.random.default_rng(1).normal(size=(6, 2))), [3, 1, 5, 0, 2, 4]
    straight, permuted = embed(similarity), embed(similarity[order, order])
    assert permuted.model.values.tolist() == straight.model.values[order].tolist()
    np.testing.assert_allclose(pdist(permuted.values), pdist(straight.values[order]), atol=1e-2)


def test_stress_is_large_where_the_plane_cannot_hold_the_distances():
    all_equally_far = matrix(np.full((8, 8), 1.0) + 3.6 * np.eye(8))
    assert embed(all_equally_far).stress > 0.1


def test_tree_joins_the_nearest_pair_first():
    links = tree(matrix([[4, 1, 3], [1, 4, 2], [3, 2, 4]]))
    assert sorted(links[0, :2]) == [0, 2]
    assert links[:, 2].tolist() == [1.0, 2.5]


def with_entry(i, j, value):
    similarity = planted()
    similarity.values[i, j] = value
    return similarity


ANALYSES = {
    "distance": ms.distance,
    "embed": embed,
    "tree": tree,
    "spectral_clusters": lambda s: ms.spectral_clusters(s, 2),
    "eigenvalues": eigenvalues,
    "choose_k": choose_k,
    "perturbed": lambda s: next(perturbed(s)),
    "shuffled": lambda s: next(shuffled(s)),
    "consensus": lambda s: consensus([s], 2),
    "structure": lambda s: structure(s, 2),
}


@pytest.mark.parametrize("analysis", ANALYSES.values(), ids=ANALYSES)
@pytest.mark.parametrize(
    ("similarity", "culprit"),
    [
        (planted()[:3], "got shape (3, 9)"),
        (planted()[0], "got shape (9,)"),
        (with_entry(2, 5, np.nan), "m2 and m5 is NaN"),
        (with_entry(2, 5, np.inf), "m2 and m5 is NaN or infinite"),
        (with_entry(4, 4, np.nan), "m4 and m4 is NaN"),
        (with_entry(2, 5, 0.0), "m2 and m5 differs with their order"),
        (planted()[:, [0, 1, 2, 3, 5, 4, 6, 7, 8]], "m4 against m5"),
    ],
)
def test_matrix_that_is_no_similarity_is_refused_naming_the_culprit(analysis, similarity, culprit):
    with pytest.raises(ValueError, match=re.escape(culprit)):
        analysis(similarity)


@pytest.mark.parametrize("analysis", [ms.spectral_clusters, structure, lambda s, k: consensus([s], k)])
@pytest.mark.parametrize("n_clusters", [-1, 0, 1, 10])
def test_number_of_clusters_that_does_not_fit_is_refused(analysis, n_clusters):
    with pytest.raises(ValueError, match=f"2 … 9, the number of models; got {n_clusters}"):
        analysis(planted(), n_clusters)


def test_partly_missing_diagonal_and_missing_pairs_are_no_relative_similarity():
    similarity = relative(planted())
    similarity.values[3, 6] = np.nan
    with pytest.raises(ValueError, match="m3 and m6 is NaN"):
        ms.spectral_clusters(similarity, 2)


def test_clusters_keep_nothing_of_what_stands_beside_a_similarity():
    counts = {"trials": (("model", "other"), np.ones((9, 9))), "accuracy": ("model", np.ones(9))}
    found = ms.spectral_clusters(planted().assign_coords(counts), 3)
    assert found.identical(ms.spectral_clusters(planted(), 3))


@pytest.mark.parametrize("seed", range(3))
def test_planted_blocks_are_recovered_from_a_relative_similarity(seed):
    similarity = relative(planted(within=1.0, across=-0.5, seed=seed))
    assert adjusted_rand_score(BLOCKS, ms.spectral_clusters(similarity, 3)) == 1
    assert adjusted_rand_score(BLOCKS, ms.spectral_clusters(relative_sat(planted(seed=seed)), 3)) == 1


def test_relative_similarity_counts_as_the_exponential_of_its_values():
    similarity = relative(planted())
    ratios = similarity.copy(data=np.exp(similarity.values))
    np.fill_diagonal(ratios.values, 1)
    np.testing.assert_allclose(eigenvalues(similarity), eigenvalues(ratios))


def test_distance_of_a_relative_similarity_is_from_the_most_similar_pair():
    nan = np.nan
    result = ms.distance(matrix([[nan, -1, 0.5], [-1, nan, 0], [0.5, 0, nan]]))
    assert result.values.tolist() == [[0, 1.5, 0], [1.5, 0, 0.5], [0, 0.5, 0]]


def test_eigenvalues_of_equally_similar_models():
    values = eigenvalues(matrix(np.full((5, 5), 2.0)))
    np.testing.assert_allclose(values, [0, 1.25, 1.25, 1.25, 1.25], atol=1e-12)
    assert values.number.values.tolist() == [1, 2, 3, 4, 5]


def test_eigenvalues_of_two_pairs_without_a_link():
    values = eigenvalues(matrix(np.kron(np.eye(2), np.full((2, 2), 3.0))))
    np.testing.assert_allclose(values, [0, 0, 2, 2], atol=1e-12)


@pytest.mark.parametrize("kind", [lambda s: s, relative, relative_sat])
def test_both_criteria_pick_the_planted_number(kind):
    blocks = np.repeat(range(4), 6)
    table = choose_k(kind(planted(blocks)))
    assert table.index.tolist() == list(range(2, 16))
    assert table.idxmax().to_dict() == {"eigengap": 4, "silhouette": 4}


def test_eigengap_is_the_step_to_the_next_eigenvalue():
    similarity = planted()
    values = eigenvalues(similarity).values
    table = choose_k(similarity, max_k=4)
    np.testing.assert_allclose(
        table.eigengap, [values[2] - values[1], values[3] - values[2], values[4] - values[3]]
    )
    assert len(choose_k(similarity)) == 7


@pytest.mark.parametrize("max_k", [1, 9])
def test_greatest_number_of_clusters_that_does_not_fit_is_refused(max_k):
    with pytest.raises(ValueError, match=f"2 … 8, the number of models less one; got {max_k}"):
        choose_k(planted(), max_k=max_k)


def test_perturbed_scores_are_symmetric_around_the_given_with_the_scale_asked_for():
    similarity = planted()
    copies = np.stack(list(perturbed(similarity, scale=0.3, n=400)))
    off_diagonal = ~np.eye(9, dtype=bool)
    np.testing.assert_array_equal(copies, copies.transpose(0, 2, 1))
    np.testing.assert_allclose(copies.mean(0), similarity, atol=0.08)
    np.testing.assert_allclose(copies.std(0)[off_diagonal], 0.3, rtol=0.2)
    assert (copies[:, ~off_diagonal] == np.log(100)).all()


def test_perturbed_scores_have_by_default_half_the_scale_of_the_pairs():
    similarity = planted()
    own = relative_sat(similarity).values[np.triu_indices(9, 1)].std()
    noise = np.stack([copy - similarity for copy in perturbed(similarity, n=200)])
    assert noise[:, 0, 1:].std() == pytest.approx(own / 2, rel=0.1)


@pytest.mark.parametrize("kind", [lambda s: s, relative])
def test_shuffled_scores_keep_single_effects_and_the_spread_of_the_rest(kind):
    similarity = kind(planted())
    off_diagonal = ~np.eye(9, dtype=bool)
    rest = relative_sat(similarity).values[off_diagonal]
    first, second = shuffled(similarity, n=2)
    for copy in (first, second):
        np.testing.assert_allclose(
            np.nanmean(copy.where(off_diagonal), 0), np.nanmean(similarity.where(off_diagonal), 0), atol=1e-9
        )
        assert relative_sat(copy).values[off_diagonal].std() == pytest.approx(rest.std())
        np.testing.assert_array_equal(np.diag(copy), np.diag(similarity))
    assert not np.allclose(first.values[off_diagonal], second.values[off_diagonal])


def test_consensus_is_the_share_of_clusterings_that_join_a_pair():
    one, other = planted(np.array([0, 0, 1, 1])), planted(np.array([0, 1, 0, 1]))
    third = 1 / 3
    expected = [
        [1, 2 * third, third, 0],
        [2 * third, 1, 0, third],
        [third, 0, 1, 2 * third],
        [0, third, 2 * third, 1],
    ]
    result = consensus([one, other, one[[3, 1, 2, 0], [3, 1, 2, 0]]], 2)
    np.testing.assert_allclose(result, expected)
    assert result.dims == ("model", "other")


def test_consensus_needs_matrices_of_the_same_models():
    with pytest.raises(ValueError, match="m8 is not in all"):
        consensus([planted(), planted()[:8, :8]], 2)
    with pytest.raises(ValueError, match="at least one matrix"):
        consensus([], 2)


def test_stability_is_own_less_next_best_consensus():
    together = matrix([[1, 0.9, 0.3, 0.2], [0.9, 1, 0.1, 0.4], [0.3, 0.1, 1, 0.0], [0.2, 0.4, 0.0, 1]])
    result = stability(together, {"m1": "a", "m0": "a", "m2": "b", "m3": "c"})
    assert result.model.values.tolist() == ["m1", "m0", "m2", "m3"]
    np.testing.assert_allclose(result, [0.9 - 0.4, 0.9 - 0.3, 1 - 0.2, 1 - 0.3])


def test_stability_is_high_where_blocks_are_planted_and_low_in_noise():
    firm, loose = (
        stability(consensus(perturbed(each, n=20), 3), ms.spectral_clusters(each, 3))
        for each in (planted(np.repeat(range(3), 8)), noise_only(24))
    )
    assert firm.mean() > 0.95
    assert loose.mean() < 0.6


@pytest.mark.parametrize(
    ("by", "kind"), [("eigenvalues", lambda s: s), ("eigenvalues", relative), ("stability", relative)]
)
def test_planted_blocks_are_found_to_be_structure(by, kind):
    result = structure(kind(planted(np.repeat(range(3), 5))), 3, by=by, permutations=19)
    assert result.p_value == 1 / 20
    assert result.null.shape == (19,)
    assert result.value > result.null.max()


def test_noise_and_effects_of_single_models_are_found_to_be_no_clusters():
    similarities = [noise_only(seed=seed, effects=0.1 * (seed % 4)) for seed in range(24)]
    p_values = np.array([structure(each, 3, permutations=19).p_value for each in similarities])
    assert (p_values <= 0.05).mean() <= 0.15
    assert 0.35 < p_values.mean() < 0.65


def test_memberships_in_noise_are_no_more_stable_than_in_shuffled_noise():
    assert structure(noise_only(), 3, by="stability", permutations=19).p_value > 0.05


def test_structure_by_something_else_is_refused():
    with pytest.raises(ValueError, match="got 'feel'"):
        structure(planted(), 3, by="feel")


def test_agreement_of_equal_groupings_is_full_whatever_their_names_and_order():
    first = {"a": 0, "b": 0, "c": 1, "d": 1, "e": 2, "f": 2}
    second = {"f": "x", "e": "x", "d": "y", "c": "y", "b": "z", "a": "z", "not in first": "z"}
    result = cluster_agreement(first, second, permutations=199)
    assert result.value == 1
    assert result.p_value <= 0.12  # one in fifteen pairings of six models is this one


def test_agreement_is_the_adjusted_rand_index_by_hand():
    # Together in both: 1 pair of 6; in the first 2, in the second 1; expected 2 × 1 / 6, greatest 1.5.
    result = cluster_agreement(dict(a=0, b=0, c=1, d=1), dict(a=0, b=0, c=1, d=2), permutations=9)
    assert result.value == pytest.approx((1 - 1 / 3) / (1.5 - 1 / 3))


def test_agreement_of_random_groupings_has_every_p_value():
    random = np.random.default_rng(0)
    p_values = [
        cluster_agreement(
            *(dict(enumerate(random.integers(4, size=40))) for _ in range(2)), permutations=19
        ).p_value
        for _ in range(30)
    ]
    assert 0.35 < np.mean(p_values) < 0.65
    assert np.mean(np.array(p_values) <= 0.1) <= 0.25


def tea():
    """Fisher's lady: eight cups, of which she tells three of four right."""
    cups = [f"cup{i}" for i in range(8)]
    told = xr.DataArray([0, 0, 0, 0, 1, 1, 1, 1], {"model": cups}, ("model",))
    poured = pd.DataFrame({"first": ["milk"] * 3 + ["tea"] + ["milk"] + ["tea"] * 3}, cups)
    return told, poured


def test_enrichment_is_fishers_test_corrected_for_all_rows():
    table = enrichment(*tea())
    assert table.iloc[0, :6].tolist() == [0, "first", "milk", 3, 1, 4]
    np.testing.assert_allclose(table.odds_ratio, [9, 9, 1 / 9, 1 / 9])
    np.testing.assert_allclose(table.p_value, np.array([17, 17, 69, 69]) / 70)
    np.testing.assert_allclose(table.q_value, np.array([34, 34, 69, 69]) / 70)


def test_enrichment_finds_the_planted_mark_and_takes_rows_by_name():
    blocks = np.repeat(range(3), 8)
    names = [f"m{i}" for i in range(24)]
    random = np.random.default_rng(0)
    components = pd.DataFrame({"mark": blocks == 1, "chance": random.integers(2, size=24)}, names)
    table = enrichment(dict(zip(names, blocks, strict=True)), components[::-1])
    assert table.loc[0, ["cluster", "component", "value"]].tolist() == [1, "mark", True]
    assert table.odds_ratio[0] == np.inf
    assert (table[table.component == "chance"].q_value > 0.05).all()


def test_components_that_do_not_fit_are_refused_naming_the_culprit():
    told, poured = tea()
    with pytest.raises(ValueError, match="components must name cup3 once, got 0 times"):
        enrichment(told, poured.drop("cup3"))
    with pytest.raises(ValueError, match="components must name cup2 once, got 2 times"):
        enrichment(told, pd.concat([poured, poured.loc[["cup2"]]]))
    with pytest.raises(ValueError, match="component 'sugar' must have several values"):
        enrichment(told, poured.assign(sugar="no"))
    with pytest.raises(ValueError, match=r"component 'first' must .* but cup3 has none"):
        enrichment(told, poured.where(poured.index.to_numpy()[:, None] != "cup3"))


def test_groupings_that_do_not_fit_are_refused_naming_the_culprit():
    told, together = tea()[0], planted(BLOCKS[:8])
    with pytest.raises(ValueError, match="consensus must name cup0 once, got 0 times"):
        stability(together, told)
    with pytest.raises(ValueError, match="second grouping must name cup0 once, got 0 times"):
        cluster_agreement(told, dict(m0=1, m1=2))
    with pytest.raises(ValueError, match=r"must have several values, but all models have \[0\]"):
        cluster_agreement(told, told * 0)


def small_study():
    random, names = np.random.default_rng(0), ["a", "b", "c", "d"]
    label = random.integers(3, size=50)
    wrong = np.array([[0.9, 0.8, 0.2, 0.3], [0.8, 0.9, 0.3, 0.2], [0.2, 0.3, 0.9, 0.8], [0.3, 0.2, 0.8, 0.9]])
    fooled = random.random((4, 4, 50)) < wrong[:, :, None]
    return xr.Dataset(
        {
            "label": ("image", label),
            "clean_prediction": (("target", "image"), np.tile(label, (4, 1))),
            "adversarial_prediction": (("source", "target", "image"), (label + fooled) % 3),
            "perturbation": (("source", "image"), np.zeros((4, 50))),
        },
        {"source": names, "target": names, "image": [f"test/{i}" for i in range(50)]},
    )


def test_resampled_scores_are_those_of_other_draws_of_the_images():
    study = small_study()
    copies = list(resampled(study, n=60, seed=1))
    low, high = ms.interval(study, level=0.999)
    assert len(copies) == 60
    assert all(((copy >= low - 1e-6) & (copy <= high + 1e-6)).mean() > 0.7 for copy in copies)
    np.testing.assert_allclose(sum(copies) / 60, ms.sat(study), atol=0.15)
    assert copies[0].identical(next(resampled(study, seed=1)))
    assert not copies[0].identical(copies[1])


def test_resampled_study_gives_firm_clusters_by_either_score():
    for score in (ms.sat, lambda study: relative_sat(transferability(study))):
        together = consensus(resampled(small_study(), score, n=10), 2)
        assert (stability(together, ms.spectral_clusters(score(small_study()), 2)) > 0.9).all()


@pytest.mark.parametrize("kind", [lambda s: s, relative])
@pytest.mark.parametrize(("size", "perplexity"), [(4, 11 / 3), (23, 68 / 3)])
def test_neighbours_on_the_map_of_t_sne_are_of_one_block(size, perplexity, kind):
    blocks = np.repeat(range(3), size)
    similarity = kind(planted(blocks))
    places = embed(similarity, method="tsne")
    apart = squareform(pdist(places.values)) + np.diag(np.full(len(blocks), np.inf))
    assert (blocks[apart.argmin(0)] == blocks).all()
    assert places.attrs["perplexity"] == pytest.approx(perplexity)
    assert places.identical(embed(similarity, method="tsne"))


def test_map_by_something_else_is_refused():
    with pytest.raises(ValueError, match="got 'umap'"):
        embed(planted(), method="umap")
