"""What data/attacks and data/variants hold, and the programs beside them that made it."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import modelsim as ms

DATA = ms.data_directory()
RANDOM = torch.Generator().manual_seed(0)


def program(folder):
    spec = importlib.util.spec_from_file_location(folder, DATA / folder / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def attacks():
    pytest.importorskip("torchattacks")
    return program("attacks")


@pytest.fixture(scope="module")
def variants():
    return program("variants")


@pytest.fixture(scope="module")
def images():
    return ms.fashion_mnist("test", n=1000)[::4]


def test_every_variation_of_the_attack_keeps_to_its_ball_and_to_the_canvas(attacks, images):
    network, few = ms.load_zoo(names=["resnetv2_50"])["resnetv2_50"], images[:4]
    for name, attack in attacks.VARIATIONS.items():
        eps = {"ε = 4/255": 4, "ε = 24/255": 24}.get(name, 18) / 255
        quick = attack if name != "200 steps" else attack.func
        made = quick(network, few.images, few.labels)
        assert float((made - few.images).abs().max()) == pytest.approx(eps, abs=1e-6), name
        assert 0 <= float(made.min()) <= float(made.max()) <= 1, name


def test_best_iterate_is_kept_where_the_attack_fails(attacks, images):
    """Where a library returns the clean image of what it couldn't fool, transfer would be counted too low."""
    sure = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    few = images[images.labels == 3]
    with torch.no_grad():
        sure[1].bias[3] = 1000
    assert ((attacks.apgd(sure, few.images, few.labels, steps=4) != few.images).flatten(1).any(1)).all()


@pytest.mark.parametrize(("variation", "target"), [("FGSM", "resnet50_gn"), ("noise", "resmlp_24_224-seed1")])
def test_stored_predictions_are_made_again(variation, target, attacks, images):
    source = "visformer_small"
    zoo = ms.load_zoo(names=[source, target])
    made = attacks.VARIATIONS[variation](zoo[source], images.images, images.labels)
    told = zoo[target]((made * 255).round() / 255).argmax(1)
    stored = xr.open_zarr(DATA / "attacks" / "predictions.zarr", consolidated=False).adversarial_prediction
    assert tuple(stored.image.values) == images.ids
    where = dict(variation=variation, source=source, target=target)
    # Another processor rounds otherwise, which may tip an image that lies on a boundary.
    assert (told.numpy() == stored.sel(where).values).mean() > 0.98


NORMALISED = {
    "convolutions": (torch.randn(6, 12, 5, 5, generator=RANDOM), (0, 2, 3)),
    "tokens": (torch.randn(6, 7, 12, generator=RANDOM), (0, 1)),
}


@pytest.mark.parametrize(
    ("layer", "kind"),
    [(nn.GroupNorm(1, 12), "convolutions"), (nn.LayerNorm(12), "tokens")],
    ids=["group", "layer"],
)
def test_batch_normalisation_takes_the_place_of_what_normalises_an_image(layer, kind, variants):
    x, over = NORMALISED[kind]
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    swapped = variants.other_normalisation(layer)
    torch.testing.assert_close(swapped(3 + 2 * x), (x - mean) / variance.sqrt(), atol=1e-4, rtol=0)


def test_group_normalisation_takes_the_place_of_batch_normalisation_with_what_belongs_to_it(variants):
    from timm.layers import BatchNormAct2d

    x, _ = NORMALISED["convolutions"]
    swapped = variants.other_normalisation(BatchNormAct2d(12).train())
    groups = x.reshape(6, 4, -1)
    variance, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
    expected = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape).relu()
    torch.testing.assert_close(swapped(x), expected)
    assert variants.other_normalisation(nn.Conv2d(1, 1, 1)) is None


def test_a_swap_leaves_no_normalisation_and_no_other_weight_behind(variants):
    kinds = (nn.BatchNorm2d, nn.BatchNorm1d, nn.GroupNorm, nn.LayerNorm)
    for architecture in variants.SWAPPED:
        before, after = (
            [type(m) for m in network.modules() if isinstance(m, kinds)]
            for network in (ms.build(architecture), variants.swapped(architecture))
        )
        assert len(before) == len(after)
        assert not any(issubclass(a, b) for a, b in itertools.product({*after}, {*before} - {nn.LayerNorm}))
        sizes = [ms.zoo.count_parameters(f(architecture)) for f in (ms.build, variants.swapped)]
        assert sizes[0] == sizes[1]


def test_variants_are_those_of_the_study_beside_them(variants, images):
    study = xr.open_zarr(DATA / "variants" / "study.zarr", consolidated=False)
    names = [path.stem for path in sorted((DATA / "variants").glob("*.safetensors"))]
    assert {*names} < {*study.source.values}
    assert tuple(study.image.values) == images.ids
    name = names[0]
    told = variants.load(name)(images.images).argmax(1).numpy()
    assert (told == study.clean_prediction.sel(target=name)).mean() > 0.98
    shipped = ms.open_study(DATA / "fashion69").isel(image=slice(None, None, 4))
    old = dict(source=shipped.source.values, target=shipped.target.values)
    np.testing.assert_array_equal(
        study.adversarial_prediction.sel(old),
        shipped.adversarial_prediction.transpose(*study.adversarial_prediction.dims),
    )
