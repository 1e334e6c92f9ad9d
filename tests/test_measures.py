import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import ortho_group
from sklearn.metrics import cohen_kappa_score
from timm import create_model
from torch.nn.functional import cross_entropy

import modelsim as ms
from modelsim import distillation, measures

FROM_STUDY = (ms.prediction_agreement, ms.error_consistency, ms.capa, ms.jensen_shannon)


def told(probabilities, labels):
    """A study, as far as clean images go."""
    p, names = np.asarray(probabilities, float), [f"model {i}" for i in range(len(probabilities))]
    images = [f"image {i}" for i in range(len(labels))]
    return xr.Dataset(
        {
            "clean_prediction": (("target", "image"), p.argmax(-1)),
            "label": ("image", np.asarray(labels)),
            "clean_probability": (("target", "test_image", "class"), p),
        },
        {"target": names, "image": images, "test_image": images},
    )


def random_study(seed=0, models=4, images=60, classes=5):
    random = np.random.default_rng(seed)
    return told(random.dirichlet(np.ones(classes), (models, images)), random.integers(classes, size=images))


def capa_by_loops(p, q, labels):
    n, classes = p.shape
    observed = sum(p[i, c] * q[i, c] for i in range(n) for c in range(classes)) / n
    a, b = (sum(x[i, labels[i]] for i in range(n)) / n for x in (p, q))
    expected = a * b + (1 - a) * (1 - b) / (classes - 1)
    return (observed - expected) / (1 - expected)


def test_measures_are_those_of_other_implementations():
    study = random_study()
    p, labels = study.clean_probability.values, study.label.values
    said, right = p.argmax(-1), p.argmax(-1) == labels
    expected = {
        ms.prediction_agreement: lambda a, b: np.mean(said[a] == said[b]),
        ms.error_consistency: lambda a, b: cohen_kappa_score(right[a], right[b]),
        ms.capa: lambda a, b: capa_by_loops(p[a], p[b], labels),
        ms.jensen_shannon: lambda a, b: 1 - np.mean(jensenshannon(p[a], p[b], base=2, axis=1) ** 2),
    }
    for function, reference in expected.items():
        pairs = [[reference(a, b) for b in range(4)] for a in range(4)]
        np.testing.assert_allclose(function(study), pairs, atol=1e-12, err_msg=function.__name__)


@given(st.integers(0, 2**32 - 1))
def test_identities_of_what_is_read_from_predictions(seed):
    study = random_study(seed, images=20)
    for function in FROM_STUDY:
        matrix = function(study)
        np.testing.assert_allclose(matrix, matrix.T, err_msg=function.__name__)
        if function is not ms.capa:
            own = np.diag(matrix)[np.isfinite(np.diag(matrix))]
            np.testing.assert_allclose(own, 1, err_msg=function.__name__)
        shuffled = study.isel(image=slice(None, None, -1))
        np.testing.assert_allclose(function(shuffled), matrix, err_msg=function.__name__)


def test_cases_by_hand():
    sure = np.eye(3)[[[0, 1, 2, 0], [0, 1, 0, 1], [1, 2, 0, 1]]]
    study = told(sure, [0, 1, 2, 2])
    # Right are models 0 on three images, 1 on two of them, 2 on none.
    assert ms.prediction_agreement(study).values[0, 1] == 0.5
    assert ms.error_consistency(study).values[0, 1] == pytest.approx((0.75 - 0.5) / 0.5)
    assert ms.error_consistency(study).values[0, 2] == 0
    assert np.isnan(ms.error_consistency(study).values[2, 2])
    chance = 0.75 * 0.5 + 0.25 * 0.5 / 2
    assert ms.capa(study).values[0, 1] == pytest.approx((0.5 - chance) / (1 - chance))
    assert ms.jensen_shannon(study).values[0, 2] == 0


def test_independent_networks_agree_no_more_than_by_chance():
    random, n = np.random.default_rng(0), 40_000
    labels = random.integers(10, size=n)
    right = random.random((2, n)) < [[0.9], [0.6]]
    said = np.where(right, labels, (labels + random.integers(1, 10, size=(2, n))) % 10)
    study = told(np.eye(10)[said], labels)
    for function in (ms.error_consistency, ms.capa):
        assert function(study).values[0, 1] == pytest.approx(0, abs=0.02)
    assert ms.prediction_agreement(study).values[0, 1] > 0.5


def test_alignment_is_that_of_the_definition_and_blind_to_turns_and_scales():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(50, 6)), random.normal(size=(50, 4))
    turned = 7 * x @ ortho_group.rvs(6, random_state=1) + 3
    found = ms.linear_cka({"x": x, "y": y, "turned": turned})
    a, b = x - x.mean(0), y - y.mean(0)
    expected = np.sum((a.T @ b) ** 2) / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert float(found.sel(model="x", other="y")) == pytest.approx(expected, rel=1e-4)
    assert float(found.sel(model="x", other="turned")) == pytest.approx(1, abs=1e-5)
    stretched = ms.linear_cka({"x": x, "stretched": x * [9, 1, 1, 1, 1, 1]})
    assert float(stretched[0, 1]) < 0.9


def test_cosine_of_gradients_has_a_sign_and_no_length_and_a_flat_image_counts_as_nothing():
    random = np.random.default_rng(0)
    g = random.normal(size=(8, 1, 3, 3))
    flat = g * (np.arange(8) < 6)[:, None, None, None]
    found = ms.gradient_cosine({"g": g, "longer": 5 * g, "against": -g, "flat": flat})
    np.testing.assert_allclose(found.sel(model="g"), [1, 1, -1, 0.75], atol=1e-12)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    small = dict(layers=(1, 1, 1, 1), channels=(4, 4, 8, 8), stem_width=4, in_chans=1, num_classes=10)
    return {name: ms.Classifier(create_model("resnet10t", **small).eval(), input_size=32) for name in "ab"}


def test_features_are_what_the_last_layer_is_given_and_gradients_those_of_the_loss(networks, tmp_path):
    images, network = ms.fashion_mnist("test", n=20), networks["a"]
    given_to_last = []
    network.network.fc.register_forward_hook(lambda _, arguments, __: given_to_last.append(arguments[0]))
    x = images.images.clone().requires_grad_()
    cross_entropy(network(x), images.labels, reduction="sum").backward()
    expected = ms.penultimate_features(network, images)
    np.testing.assert_allclose(given_to_last[0].detach(), expected, atol=1e-6)
    other = {name: net for name, net in networks.items() if name == "b"}
    found = ms.measure(networks, images, out=tmp_path, progress=False)
    features = {name: ms.penultimate_features(networks[name], images) for name in networks}
    np.testing.assert_allclose(found.linear_cka, ms.linear_cka(features), atol=1e-6)
    y = images.images.clone().requires_grad_()
    cross_entropy(other["b"](y), images.labels, reduction="sum").backward()
    cosines = torch.cosine_similarity(x.grad.flatten(1), y.grad.flatten(1))
    assert float(found.gradient_cosine[0, 1]) == pytest.approx(float(cosines.mean()), abs=1e-5)


def test_a_run_goes_on_with_the_network_that_is_missing_and_leaves_only_the_matrices(
    networks, tmp_path, monkeypatch
):
    images, asked = ms.fashion_mnist("test", n=20), []
    features = measures.penultimate_features

    def stopped(classifier, images):
        asked.append(classifier)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return features(classifier, images)

    monkeypatch.setattr(measures, "penultimate_features", stopped)
    with pytest.raises(KeyboardInterrupt):
        ms.measure(networks, images, out=tmp_path, progress=False)
    found = ms.measure(networks, images, out=tmp_path, progress=False)
    assert asked == [networks["a"], networks["b"], networks["b"]]
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".lock", ".txt")] == [
        "measures.nc"
    ]
    assert ms.measure(networks, images, out=tmp_path, progress=False).identical(found)
    assert len(asked) == 3
    with pytest.raises(ValueError, match=r"models\.b: \w{8}… there, absent now\): give another folder"):
        ms.measure({"a": networks["a"]}, images, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="images: "):
        ms.measure(networks, images[:10], out=tmp_path, progress=False)


def test_a_network_without_a_head_to_take_off_is_named(tmp_path):
    images = ms.fashion_mnist("test", n=10)
    with pytest.raises(ValueError, match="model 'mine': features are read from timm's networks only"):
        ms.measure({"mine": tiny.linear(1, pixels=784)}, images, out=tmp_path, progress=False)


@pytest.fixture(scope="module")
def stored():
    return xr.open_dataset(ms.data_directory() / "measures" / "measures.nc", engine="scipy")


def test_stored_measures_are_those_of_the_shipped_networks(stored, tmp_path):
    names = ["vit_base_patch32_224", "resnetv2_50"]
    zoo = ms.load_zoo(names=names)
    found = ms.measure(zoo, ms.fashion_mnist("test", n=1000), out=tmp_path, progress=False)
    for measure in ("linear_cka", "gradient_cosine"):
        expected = stored[measure].sel(model=names, other=names)
        np.testing.assert_allclose(found[measure], expected, atol=2e-3, err_msg=measure)


def test_untaught_students_are_those_of_the_table(stored):
    students = xr.open_dataset(ms.data_directory() / "measures" / "students.nc", engine="scipy")
    assert {*students.target.values} < {*stored.model.values}
    images = ms.fashion_mnist("test", n=1000)
    right = (students.clean_prediction == images.labels.numpy()).mean("image")
    runs = distillation.distillation_table().query("teacher == 'none'")
    accuracy = {f"student-{run.student}-seed{run.seed}": run.accuracy for run in runs.itertuples()}
    # A thousand of the ten thousand images.
    np.testing.assert_allclose(right, [accuracy[name] for name in students.target.values], atol=0.04)
