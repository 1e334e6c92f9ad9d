import json

import numpy as np
import pytest
import torch

import modelsim as ms
from modelsim.zoo import fingerprint


@pytest.fixture(scope="module")
def study():
    return ms.open_study(ms.data_directory() / "fashion69")


@pytest.fixture(scope="module")
def images():
    return ms.fashion_mnist("test", n=1000, seed=0)


def test_study_is_of_the_shipped_weights_and_images(study, images):
    zoo = ms.load_zoo(names=study.source.values.tolist())
    assert [fingerprint(zoo[name]) for name in zoo] == study.model_sha256.values.tolist()
    assert images.hashes() == tuple(study.image_sha256.values)
    assert tuple(study.image.values) == images.ids
    np.testing.assert_array_equal(study.label, images.labels)


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny_patch4_window7_224"])
def test_stored_predictions_are_those_of_the_stored_weights_and_perturbations(name, study, images):
    target, few, source = ms.load_zoo(names=[name])[name], slice(200), "deit_small_patch16_224"
    stored, adversarial = study.sel(target=name).isel(image=few), ms.adversarial_images(study, source, images)
    with torch.inference_mode():
        told, fooled = (target(canvas[few]).argmax(1).numpy() for canvas in (images.images, adversarial))
    # Another processor rounds otherwise, which may tip an image that lies on a boundary.
    assert (told == stored.clean_prediction).mean() >= 0.99
    assert (fooled == stored.adversarial_prediction.sel(source=source)).mean() >= 0.99


def test_perturbations_keep_to_the_ball_and_to_the_canvas(study, images):
    eps = round(json.loads(study.attrs["attack_settings"])["eps"] * 255)
    pixels = (images.images * 255).round().to(torch.int16).numpy()
    for source in study.source:
        change = study.perturbation.sel(source=source).values
        assert np.abs(change).max() == eps
        assert (pixels + change).min() >= 0
        assert (pixels + change).max() <= 255


def test_attack_is_strong_enough_to_tell_models_apart(study):
    names = [name for name in study.source.values if name in ms.CATALOGUE]
    architectures = study.sel(source=names, target=names)
    own, rate = ms.white_box_success(architectures), ms.transferability(architectures).values
    assert own.median() >= 0.97
    assert own.min() >= 0.80
    assert 0.10 <= np.median(rate[~np.eye(len(rate), dtype=bool)]) <= 0.50


def test_stored_probabilities_are_as_accurate_as_the_weight_files_say(study):
    right = study.clean_probability.argmax("class") == study.test_label
    recorded = ms.training_table().test_accuracy[study.target.values]
    # Two probabilities that are equal after rounding may tip an image.
    np.testing.assert_allclose(right.mean("test_image"), recorded, atol=0.001)


def test_study_at_the_papers_strength_is_of_the_same_networks_and_images_and_fools_fewer(study):
    weaker = ms.open_study(ms.data_directory() / "fashion69-eps8")
    assert json.loads(weaker.attrs["attack_settings"])["eps"] == 8 / 255
    for name in ("model_sha256", "image_sha256", "label"):
        assert weaker[name].equals(study[name])
    # Folding rounds otherwise, which may tip an image that lies on a boundary.
    assert (weaker.clean_prediction == study.clean_prediction).mean() >= 0.999
    fooled, before = (ms.transferability(one).values for one in (weaker, study))
    assert (fooled < before).mean() > 0.99
    assert 0.05 < np.median(fooled) < np.median(before)
