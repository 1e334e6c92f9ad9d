import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import zarr
from torch import nn

import modelsim as ms
from modelsim.transfer import Engine, attack_settings
from modelsim.zoo import fingerprint


class Killed(BaseException):
    pass


class Counting:
    """Notes what the attack of `tiny` is given; raises Killed at call number `fails_at`."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def __call__(self, classifier, n_images, seed):
        if len(self.calls) == self.fails_at:
            raise Killed
        self.calls.append((fingerprint(classifier), n_images, seed))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished study, made without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.transfer(folder)
    return folder


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """A finished study with probabilities on test images."""
    folder = tmp_path_factory.mktemp("tested")
    tiny.transfer(folder, test_images=tiny.image_set(30, seed=1))
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def test_engine_agrees_with_one_attack_for_every_pair(whole):
    study, zoo, images = ms.open_study(whole), tiny.zoo(), tiny.image_set()
    for source, attacked in zoo.items():
        for target, shown in zoo.items():
            expected = []
            for start in (0, 5, 10):
                batch = slice(start, start + 5)
                adversarial = tiny.attack(
                    attacked.eval(), images.images[batch], images.labels[batch], seed=start
                )
                with torch.inference_mode():
                    expected += shown.eval()((adversarial * 255).round() / 255).argmax(1).tolist()
            found = study.adversarial_prediction.sel(source=source, target=target)
            assert found.values.tolist() == expected, (source, target)


def test_clean_predictions_labels_and_names_are_those_given(whole):
    study, images = ms.open_study(whole), tiny.image_set()
    for name, classifier in tiny.zoo().items():
        with torch.inference_mode():
            expected = classifier.eval()(images.images).argmax(1).tolist()
        assert study.clean_prediction.sel(target=name).values.tolist() == expected
    assert study.label.values.tolist() == images.labels.tolist()
    assert tuple(study.image.values) == images.ids
    assert tuple(study["class"].values) == images.classes
    assert list(study.source.values) == list(study.target.values) == list(tiny.zoo())


def test_probabilities_on_the_test_images_are_those_of_each_classifier(tested):
    study, zoo, images = ms.open_study(tested), tiny.zoo(), tiny.image_set(30, seed=1)
    found = study.clean_probability
    assert found.dims == ("target", "test_image", "class")
    assert found.dtype.kind == "f"
    for name, classifier in zoo.items():
        with torch.inference_mode():
            expected = classifier.eval()(images.images).softmax(1).numpy()
        np.testing.assert_allclose(found.sel(target=name), expected, rtol=0, atol=0.000051)
    np.testing.assert_allclose(found.sum("class"), 1, rtol=0, atol=0.000051 * len(images.classes))
    assert tuple(found.test_image.values) == images.ids
    assert found.test_label.values.tolist() == images.labels.tolist()
    assert study.attrs["test_images"] == "tiny"
    assert study.attrs["test_images_sha256"] == images.fingerprint()


def test_rest_of_a_study_is_the_same_with_test_images_as_without(tested, whole):
    with_test, without = ms.open_study(tested), ms.open_study(whole)
    assert not {"clean_probability", "test_image", "test_label"} & set(without.variables)
    assert with_test.drop_vars(["clean_probability", "test_image", "test_label"]).equals(without)


@pytest.mark.parametrize("calls", [4, 8])
def test_interrupted_run_with_test_images_goes_on_too(calls, tested, tmp_path):
    given = dict(test_images=tiny.image_set(30, seed=1))
    with pytest.raises(Killed):
        tiny.transfer(tmp_path, watcher=Counting(fails_at=calls), **given)
    tiny.transfer(tmp_path, **given)
    assert files(tmp_path) == files(tested)


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_damaged_probabilities_are_named_and_following_the_advice_restores_them(damage, tested, tmp_path):
    copied = Path(shutil.copytree(tested, tmp_path / "copied"))
    chunk = copied / "study.zarr" / "clean_probability" / "c.1.0.0"
    flip(chunk) if damage == "flip" else chunk.unlink()
    with pytest.raises(ValueError, match="clean_probability of source 1 is truncated or corrupted") as caught:
        ms.open_study(copied)
    Path(re.search(r"delete (\S+) and run", str(caught.value))[1]).unlink()
    tiny.transfer(copied, test_images=tiny.image_set(30, seed=1))
    assert files(copied) == files(tested)


def test_test_images_of_other_classes_are_refused_and_nothing_written(tmp_path):
    other = replace(tiny.image_set(), classes=("ant", "bee", "dog"))
    with pytest.raises(ValueError, match=r"the test images have classes .*'dog'.*, the images .*'cow'"):
        tiny.transfer(tmp_path / "out", test_images=other)
    assert list(tmp_path.iterdir()) == []


def test_hand_made_studies_of_these_tests_have_the_layout_of_a_real_one(whole):
    real, made = ms.open_study(whole), tiny.study([0], [[0]], [[[0]]])
    layout = [
        {
            name: (array.dims, array.dtype.kind, array.dtype.itemsize)
            for name, array in study.data_vars.items()
        }
        for study in (real, made)
    ]
    assert layout[0] == layout[1]
    assert {n: c.dtype.kind for n, c in real.coords.items()} == {
        n: c.dtype.kind for n, c in made.coords.items()
    }


def test_each_source_is_attacked_once_in_batches_of_advancing_seed(tmp_path):
    counting = Counting()
    tiny.transfer(tmp_path, attack=partial(tiny.attack, seed=100), watcher=counting, fold=False)
    assert [call[1:] for call in counting.calls] == [(5, 100), (5, 105), (2, 110)] * 3
    sources = [call[0] for call in counting.calls]
    assert sources == [fingerprint(classifier) for classifier in tiny.zoo().values() for _ in range(3)]


@pytest.mark.filterwarnings("ignore:model")
def test_adversarial_images_are_rounded_to_the_nearest_255th(tmp_path):
    """A change of 0.6 / 255 becomes 1, of 0.4 / 255 becomes 0; truncation would make both 0."""
    images = ms.ImageSet(
        torch.full((2, 1, 8, 8), 100 / 255), torch.tensor([0, 1]), ("up", "down"), tiny.CLASSES, "grey"
    )

    def change(classifier, images, labels):
        size = torch.tensor([0.4, 0.6])[labels].view(-1, 1, 1, 1)
        sign = torch.tensor([-1, -1, 1, 1]).repeat(8, 2)
        return images + sign * size / 255

    study = tiny.transfer(tmp_path, images=images, attack=change)
    assert (study.perturbation.sel(image="up") == 0).all()
    expected = np.tile(np.array([-1, -1, 1, 1]), (8, 2))
    assert (study.perturbation.sel(image="down").values == expected).all()


def test_stored_change_rebuilds_exactly_what_the_targets_saw(tmp_path):
    seen = []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = tiny.linear(1)

        def forward(self, images):
            if not torch.is_grad_enabled() and len(images) == 12:
                seen.append(images.clone())
            return self.inside(images)

    images = tiny.image_set()
    study = tiny.transfer(
        tmp_path, zoo={"watching": Watching(), "other": tiny.linear(2)}, attack=partial(tiny.attack, eps=0.3)
    )
    before_the_first_attack, after = seen[:2], seen[2:]
    assert all(torch.equal(shown, images.images) for shown in before_the_first_attack)
    for source, shown in zip(("watching", "other"), after, strict=True):
        rebuilt = ms.adversarial_images(study, source, images)
        assert torch.equal(rebuilt, shown)
        assert (rebuilt - images.images).mul(255).abs().max().round() == 77


def test_adversarial_images_need_the_study_s_own_images_and_sources(whole):
    study = ms.open_study(whole)
    with pytest.raises(ValueError, match="not the images of the study"):
        ms.adversarial_images(study, "first", tiny.image_set(seed=1))
    with pytest.raises(ValueError, match="'forth' is not a source of the study: it has first, second, third"):
        ms.adversarial_images(study, "forth", tiny.image_set())


def test_classifiers_and_images_are_as_before(tmp_path):
    zoo, images = tiny.zoo(), tiny.image_set()
    zoo["second"].train()
    zoo["third"].eval()
    before = {name: {k: v.clone() for k, v in c.state_dict().items()} for name, c in zoo.items()}
    tiny.transfer(tmp_path, zoo=zoo, images=images)
    assert [c.training for c in zoo.values()] == [True, True, False]
    assert all(p.requires_grad and p.grad is None for c in zoo.values() for p in c.parameters())
    for name, classifier in zoo.items():
        assert all(torch.equal(v, before[name][k]) for k, v in classifier.state_dict().items())
    assert images.fingerprint() == tiny.image_set().fingerprint()


@pytest.mark.parametrize("calls", range(9))
def test_interrupted_run_goes_on_after_the_last_finished_source(calls, whole, tmp_path):
    with pytest.raises(Killed):
        tiny.transfer(tmp_path, watcher=Counting(fails_at=calls))
    with pytest.raises(ValueError, match=f"has {calls // 3} of 3 sources: run the same"):
        ms.open_study(tmp_path)
    counting = Counting()
    tiny.transfer(tmp_path, watcher=counting)
    assert len(counting.calls) == 9 - 3 * (calls // 3)
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("write", range(4))
def test_run_killed_between_two_writes_of_a_source_repeats_that_source(write, whole, tmp_path, monkeypatch):
    real, writes = zarr.Array.__setitem__, []

    def killed(array, *args):
        if array.ndim and array.name.strip("/") in ("perturbation", "adversarial_prediction", "finished"):
            writes.append(array.name)
            if len(writes) == write + 1:
                raise Killed
        real(array, *args)

    with monkeypatch.context() as patched:
        patched.setattr(zarr.Array, "__setitem__", killed)
        with pytest.raises(Killed):
            tiny.transfer(tmp_path)
    counting = Counting()
    tiny.transfer(tmp_path, watcher=counting)
    assert len(counting.calls) == (9 if write == 0 else 6)
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("creation", range(9))
def test_run_killed_while_the_store_is_created_leaves_nothing_like_a_study(
    creation, whole, tmp_path, monkeypatch
):
    real, created = zarr.Group.create_array, []

    def killed(group, *args, **kwargs):
        if len(created) == creation:
            raise Killed
        created.append(args)
        return real(group, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(zarr.Group, "create_array", killed)
        with pytest.raises(Killed):
            tiny.transfer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no study at"):
        ms.open_study(tmp_path)
    tiny.transfer(tmp_path)
    assert files(tmp_path) == files(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_run_ended_by_sigkill_finishes_with_the_same_bytes(whole, tmp_path):
    out = tmp_path / "killed"
    environment = os.environ | {"TINY_SLEEP": "0.2", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.Popen(
        [sys.executable, "-c", f"import tiny; tiny.transfer({str(out)!r})"], env=environment
    )
    marker = out / "study.zarr" / "finished" / "c.0"
    deadline = time.monotonic() + 100
    while not marker.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    with pytest.raises(ValueError, match="of 3 sources"):
        ms.open_study(out)
    leftover = out / "study.zarr" / "perturbation" / "c.1.0.0.0.0.0123.partial"
    leftover.write_bytes(b"half a chunk")
    counting = Counting()
    tiny.transfer(out, watcher=counting)
    assert len(counting.calls) <= 6
    assert files(out) == files(whole)


def test_finished_study_is_opened_without_any_attack(copied, whole):
    counting = Counting()
    study = tiny.transfer(copied, watcher=counting)
    assert counting.calls == []
    assert study.identical(ms.open_study(whole))
    assert files(copied) == files(whole)


def part_of_zoo(*names):
    return {name: tiny.zoo()[name] for name in names}


@pytest.mark.parametrize(
    "before", [("first",), ("third", "first"), ("second", "third"), ("third", "second", "first")]
)
def test_extended_study_has_the_bytes_of_one_made_at_once_and_attacks_only_what_is_new(
    before, whole, tmp_path
):
    tiny.transfer(tmp_path, zoo=part_of_zoo(*before))
    counting = Counting()
    tiny.transfer(tmp_path, watcher=counting)
    assert len(counting.calls) == 3 * (3 - len(before))
    assert files(tmp_path) == files(whole)


def test_test_images_can_be_added_later_without_any_attack(copied, tested):
    counting = Counting()
    tiny.transfer(copied, watcher=counting, test_images=tiny.image_set(30, seed=1))
    assert counting.calls == []
    assert files(copied) == files(tested)


def test_extension_evaluates_each_pair_once(copied, monkeypatch):
    evaluated, real = [], Engine.predictions

    def noted(engine, name, canvas):
        evaluated.append(name)
        return real(engine, name, canvas)

    monkeypatch.setattr(Engine, "predictions", noted)
    tiny.transfer(copied, zoo=tiny.zoo() | {"fourth": tiny.linear(4)})
    on_clean_images = 4
    assert len(evaluated) == on_clean_images + 3 + 4
    assert evaluated[4:7] == ["fourth"] * 3


@pytest.mark.parametrize("calls", range(3))
def test_extension_of_an_unfinished_study_loses_nothing(calls, whole, tmp_path):
    with pytest.raises(Killed):
        tiny.transfer(tmp_path, zoo=part_of_zoo("third", "second"), watcher=Counting(fails_at=3 + calls))
    counting = Counting()
    tiny.transfer(tmp_path, watcher=counting)
    assert len(counting.calls) == 6
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("renaming", range(2))
def test_extension_killed_while_one_store_replaces_the_other_loses_nothing(
    renaming, whole, tmp_path, monkeypatch
):
    tiny.transfer(tmp_path, zoo=part_of_zoo("first", "second"))
    real, renamed = Path.rename, []

    def killed(path, target):
        if path.name.startswith("study.zarr"):
            renamed.append(path)
            if len(renamed) == renaming + 1:
                raise Killed
        return real(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            tiny.transfer(tmp_path)
    counting = Counting()
    tiny.transfer(tmp_path, watcher=counting)
    assert len(counting.calls) == 3
    assert files(tmp_path) == files(whole)


def test_extension_by_several_workers_has_the_same_bytes(whole, tmp_path):
    tiny.transfer(tmp_path, zoo=part_of_zoo("second"))
    tiny.transfer(tmp_path, workers=2)
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"attack": partial(tiny.attack, eps=0.2)}, "attack_settings.eps: 0.1 there, 0.2 now"),
        (
            {"attack": partial(ms.pgd, eps=0.1, steps=3, step_size=0.05)},
            "attack: tiny.attack there, modelsim.attacks.pgd now",
        ),
        ({"attack": ms.fgsm}, "attack_settings.steps: 3 there, absent now"),
        ({"images": tiny.image_set(seed=1)}, "images_sha256: "),
        ({"batch_size": 4}, "batch_size: 5 there, 4 now"),
        ({"zoo": tiny.zoo() | {"first": tiny.linear(9)}}, "models.first: "),
        ({"zoo": {n: tiny.zoo()[n] for n in ("first", "second")}}, "models.third: "),
    ],
)
def test_study_with_other_settings_is_refused_naming_the_difference_and_left_alone(
    changed, difference, copied, whole
):
    with pytest.raises(ValueError, match=re.escape(difference)):
        tiny.transfer(copied, **changed)
    assert files(copied) == files(whole)


def test_study_made_with_another_version_is_refused_and_left_alone(copied, whole, monkeypatch):
    monkeypatch.setattr(sys.modules["modelsim.transfer"], "version", lambda package: f"{package} of tomorrow")
    with pytest.raises(ValueError, match=r"versions\.torch: .* there, torch of tomorrow now"):
        tiny.transfer(copied)
    assert files(copied) == files(whole)


def test_attributes_tell_how_the_study_was_made(whole):
    attributes = ms.open_study(whole).attrs
    assert attributes["attack"] == "tiny.attack"
    assert json.loads(attributes["attack_settings"]) == {"eps": 0.1, "steps": 3, "seed": 0}
    assert attributes["images"] == "tiny"
    assert attributes["images_sha256"] == tiny.image_set().fingerprint()
    assert attributes["batch_size"] == 5
    assert "canvas" in attributes["canvas_rule"]
    versions = json.loads(attributes["versions"])
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(versions) == {"modelsim", "torch", "timm", "numpy"}
    assert (json.loads(attributes["fold"]), json.loads(attributes["perturbations"])) == (True, True)


def test_fingerprints_stand_beside_the_models_and_the_images_and_follow_a_part(whole):
    part = ms.open_study(whole).sel(target=["third", "first"]).isel(image=[7, 2])
    zoo = tiny.zoo()
    assert part.model_sha256.values.tolist() == [fingerprint(zoo[name]) for name in ("third", "first")]
    assert tuple(part.image_sha256.values) == tiny.image_set()[[7, 2]].hashes()


def test_settings_of_an_attack_are_its_keywords_with_what_partial_gave():
    def attack(classifier, images, labels, *, eps=0.1, norm="inf", seed=None):
        return images

    assert attack_settings(attack) == {"eps": 0.1, "norm": "inf", "seed": None}
    assert attack_settings(partial(partial(attack, eps=0.2), seed=3)) == {
        "eps": 0.2,
        "norm": "inf",
        "seed": 3,
    }


def test_settings_that_an_attack_takes_by_double_star_are_recorded():
    def attack(classifier, images, labels, **settings):
        return images

    assert attack_settings(partial(attack, eps=0.2)) == {"eps": 0.2}


def test_setting_that_is_missing_or_cannot_be_recorded_is_named():
    def attack(classifier, images, labels, *, eps):
        return images

    with pytest.raises(ValueError, match=r"the attack needs eps=….*functools\.partial"):
        attack_settings(attack)
    with pytest.raises(ValueError, match=r"can't record eps=\[1, 2\]"):
        attack_settings(partial(attack, eps=[1, 2]))


def test_empty_zoo_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ValueError, match="the zoo is empty"):
        tiny.transfer(tmp_path / "out", zoo={})
    assert list(tmp_path.iterdir()) == []


class Misbehaving(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images):
        return self.output(images)


@pytest.mark.parametrize(
    ("output", "culprit"),
    [
        (lambda x: x.flatten(1)[:, :4], "it has 4 classes, the image set and its peers 3"),
        (lambda x: x.flatten(1)[:, :3] * torch.nan, "NaN logits for 8 of 8 images"),
        (lambda x: x, r"logits of shape \(8, class\), got \(8, 1, 8, 8\)"),
        (lambda x: x.sum(), r"logits of shape \(8, class\), got \(\)"),
    ],
)
def test_bad_classifier_is_named_and_nothing_written(output, culprit, tmp_path):
    with pytest.raises(ValueError, match=f"model 'bad': .*{culprit}"):
        tiny.transfer(tmp_path / "out", zoo=tiny.zoo() | {"bad": Misbehaving(output)})
    assert list(tmp_path.iterdir()) == []


def test_finished_sources_are_kept_when_a_later_one_breaks_under_attack(tmp_path):
    class Breaking(nn.Module):
        broken = True

        def forward(self, images):
            return images.flatten(1)[:, :3] * (torch.nan if self.broken and images.requires_grad else 1)

    zoo = {"first": tiny.linear(1), "breaking": Breaking()}
    with pytest.raises(ValueError, match=r"model 'breaking': .*NaN logits for 5 of 5 images"):
        tiny.transfer(tmp_path, zoo=zoo)
    zoo["breaking"].broken, counting = False, Counting()
    tiny.transfer(tmp_path, zoo=zoo, watcher=counting)
    assert len(counting.calls) == 3


@pytest.mark.parametrize(
    ("bad", "culprit"),
    [
        (lambda classifier, images, labels: images + 1, r"must lie in \[0, 1\]"),
        (lambda classifier, images, labels: images[:1], r"turned \(5, 1, 8, 8\) into \(1, 1, 8, 8\)"),
        (lambda classifier, images, labels: images * torch.nan, "5 image.* contain NaN"),
        (lambda classifier, images, labels: 1 - (images > 0.5).float(), "doesn't fit the store's 127/255"),
    ],
)
def test_attack_that_leaves_the_canvas_is_refused(bad, culprit, tmp_path):
    with pytest.raises(ValueError, match=culprit):
        tiny.transfer(tmp_path, attack=bad)
    with pytest.raises(ValueError, match="has 0 of 3 sources"):
        ms.open_study(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda store: store.mkdir(), id="empty folder"),
        pytest.param(lambda store: store.write_text("mine"), id="file"),
        pytest.param(lambda store: zarr.create_group(store, attributes={"owner": "me"}), id="foreign group"),
        pytest.param(lambda store: zarr.create_array(store, shape=(2,), dtype="int8"), id="foreign array"),
    ],
)
def test_foreign_store_is_refused_by_name_and_left_alone(make, tmp_path):
    store = tmp_path / "study.zarr"
    make(store)
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=re.escape(str(store))):
        tiny.transfer(tmp_path)
    with pytest.raises((OSError, ValueError), match=re.escape(str(store))):
        ms.open_study(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_place_that_cannot_be_written_is_named(below, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / below
    with pytest.raises(OSError, match=f"can't write to {re.escape(str(out))}"):
        tiny.transfer(out)
    assert files(tmp_path) == {"file": b"mine"}


def test_absent_study_is_named_with_the_way_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no study at .*gone.*modelsim transfer --out"):
        ms.open_study(tmp_path / "gone")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES = [
    pytest.param(flip, id="flipped"),
    pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-5]), id="truncated"),
    pytest.param(lambda path: path.write_bytes(b""), id="emptied"),
    pytest.param(Path.unlink, id="deleted"),
]


@pytest.mark.parametrize("chunk", ["perturbation/c.1.0.0.0.0", "adversarial_prediction/c.1.0.0"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_source_is_named_and_following_the_advice_restores_it(chunk, damage, copied, whole):
    damage(copied / "study.zarr" / chunk)
    for use in (ms.open_study, tiny.transfer):
        with pytest.raises(ValueError, match=r"source 1 is truncated or corrupted") as caught:
            use(copied)
        assert str(copied) in str(caught.value)
    Path(re.search(r"delete (\S+) and run", str(caught.value))[1]).unlink()
    counting = Counting()
    tiny.transfer(copied, watcher=counting)
    assert len(counting.calls) == (3 if chunk.startswith("perturbation") else 0)
    assert files(copied) == files(whole)


@pytest.mark.parametrize(
    "chunk",
    [
        "label/c.0",
        "clean_prediction/c.0.0",
        "source/c.0",
        "target/c.0",
        "image/c.0",
        "class/c.0",
        "finished/c.1",
    ],
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_other_array_names_the_store(chunk, damage, copied):
    damage(copied / "study.zarr" / chunk)
    with pytest.raises((ValueError, OSError), match=re.escape(str(copied / "study.zarr"))):
        ms.open_study(copied)


@pytest.mark.parametrize("name", ["", "label/", "perturbation/", "finished/"])
@pytest.mark.parametrize("damage", DAMAGES[1:])
def test_damage_to_a_description_names_the_store(name, damage, copied):
    damage(copied / "study.zarr" / f"{name}zarr.json")
    for use in (ms.open_study, tiny.transfer):
        with pytest.raises((ValueError, OSError), match=re.escape(str(copied / "study.zarr"))):
            use(copied)
