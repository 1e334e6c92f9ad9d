from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
from pages import page
from torch.nn.functional import cross_entropy

import modelsim as ms

own = page("from_nothing")


@pytest.fixture(scope="module")
def digits():
    pixels, labels = map(torch.tensor, own.load_digits(return_X_y=True))
    return own.image_set(pixels.float().view(-1, 1, 8, 8) / 16, labels, [*"0123456789"])


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_attack_on_the_page_stays_where_it_promises_and_raises_the_loss(steps, images, zoo):
    x, y, before = images.images, images.labels, images.fingerprint()
    for classifier in zoo.values():
        classifier.eval()
        made = own.momentum(classifier, x, y, eps=0.2, steps=steps)
        assert (made - x).abs().max() <= 0.2 + 1e-6
        assert made.clamp(0, 1).equal(made)
        clean, raised = (cross_entropy(classifier(canvas), y, reduction="none") for canvas in (x, made))
        assert (raised > clean).float().mean() > 0.9
        if steps == 1:
            assert torch.allclose(made, ms.fgsm(classifier, x, y, eps=0.2), atol=1e-6)
    assert images.fingerprint() == before


def test_set_of_a_folder_is_that_of_the_tensors_sorted_by_class(digits, tmp_path):
    few = digits[:200]
    own.write_folder(few, tmp_path)
    read, expected = own.read_folder(tmp_path, side=8), few[few.labels.argsort(stable=True)]
    assert torch.equal(read.images, expected.images)
    assert torch.equal(read.labels, expected.labels)
    assert read.classes == expected.classes
    assert own.read_folder(tmp_path, side=5).images.shape == (200, 1, 5, 5)


def test_sat_counted_from_predictions_is_the_packages_and_rates_have_both_directions():
    random = np.random.default_rng(0)
    label, clean = random.integers(3, size=50), random.integers(3, size=(3, 50))
    study = tiny.study(
        label, np.where(random.random((3, 50)) < 0.8, label, clean), clean + np.zeros((3, 1, 1))
    )
    for pair, expected in ms.pairs(ms.sat(study)).items():
        assert own.plain_sat(study, *pair) == pytest.approx(expected)
    rate = ms.transferability(study)
    mean, low, high = own.mean_rate(study, [("a", "b"), ("b", "c")])
    assert mean == pytest.approx((rate.loc["a", "b"].item() + rate.loc["b", "c"].item()) / 2)
    assert low < mean < high


def test_the_whole_way_needs_nothing_of_the_books(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSIM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        ms.fashion_mnist()
    training, images = digits[:500], digits[500:600]
    zoo = {b.__name__: own.train(b, training, seed=0, epochs=9) for b in (own.convolutional, own.transformer)}
    attack = partial(own.momentum, eps=40 / 255, steps=3)
    last, asked = own.train(own.perceptron, training, seed=0, epochs=9), own.Counter()
    with patch.dict(ms.CATALOGUE, clear=True):
        run = SimpleNamespace(images=images, attack=attack, progress=False)
        study = ms.transfer(zoo, out=tmp_path, **vars(run))
        compared = ms.compare(last, study, name="last", zoo=zoo, **vars(run))
        own.count_images(zoo | {"last": last}, asked)
        larger = ms.transfer(zoo | {"last": last}, out=tmp_path, **vars(run))
        own.plots.clustered_heatmap(ms.sat(larger), dict.fromkeys([*zoo, "last"], "mine"))
    assert {name for name, what in asked if what == "attacked"} == {"last"}
    assert tiny.same_predictions(compared, larger.load())
    cells = own.with_intervals(larger).loc["last", "transformer"]
    assert cells.startswith(f"{own.plain_sat(larger, 'last', 'transformer'):.2f} [")
