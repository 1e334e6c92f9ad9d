"""The engine and what it leaves on disk: right, gone on with, extended, or refused."""

import json
import math
import re
import shlex
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import processes
import pytest
import tiny
import torch
import zarr
from tiny import Killed, files
from torch import nn

import modelsim as ms
from modelsim.transfer import Engine, attack_settings
from modelsim.zoo import fingerprint

TESTED = dict(test_images=tiny.image_set(30, seed=1))


def transfer(out, *names, at=None, **changed):
    """Run the study of some models with test images; return what the attack was called with."""
    calls, zoo = [], {name: tiny.zoo()[name] for name in names or tiny.zoo()}
    watcher = calls.append if at is None else tiny.killing(calls.append, at)
    tiny.transfer(out, watcher=lambda *given: watcher(given), **({"zoo": zoo} | TESTED | changed))
    return calls


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished study, made without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    transfer(folder)
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def test_engine_agrees_with_one_attack_for_every_pair(whole):
    study, zoo = ms.open_study(whole), tiny.zoo()
    images, test_images = tiny.image_set(), TESTED["test_images"]
    for name, network in zoo.items():
        batches = zip(images.images.split(5), images.labels.split(5), (0, 5, 10), strict=True)
        made = torch.cat([tiny.attack(network.eval(), x, y, seed=start) for x, y, start in batches])
        for target, shown in zoo.items():
            found = study.adversarial_prediction.sel(source=name, target=target)
            assert found.values.tolist() == tiny.predicted(shown, (made * 255).round() / 255), (name, target)
        told = study.clean_prediction.sel(target=name)
        assert told.values.tolist() == tiny.predicted(network, images.images)
        probability = network(test_images.images).softmax(1).detach().numpy()
        assert abs(study.clean_probability.sel(target=name) - probability).max() < 0.000051
    assert study.label.values.tolist() == images.labels.tolist()
    assert (tuple(study.image.values), tuple(study["class"].values)) == (images.ids, images.classes)
    assert list(study.source.values) == list(study.target.values) == list(zoo)
    assert study.clean_probability.dims == ("target", "test_image", "class")
    assert tuple(study.test_image.values) == test_images.ids
    assert study.test_label.values.tolist() == test_images.labels.tolist()


def test_attributes_and_fingerprints_tell_how_the_study_was_made(whole):
    study, images, zoo = ms.open_study(whole), tiny.image_set(), tiny.zoo()
    versions = json.loads(study.attrs["versions"])
    assert set(versions) == {"modelsim", "torch", "timm", "numpy"}
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert json.loads(study.attrs["attack_settings"]) == {"eps": 0.1, "steps": 3, "seed": 0}
    expected = {
        "attack": "tiny.attack",
        "images": "tiny",
        "images_sha256": images.fingerprint(),
        "test_images": "tiny",
        "test_images_sha256": TESTED["test_images"].fingerprint(),
        "batch_size": 5,
        "fold": "true",
        "perturbations": "true",
    }
    assert study.attrs.items() >= expected.items()
    assert "canvas" in study.attrs["canvas_rule"]
    part = study.sel(target=["third", "first"]).isel(image=[7, 2])
    assert part.model_sha256.values.tolist() == [fingerprint(zoo[name]) for name in ("third", "first")]
    assert tuple(part.image_sha256.values) == images[[7, 2]].hashes()


def test_hand_made_studies_of_these_tests_have_the_layout_of_a_real_one(tmp_path):
    real, made = (
        {n: (v.dims, str if v.dtype.kind == "U" else v.dtype) for n, v in study.variables.items()}
        for study in (tiny.transfer(tmp_path), tiny.study([0], [[0]], [[[0]]]))
    )
    assert real == made


def test_study_of_8_bit_images_is_that_of_their_255ths_and_only_parts_are_made_float(tmp_path, monkeypatch):
    plain = tiny.image_set(300)
    given = replace(plain, images=(plain.images * 255).round().byte())
    mine = dict(zoo=tiny.zoo(), images=given, test_images=given, attack=tiny.attack)

    def study(folder, images):
        tiny.transfer(tmp_path / folder, images=images, test_images=images, batch_size=25)
        made = ms.compare(tiny.mlp(5), ms.open_study(tmp_path / folder), **(mine | {"images": images}))
        return tiny.files(tmp_path / folder), made

    files, compared = study("plain", plain)
    sizes = []
    for module in ("images", "attacks", "study"):
        module = sys.modules[f"modelsim.{module}"]

        def noting(pixels, make=module.to_canvas):
            sizes.append(len(pixels))
            return make(pixels)

        monkeypatch.setattr(module, "to_canvas", noting)
    files_of_8_bit, compared_of_8_bit = study("8 bit", given)
    assert files == files_of_8_bit
    assert compared.identical(compared_of_8_bit)
    assert max(sizes) <= 100


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_networks_are_loaded_once_each_while_there_is_room_and_the_study_is_the_same(kept, whole, tmp_path):
    names = ["first", "third", "second"]
    weights = [sum(p.numel() * 4 for p in tiny.zoo()[name].parameters()) for name in names]
    weights[1] += 8 * 4 + 8  # what a batch normalisation counts; folded, it takes the convolution's place
    loads = []
    zoo = ms.Zoo(names, lambda name: loads.append(name) or tiny.zoo()[name])
    memory = (sum(weights[:kept]) + 1) / 2**30
    study = tiny.transfer(tmp_path, zoo=zoo, network_memory=memory, **TESTED)
    assert [loads.count(name) for name in names[:kept]] == [1] * kept
    # One is kept at hand in any case, so that first and last of a round are the same.
    assert all(3 < loads.count(name) <= 7 for name in names[kept:]), loads
    expected = ms.open_study(whole).sel(source=names, target=names)
    assert tiny.same_predictions(study, expected)


def test_memory_does_not_grow_with_the_number_of_networks_beyond_the_room_for_them(tmp_path):
    for n in (3, 12):
        assert processes.end(processes.start(processes.note_memory, tmp_path / str(n), n)) == 0
    few, many = (float((tmp_path / str(n)).read_text()) for n in (3, 12))
    assert many - few < 50  # of 25 million weights, each network has 100 MB


FLAGS = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
def test_precision_holds_while_a_network_is_at_work_is_recorded_and_then_as_before(
    precision, expected, whole, tmp_path
):
    seen, before = [], [flag.fp32_precision for flag in FLAGS]
    watcher = lambda *_: seen.extend(flag.fp32_precision for flag in FLAGS)  # noqa: E731
    study = tiny.transfer(tmp_path, watcher=watcher, precision=precision, **TESTED)
    assert (set(seen), [flag.fp32_precision for flag in FLAGS]) == ({expected}, before)
    assert study.attrs.get("precision", "fp32") == precision
    expected = ms.open_study(whole)
    if precision == "bf16":
        assert 0 < (study.perturbation != expected.perturbation).mean() < 0.05
        assert (study.adversarial_prediction == expected.adversarial_prediction).mean() > 0.9
    else:  # of which a CPU knows nothing
        assert {*study.attrs} ^ {*expected.attrs} == ({"precision"} if precision == "tf32" else set())
        assert study.perturbation.equals(expected.perturbation)
    files_before, others = files(tmp_path), {"fp32", "tf32", "bf16"} - {precision}
    for other in others:
        there, now = (p if p != "fp32" else "absent" for p in (precision, other))
        with pytest.raises(ValueError, match=f"precision: {there} there, {now} now"):
            tiny.transfer(tmp_path, precision=other, **TESTED)
    assert files(tmp_path) == files_before


def test_study_in_bfloat16_is_that_of_networks_under_autocast_and_is_extended_in_it(tmp_path):
    images, zoo = tiny.image_set(), tiny.zoo()
    tiny.transfer(
        tmp_path, zoo={name: zoo[name] for name in ("first", "second")}, precision="bf16", fold=False
    )
    study = tiny.transfer(tmp_path, zoo=zoo, precision="bf16", fold=False)
    compared = ms.compare(
        tiny.mlp(5),
        study,
        images=images,
        zoo=zoo,
        attack=tiny.attack,
        out=tmp_path / "compared",
        progress=False,
    )
    assert compared.attrs["precision"] == "bf16"
    networks = {name: network.eval() for name, network in (zoo | {"mine": tiny.mlp(5)}).items()}
    for source, network in networks.items():

        def under_autocast(x, network=network):
            with torch.autocast("cpu", torch.bfloat16):
                return network(x)

        made = []
        for start in (0, 5, 10):
            x, y = images.images[start : start + 5], images.labels[start : start + 5]
            generator = torch.Generator().manual_seed(start)
            adversarial = (x + torch.empty_like(x).uniform_(-0.1, 0.1, generator=generator)).clamp(0, 1)
            for _ in range(3):
                leaf = adversarial.detach().requires_grad_()
                loss = nn.functional.cross_entropy(under_autocast(leaf).float(), y, reduction="sum")
                step = 0.05 * torch.autograd.grad(loss, leaf)[0].sign()
                adversarial = torch.clamp(leaf + step, (x - 0.1).clamp(min=0), (x + 0.1).clamp(max=1))
            made.append(adversarial.detach())
        made = (torch.cat(made) * 255).round() / 255
        assert torch.equal(ms.adversarial_images(compared, source, images), made), source
        for target, shown in networks.items():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                told = shown(made).argmax(1)
            found = compared.adversarial_prediction.sel(source=source, target=target)
            assert found.values.tolist() == told.tolist(), (source, target)


def test_each_source_is_attacked_once_in_batches_of_advancing_seed(tmp_path):
    calls = transfer(tmp_path, attack=partial(tiny.attack, seed=100), fold=False)
    assert [call[1:] for call in calls] == [(5, 100), (5, 105), (2, 110)] * 3
    sources = [fingerprint(network) for network in tiny.zoo().values() for _ in range(3)]
    assert [fingerprint(call[0]) for call in calls] == sources


@pytest.mark.filterwarnings("ignore:model")
def test_adversarial_images_are_rounded_to_the_nearest_255th(tmp_path):
    """A change of 0.6 / 255 becomes 1, of 0.4 / 255 becomes 0; truncation would make both 0."""
    grey = torch.full((2, 1, 8, 8), 100 / 255)
    images = ms.ImageSet(grey, torch.tensor([0, 1]), ("up", "down"), tiny.CLASSES, "grey")
    sign = torch.tensor([-1, -1, 1, 1]).repeat(8, 2)

    def change(classifier, images, labels):
        size = torch.tensor([0.4, 0.6])[labels].view(-1, 1, 1, 1)
        return images + size * torch.tensor([-1, -1, 1, 1]).repeat(8, 2) / 255

    study = tiny.transfer(tmp_path, images=images, attack=change)
    assert (study.perturbation.sel(image="up") == 0).all()
    assert (study.perturbation.sel(image="down").values == sign.numpy()).all()


def test_stored_change_rebuilds_exactly_what_the_targets_saw(tmp_path, images):
    seen = []

    class Watching(tiny.Odd):
        def forward(self, x):
            if not torch.is_grad_enabled() and len(x) == 12:
                seen.append(x.clone())
            return super().forward(x)

    zoo = {"watching": Watching(), "other": tiny.linear(2)}
    study = tiny.transfer(tmp_path, zoo=zoo, attack=partial(tiny.attack, eps=0.3))
    *before_the_first_attack, of_watching, of_other = seen
    assert all(torch.equal(shown, images.images) for shown in before_the_first_attack)
    for source, shown in (("watching", of_watching), ("other", of_other)):
        rebuilt = ms.adversarial_images(study, source, images)
        assert torch.equal(rebuilt, shown)
        assert (rebuilt - images.images).mul(255).abs().max().round() == 77
    with pytest.raises(ValueError, match="'forth' is not a source of the study: it has watching, other"):
        ms.adversarial_images(study, "forth", images)


# Interrupted, extended


@pytest.mark.parametrize("at", [0, 2, 4, 8])
def test_interrupted_run_goes_on_after_the_last_finished_source(at, whole, tmp_path):
    with pytest.raises(Killed):
        transfer(tmp_path, at=at)
    with pytest.raises(ValueError, match=f"has {at // 3} of 3 sources: run the same"):
        ms.open_study(tmp_path)
    (tmp_path / "study.zarr" / "perturbation" / "c.1.0.0.0.0.0123.partial").write_bytes(b"half a chunk")
    assert len(transfer(tmp_path)) == 9 - 3 * (at // 3)
    assert files(tmp_path) == files(whole)


def of_a_source(array, *_):
    return array.ndim and array.name.strip("/") in ("perturbation", "adversarial_prediction", "finished")


@pytest.mark.parametrize(("write", "attacks"), [(0, 9), (1, 6), (2, 6), (3, 6)])
def test_run_killed_between_two_writes_of_a_source_repeats_that_source(write, attacks, whole, tmp_path):
    with tiny.killed_at(zarr.Array, "__setitem__", write, counts=of_a_source):
        transfer(tmp_path)
    assert len(transfer(tmp_path)) == attacks
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("creation", [0, 5, 12])
def test_run_killed_while_the_store_is_created_leaves_nothing_like_a_study(creation, whole, tmp_path):
    with tiny.killed_at(zarr.Group, "create_array", creation):
        transfer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no study at"):
        ms.open_study(tmp_path)
    transfer(tmp_path)
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize(
    ("before", "at", "attacks"),
    [
        (("first",), None, 6),
        (("third", "first"), None, 3),
        (("third", "second", "first"), None, 0),
        (("first", "second", "third"), None, 0),
        (("third", "second"), 4, 6),
    ],
)
def test_extended_study_has_the_bytes_of_one_made_at_once_and_attacks_only_what_is_new(
    before, at, attacks, whole, tmp_path
):
    with nullcontext() if at is None else pytest.raises(Killed):
        transfer(tmp_path, *before, at=at)
    assert len(transfer(tmp_path)) == attacks
    assert files(tmp_path) == files(whole)
    assert transfer(tmp_path) == []


def test_test_images_can_be_added_later_without_any_attack(whole, tmp_path):
    without = tiny.transfer(tmp_path)
    assert not {"clean_probability", "test_image", "test_label"} & set(without.variables)
    assert transfer(tmp_path) == []
    assert files(tmp_path) == files(whole)


def test_extension_evaluates_each_pair_once(whole, tmp_path, monkeypatch):
    evaluated, real = [], Engine.predictions
    transfer(tmp_path)
    monkeypatch.setattr(Engine, "predictions", lambda *given: evaluated.append(given[1]) or real(*given))
    transfer(tmp_path, zoo=tiny.zoo() | {"fourth": tiny.linear(4)})
    on_clean_images = [*tiny.zoo(), "fourth"]
    assert evaluated == [*on_clean_images, *["fourth"] * 3, *tiny.zoo(), "fourth"]


@pytest.mark.parametrize("renaming", range(2))
@pytest.mark.parametrize(("options", "attacks"), [({}, 3), (dict(fold=False, perturbations=False), 9)])
def test_extension_killed_while_a_store_replaces_another_loses_nothing(renaming, options, attacks, tmp_path):
    """Options that needn't be repeated are found also in the store that was put aside."""
    transfer(tmp_path / "whole", **options)
    transfer(tmp_path / "killed", "first", "second", **options)
    with tiny.killed_at(Path, "rename", renaming):
        transfer(tmp_path / "killed")
    assert len(transfer(tmp_path / "killed")) == attacks
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


# Refused


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (dict(attack=partial(tiny.attack, eps=0.2)), "attack_settings.eps: 0.1 there, 0.2 now"),
        (dict(attack=ms.pgd), "attack: tiny.attack there, modelsim.attacks.pgd now"),
        (dict(attack=ms.fgsm), "attack_settings.steps: 3 there, absent now"),
        (dict(images=tiny.image_set(seed=1)), "(images_sha256: "),
        (dict(test_images=tiny.image_set(30, seed=2)), "(test_images_sha256: "),
        (dict(batch_size=4), "batch_size: 5 there, 4 now"),
        (dict(fold=False), "fold: True there, False now"),
        (dict(zoo=tiny.zoo() | {"first": tiny.linear(9)}), "models.first: "),
        (dict(zoo={"first": tiny.linear(1), "second": tiny.mlp(2)}), "models.third: "),
    ],
)
def test_study_with_other_settings_is_refused_naming_the_difference_and_left_alone(
    changed, difference, whole
):
    before = files(whole)
    with pytest.raises(ValueError, match=re.escape(difference)):
        transfer(whole, **changed)
    assert files(whole) == before


def test_settings_of_an_attack_are_its_keywords_with_what_partial_gave():
    def attack(classifier, images, labels, *, eps=0.1, norm="inf", seed=None, **more):
        return images

    def needing(classifier, images, labels, *, eps):
        return images

    assert attack_settings(attack) == {"eps": 0.1, "norm": "inf", "seed": None}
    given = partial(partial(attack, eps=0.2), seed=3, more=True)
    assert attack_settings(given) == {"eps": 0.2, "norm": "inf", "seed": 3, "more": True}
    with pytest.raises(ValueError, match=r"the attack needs eps=….*functools\.partial"):
        attack_settings(needing)
    with pytest.raises(
        ValueError, match=r"needing\(classifier, images, labels, \*, eps\) can't be given norm$"
    ):
        attack_settings(partial(needing, norm="inf"))
    for value in ([1, 2], math.nan, math.inf):
        with pytest.raises(ValueError, match=re.escape(f"can't record eps={value}")):
            attack_settings(partial(needing, eps=value))


OTHER_CLASSES = replace(tiny.image_set(), classes=("ant", "bee", "dog"))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(zoo={}), ValueError, "the zoo is empty"),
        (dict(zoo=[tiny.linear(0)]), TypeError, "a zoo must be a mapping .*, got list"),
        (dict(images=tiny.image_set().images), TypeError, "images must be a modelsim.ImageSet, got Tensor"),
        (dict(precision="fp16"), ValueError, "precision must be fp32, tf32 or bf16, got 'fp16'"),
        (dict(network_memory=-1), ValueError, "network_memory must be at least 0, got -1"),
        (dict(test_images=(1, 2)), TypeError, "test_images must be a modelsim.ImageSet, got tuple"),
        (dict(zoo={"": tiny.linear(0)}), ValueError, "names of models must not be empty, got ''"),
        (dict(zoo={3: tiny.linear(0)}), TypeError, "names of models must be strings, got 3"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (dict(batch_size=2.0), TypeError, "batch_size must be a whole number, got 2.0"),
        (dict(workers=0), ValueError, "workers must be at least 1, got 0"),
        (dict(workers=1.5), TypeError, "workers must be a whole number, got 1.5"),
        (dict(workers=2, scheduler="tcp://x"), ValueError, "give workers=2 or scheduler='tcp://x', not both"),
        (dict(attack=partial(tiny.attack, eps=math.nan)), ValueError, "can't record eps=nan"),
        (
            dict(test_images=OTHER_CLASSES),
            ValueError,
            "the test images have classes .*'dog'.*, the images .*'cow'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(changed, error, message, tmp_path):
    with pytest.raises(error, match=message):
        transfer(tmp_path / "out", **changed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "culprit"),
    [
        (
            lambda classifier, images, labels: images + 1,
            r"what the attack returns must lie in .*clamp\(0, 1\)",
        ),
        (lambda classifier, images, labels, *, eps=0.1: images * 0.8, r"by 0\.\d+, more than its eps=0\.1$"),
        (lambda classifier, images, labels: images[:1], r"turned \(5, 1, 8, 8\) into \(1, 1, 8, 8\)"),
        (lambda classifier, images, labels: images * torch.nan, "5 image.* contain NaN"),
        (lambda classifier, images, labels: 1 - (images > 0.5).float(), "doesn't fit the store's 127/255"),
        (lambda classifier, images, labels: None, "NoneType"),
    ],
)
def test_attack_that_leaves_the_canvas_is_refused(bad, culprit, tmp_path):
    with pytest.raises((ValueError, TypeError), match=f"model 'first': .*{culprit}"):
        transfer(tmp_path, attack=bad)
    with pytest.raises(ValueError, match="has 0 of 3 sources"):
        ms.open_study(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        lambda store: store.write_text("mine"),
        lambda store: zarr.create_group(store, attributes={"owner": "me"}),
        lambda store: zarr.create_group(store, attributes={"format": "modelsim study 1"}),
        lambda store: zarr.create_array(store, shape=(2,), dtype="int8"),
    ],
    ids=["folder", "file", "foreign group", "other format", "foreign array"],
)
def test_foreign_store_is_refused_by_name_and_left_alone(make, tmp_path):
    store = tmp_path / "study.zarr"
    make(store)
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=re.escape(str(store))):
        transfer(tmp_path)
    with pytest.raises((OSError, ValueError), match=re.escape(str(store))):
        ms.open_study(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_place_that_cannot_be_written_is_named(below, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / below
    with pytest.raises(OSError, match=f"can't write to {re.escape(str(out))}"):
        transfer(out)
    assert files(tmp_path) == {"file": b"mine"}


def test_absent_study_is_named_with_a_command_that_can_be_pasted(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no study at .*modelsim transfer --out") as caught:
        ms.open_study(tmp_path / "a b")
    command = shlex.split(str(caught.value).split("`")[1])
    assert command[-2:] == ["--out", str(tmp_path / "a b")]


def test_folder_of_the_store_is_answered_with_the_folder_of_the_study(copied):
    store, before = copied / "study.zarr", files(copied)
    for use in (ms.open_study, transfer):
        with pytest.raises(
            FileNotFoundError, match=f"give the folder that it is in, {re.escape(str(copied))}$"
        ):
            use(store)
    assert files(copied) == before


def test_study_is_read_from_where_it_was_opened(copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    study = ms.open_study("copied")
    monkeypatch.chdir("/")
    assert abs(study.perturbation.values).max() > 0


def test_study_is_found_from_every_folder_of_a_clone_and_the_nearest_wins(tmp_path, monkeypatch):
    clone, outside = tmp_path / "clone", tmp_path / "elsewhere"
    for folder in (clone / "book" / "deep", outside):
        folder.mkdir(parents=True)
    transfer(clone / "data" / "study")
    for folder in (clone, clone / "book", clone / "book" / "deep"):
        monkeypatch.chdir(folder)
        assert ms.open_study("data/study").sizes["source"] == 3
    transfer(clone / "book" / "data" / "study", "first", "second")
    assert ms.open_study("data/study").sizes["source"] == 2
    monkeypatch.chdir(outside)
    with pytest.raises(FileNotFoundError, match=r"elsewhere nor from a folder above it: give the path"):
        ms.open_study("data/study")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_to_any_file_names_the_store(damage, copied):
    there = re.escape(str(copied / "study.zarr"))
    for path in sorted((copied / "study.zarr").rglob("*")):
        is_description = path.name == "zarr.json"
        if path.is_file() and not (is_description and damage is flip):  # which may give another word
            content = path.read_bytes()
            damage(path)
            for use in (ms.open_study, transfer)[: 2 if is_description and damage is Path.unlink else 1]:
                with pytest.raises((ValueError, OSError), match=there):
                    use(copied)
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("chunk", "attacks"),
    [
        ("perturbation/c.1.0.0.0.0", 3),
        ("adversarial_prediction/c.1.0.0", 0),
        ("images_without_gradient/c.1", 0),
        ("clean_probability/c.1.0.0", 0),
    ],
)
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_damaged_source_is_named_and_following_the_advice_restores_it(chunk, attacks, damage, copied, whole):
    damage(copied / "study.zarr" / chunk)
    for use in (ms.open_study, transfer):
        with pytest.raises(ValueError, match=r"source 1 is truncated or corrupted") as caught:
            use(copied)
        assert str(copied) in str(caught.value)
    Path(re.search(r"delete (\S+) and run", str(caught.value))[1]).unlink()
    assert len(transfer(copied)) == attacks
    assert files(copied) == files(whole)


LOST = tiny.Odd(after=lambda logits: logits.roll(1, dims=1))
"""Its classes come in another order."""


@pytest.mark.parametrize(
    ("expected", "last", "message"),
    [
        ({"first": 0.99, "third": 0.5}, None, None),
        (
            {"first": 1.12},
            None,
            r"model 'first' is right on .* of 510 clean images, below 102\.0% \(10 points",
        ),
        (
            {},
            LOST,
            r"model 'lost' is right on .* below .*half of its peers'\): look at the order of its classes",
        ),
    ],
)
def test_network_that_is_less_accurate_than_it_must_be_stops_the_run_before_any_attack(
    expected, last, message, tmp_path
):
    zoo, seen = tiny.zoo() | ({"lost": last} if last else {}), []
    given = dict(
        zoo=zoo, images=tiny.image_set(510), batch_size=510, watcher=lambda *called: seen.append(called)
    )
    if message is None:
        tiny.transfer(tmp_path, expected_accuracy=expected, **given)
        assert len(seen) == 3
        return
    with pytest.raises(ValueError, match=message):
        tiny.transfer(tmp_path / "none", expected_accuracy=expected, **given)
    assert (seen, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.filterwarnings("ignore:model")
def test_without_enough_images_or_without_a_word_a_run_goes_on(tmp_path):
    zoo = tiny.zoo() | {"lost": LOST}
    tiny.transfer(tmp_path / "few", zoo=zoo, images=tiny.image_set(498), expected_accuracy={"first": 1.2})
    tiny.transfer(tmp_path / "silent", zoo=zoo, images=tiny.image_set(510))
