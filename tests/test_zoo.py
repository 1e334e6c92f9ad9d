import json
from collections import OrderedDict

import pytest
import safetensors.torch
import timm
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import modelsim as ms
from modelsim import catalogue, zoo


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "resnet50.safetensors"
    zoo.save_weights(ms.build("resnet50", seed=1), path, {"recipe": "{}"})
    return path


@pytest.mark.parametrize("name", ms.CATALOGUE)
def test_architecture_is_the_published_one_made_small_and_sees_the_whole_canvas(name):
    classifier = ms.build(name)
    assert zoo.count_parameters(classifier) <= 450_000
    assert zoo.count_flops(classifier) <= 20e6
    with torch.device("meta"):
        published = timm.create_model(name, pretrained=False)
    assert isinstance(classifier.network, type(published))
    # Dropping paths is a matter of the training recipe, which is one for all.
    ours, theirs = (
        {type(m).__name__ for m in model.modules() if m is not model} - {"DropPath"}
        for model in (classifier.network, published)
    )
    assert ours == theirs
    generator = torch.Generator().manual_seed(0)
    for parameter in classifier.eval().parameters():
        # Some heads start at 0 and would hide the gradient.
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    canvas = torch.rand(2, 1, 28, 28, generator=generator).requires_grad_(True)
    logits = classifier(canvas)
    assert logits.shape == (2, 10)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), canvas)
    regions = nn.functional.max_pool2d(gradient.abs(), 4)
    assert regions.shape[2:] == (7, 7)
    assert (regions > 0).all()


def test_architecture_is_its_entry_point_of_timm_with_other_settings_or_a_model_of_its_own():
    assert len(catalogue._ROWS) == len(ms.CATALOGUE)  # none hides another of its name
    entry = ms.Architecture("vit_tiny_patch16_224", "Transformer", dict(patch_size=8, depth=2), 32)
    network = entry.network(n_classes=7)
    assert (len(network.blocks), network.embed_dim) == (2, 192)
    assert network.patch_embed.proj.weight.shape == (192, 1, 8, 8)
    # The size comes from the row: 4 x 4 patches and the class token.
    assert network.pos_embed.shape == (1, 4 * 4 + 1, 192)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    for name in ("resnet50", "swin_tiny_patch4_window7_224"):  # which tell it too
        assert ms.components(ms.build(name).network)["Input resolution"] == "64 x 64"

    def linear(*, in_chans, num_classes, side):
        return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * side * side, num_classes))

    entry = ms.Architecture("mine", "CNN", dict(side=9), 9, model=linear)
    classifier = zoo.assemble(entry, seed=3, n_classes=4)
    assert classifier(torch.rand(2, 1, 28, 28)).shape == (2, 4)
    assert zoo.fingerprint(classifier) == zoo.fingerprint(zoo.assemble(entry, seed=3, n_classes=4))


def test_flops_and_parameters_of_a_linear_layer_are_counted_by_hand():
    layer = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)).train()
    assert zoo.count_flops(layer) == 2 * 28 * 28 * 10
    assert zoo.count_parameters(layer) == 28 * 28 * 10 + 10
    assert layer.training
    with torch.device("meta"):  # on shapes alone, as pages do for networks of full size
        assert zoo.count_flops(layer.to("meta")) == 2 * 28 * 28 * 10


def test_classifier_normalises_by_its_own_mean_and_deviation_which_its_fingerprint_tells():
    settings = [dict(mean=[0.5], std=[0.25]), dict(mean=[0.4], std=[0.25]), dict(mean=[0.5], std=[0.5])]
    classifiers = [ms.Classifier(nn.Flatten(), input_size=2, **given) for given in settings]
    assert classifiers[0](torch.full((1, 1, 2, 2), 0.75)).tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert len(set(map(zoo.fingerprint, classifiers))) == 3


def test_build_depends_on_its_seed_and_leaves_the_global_random_state_alone():
    before = torch.manual_seed(5).get_state()
    prints = [zoo.fingerprint(ms.build("resnet50", seed=seed)) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mobilenetv3_small_050", 64),
        ("resnet18.a1_in1k", 64),
        ("eva02_tiny_patch14_224", 64),  # wants img_size
        ("botnet50ts_256", 96),  # wants img_size, and runs at no 72
    ],
)
def test_stranger_of_timm_is_built_at_full_width_with_the_smallest_input(name, size):
    before = torch.manual_seed(5).get_state()
    built, again, other = (ms.build(name, seed=seed, n_classes=7) for seed in (1, 1, 2))
    assert zoo.fingerprint(built) == zoo.fingerprint(again) != zoo.fingerprint(other)
    assert torch.equal(torch.get_rng_state(), before)
    assert built.input_size == size
    assert built.eval()(torch.rand(2, 1, 28, 28)).shape == (2, 7)
    assert built.network.num_features == timm.create_model(name).num_features


@given(st.sampled_from(list(ms.CATALOGUE)), st.integers(0, 10**6))
def test_model_name_is_split_into_architecture_and_seed(architecture, seed):
    assert zoo.split_model_name(f"{architecture}-seed{seed}") == (architecture, seed)
    assert zoo.split_model_name(architecture) == (architecture, 0)


def test_zoo_loads_a_model_only_when_it_is_asked_for():
    asked = []
    opened = zoo.Zoo(["a", "b"], lambda name: asked.append(name) or tiny.linear(0))
    assert (list(opened), len(opened), "a" in list(opened), asked) == (["a", "b"], 2, True, [])
    opened["b"]
    assert asked == ["b"]
    for names in ("resnet50", iter(["resnet50"])):
        assert list(ms.load_zoo(names=names)) == ["resnet50"]


SECOND = ms.load_zoo(names=["resnet50-seed1"])
UNKNOWN = "unknown architecture 'resnet5O'.*'resnet50'"


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: ms.build("resnet5O"), ValueError, UNKNOWN),
        (lambda: ms.load_zoo(names=["resnet5O"]), ValueError, UNKNOWN),
        (lambda: ms.load_zoo(names=["resnet50-seedx"]), ValueError, "has no seed: .* resnet50-seed1$"),
        (lambda: ms.build("davit_lage"), ValueError, "did you mean 'davit_large' or (?!'davit_large')"),
        (lambda: ms.build("resnet18.nonsense"), ValueError, "'resnet18.nonsense': did you mean 'resnet18"),
        (lambda: ms.read_components(["resnet50.nonsense"]), ValueError, "model of timm .* mean 'resnet50"),
        (lambda: ms.build("§§§"), ValueError, r"known are (\w+, ){12}and \d+ more$"),
        (lambda: ms.build(5), TypeError, "names of timm's models must be strings, got 5"),
        (lambda: ms.build("csatv2"), ValueError, "csatv2 of timm gives no logits .* at 144 to 512 pixels"),
        (lambda: ms.load_zoo("fashion"), ValueError, "unknown study 'fashion'.*'fashion69'"),
        (lambda: SECOND["resnet50-seed2"], KeyError, "model 'resnet50-seed2'.*'resnet50-seed1'"),
        (lambda: ms.build("resnet50")(torch.rand(2, 3, 9, 9)), ValueError, r"\(n, 1, .*got \(2, 3, 9, 9\)"),
        (lambda: ms.build("resnet50", seed=-1), ValueError, "seed must be at least 0, got -1"),
        (lambda: ms.build("resnet50", seed=1.5), TypeError, "seed must be a whole number, got 1.5"),
        (lambda: ms.build("resnet50", n_classes=0), ValueError, "n_classes must be at least 1, got 0"),
        (lambda: zoo.Zoo([1, 2], tiny.linear), TypeError, "names of models must be strings, got 1"),
        (lambda: zoo.Zoo(["a", " \n"], tiny.linear), ValueError, r"names .* must not be empty, got ' \\n'"),
        (lambda: zoo.Zoo(["b", "a", "b"], tiny.linear), ValueError, "duplicate model names: b$"),
    ],
)
def test_what_can_not_be_built_or_named_is_refused(use, error, message):
    with pytest.raises(error, match=message):
        use()


def test_zoo_finds_its_weights_from_another_folder_and_says_how_to_train_absent_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(ms.data_directory().parent)
    monkeypatch.setenv("MODELSIM_DATA", "data")
    opened = ms.load_zoo(names=["resnet50"])
    monkeypatch.chdir(tmp_path)
    assert len(list(opened["resnet50"].parameters())) > 0
    for name in ("fashion-mnist", "fashion69"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("MODELSIM_DATA", str(tmp_path))
    assert list(ms.load_zoo()) == list(ms.CATALOGUE)
    with pytest.raises(
        FileNotFoundError, match=r"resnet50-seed1\.safetensors.*modelsim train resnet50-seed1"
    ):
        ms.load_zoo(names=["resnet50-seed1"])["resnet50-seed1"]


# The second has weights that several of its modules share.
@pytest.mark.parametrize("name", ["resnet50", "coat_lite_small"])
def test_stored_weights_come_back_rounded_to_half_precision(name, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    before, after = ms.build(name, seed=1), ms.build(name, seed=2)
    zoo.save_weights(before, path, {"note": "kept"})
    zoo.load_weights(after, path)
    loaded = after.state_dict()
    for key, value in before.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded[key], expected), key
        assert loaded[key].dtype == value.dtype, key
    assert zoo.read_metadata(path)["note"] == "kept"
    assert list(tmp_path.iterdir()) == [path]
    readable = safetensors.torch.load_file(path)  # without this package
    assert {value.dtype for value in readable.values() if value.is_floating_point()} == {torch.float16}


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


def with_another_hash(content):
    digest = json.loads(content[8 : content.index(b"}}") + 2])["__metadata__"]["sha256"]
    return content.replace(digest.encode(), digest[::-1].encode())


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda content, kept=kept: content[:kept] for kept in (0, 4, 1000, -1)),
        *(lambda content, at=at: flipped(content, at) for at in (0, 8, 12, -1, -20_000)),
        with_another_hash,
    ],
)
def test_damaged_weight_file_is_named_with_the_way_out(stored, damage):
    stored.write_bytes(damage(stored.read_bytes()))
    message = r"resnet50\.safetensors is truncated or corrupted.*modelsim train resnet50"
    with pytest.raises(ValueError, match=message):
        zoo.load_weights(ms.build("resnet50"), stored)


def test_weights_of_another_architecture_are_refused(stored):
    with pytest.raises(ValueError, match=r"resnet50\.safetensors belongs to another architecture"):
        zoo.load_weights(ms.build("resnet50_gn"), stored)


def test_weights_of_the_network_that_a_classifier_wraps_are_read_from_a_plain_file(tmp_path):
    def classifier(seed, n_classes=3):
        layers = {"flat": nn.Flatten(), "network": tiny.linear(seed)[1], "head": nn.Linear(3, n_classes)}
        return ms.Classifier(nn.Sequential(OrderedDict(layers)), input_size=8)

    mine, path = classifier(1), tmp_path / "mine.safetensors"
    safetensors.torch.save_file(mine.network.state_dict(), path)
    loaded = classifier(2)
    zoo.load_weights(loaded, path)
    assert zoo.fingerprint(loaded) == zoo.fingerprint(mine)
    differing = r"2 weights .* such as network\.head\.bias: \(3,\) in the file, \(4,\) in the network$"
    with pytest.raises(ValueError, match=differing):
        zoo.load_weights(classifier(1, n_classes=4), path)
    path.write_bytes(path.read_bytes()[:-1])
    torch.save(mine.state_dict(), tmp_path / "mine.pt")
    for damaged in (path, tmp_path / "mine.pt"):
        with pytest.raises(
            ValueError, match=r"no safetensors.*: restore it, or write it anew with `save_weights`$"
        ):
            zoo.load_weights(mine, damaged)
    with pytest.raises(FileNotFoundError, match=r"no weights at .*: give the path of a file$"):
        zoo.load_weights(mine, tmp_path)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weight_that_is_not_finite_is_refused_and_nothing_written(tmp_path, value):
    classifier = tiny.linear(0)
    classifier[1].bias.data[1] = value
    with pytest.raises(ValueError, match=r"1\.bias is not finite"):
        zoo.save_weights(classifier, tmp_path / "tiny.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_weight_too_large_for_half_precision_is_kept_as_it_is(tmp_path):
    classifier, path = tiny.linear(0), tmp_path / "tiny.safetensors"
    classifier[1].bias.data[1] = 70_001.0
    zoo.save_weights(classifier, path)
    read = tiny.linear(1)
    zoo.load_weights(read, path)
    assert read[1].bias.tolist() == classifier[1].bias.tolist()
    assert read[1].weight.tolist() == classifier[1].weight.half().tolist()
