"""Two runs on one folder, networks that have changed since, results that are kept: right, or refused."""

import os
import platform
import re
import signal
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import kill_runs
import numpy as np
import processes
import pytest
import tiny
import torch
import xarray as xr
from distributed import Client, LocalCluster
from processes import Pause, files
from torch import nn
from typer.testing import CliRunner

import modelsim as ms
from modelsim import distillation
from modelsim.__main__ import app
from modelsim.workers import sole_writer
from modelsim.zoo import fingerprint

REFUSALS = (ValueError, TypeError)
BEFORE, *WITH_STORE = PHASES = ["evaluate 0", "attack 1", "attack 2", "evaluate 2"]
"""Where the first run waits: before there is a store, in the middle, at the end."""

needs_sigkill = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")


class Killed(BaseException):
    pass


# Two runs on one folder


@pytest.fixture(scope="module")
def pauses(tmp_path_factory):
    """One folder for all pauses of this module, because its name is a setting of the studies."""
    return tmp_path_factory.mktemp("pauses")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, pauses):
    """What the store of some models holds if nobody disturbs the run."""
    made = {}

    def of(names):
        if names not in made:
            out = tmp_path_factory.mktemp("alone")
            processes.transfer(out, names, pauses=pauses)
            made[names] = files(out)
        return made[names]

    return of


SECONDS = {
    "the same": {},
    "more models": {"names": "mab"},
    "models in another order": {"names": "ba"},
    "test images": {"test_images": tiny.image_set(30, seed=1)},
    "other settings": {"batch_size": 6},
    "fewer models": {"names": "a"},
}


@needs_sigkill
@pytest.mark.parametrize("phase", WITH_STORE)
def test_second_run_is_told_who_holds_the_folder_and_disturbs_nothing(phase, pauses, alone, tmp_path):
    out = tmp_path / "out"
    with Pause(pauses, phase) as pause:
        first = processes.start(processes.transfer, out, pauses=pauses)
        pause.until_reached(first)
        before = files(out)
        holder = rf"\b{first.pid}\b.*{re.escape(platform.node())}"
        for what, changed in SECONDS.items():
            with pytest.raises(BlockingIOError, match=holder):
                processes.transfer(out, **(dict(pauses=pauses) | changed))
            assert files(out) == before, what
    assert processes.end(first) == 0
    assert files(out) == alone("ab")
    processes.transfer(out, "mab", pauses=pauses)
    assert files(out) == alone("mab")


@needs_sigkill
def test_folder_by_another_name_is_the_same_folder(pauses, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    with Pause(pauses, "attack 2") as pause:
        first = processes.start(processes.transfer, out, pauses=pauses)
        pause.until_reached(first)
        for name in ("link", "out", "link/../out", f"{out}/"):
            with pytest.raises(BlockingIOError, match=str(first.pid)):
                processes.transfer(name, pauses=pauses)
    assert processes.end(first) == 0


@needs_sigkill
def test_study_that_is_being_made_can_be_looked_at(pauses, tmp_path):
    with Pause(pauses, "attack 2") as pause:
        first = processes.start(processes.transfer, tmp_path, pauses=pauses)
        pause.until_reached(first)
        with pytest.raises(ValueError, match="has 1 of 2 sources"):
            ms.open_study(tmp_path)
    assert processes.end(first) == 0
    assert ms.open_study(tmp_path).sizes["source"] == 2


def killed(out, phase, *, pauses, **changed):
    """Start a run and kill it where it waits; the pause is over when the caller says so."""
    pause = Pause(pauses, phase)
    run = processes.start(processes.transfer, out, pauses=pauses, **changed)
    pause.until_reached(run)
    os.kill(run.pid, signal.SIGKILL)
    assert processes.end(run) == -signal.SIGKILL
    return pause


@needs_sigkill
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("names", ["ab", "mab"])
def test_folder_of_a_run_that_was_killed_is_free(names, phase, pauses, alone, tmp_path):
    killed(tmp_path, phase, pauses=pauses)
    processes.transfer(tmp_path, names, pauses=pauses)
    assert files(tmp_path) == alone(names)


@needs_sigkill
def test_of_runs_started_at_once_one_works_and_the_others_are_told(pauses, alone, tmp_path):
    out = tmp_path / "out"
    answers = [tmp_path / str(i) for i in range(4)]
    runs = [
        processes.start(processes.transfer_or_be_refused, out, names, answer, pauses=pauses)
        for names, answer in zip(("ab", "mab", "ab", "mab"), answers, strict=True)
    ]
    assert [processes.end(run) for run in runs] == [0] * 4
    said = [answer.read_text() for answer in answers]
    assert "done" in said
    for text in said:
        # Between taking the folder and saying so, a holder has no name yet.
        names = [rf"\b{run.pid}\b" for run in runs] + ["another process"]
        assert text == "done" or any(re.search(name, text) for name in names), text
    processes.transfer(out, "mab", pauses=pauses)
    assert files(out) == alone("mab")


@needs_sigkill
@pytest.mark.parametrize("phase", WITH_STORE)
@pytest.mark.parametrize("names", ["mab", "ba", "a"])
def test_run_of_other_models_that_starts_in_the_middle_does_no_harm(names, phase, pauses, alone, tmp_path):
    """`{a, b}` is running while `{m, a, b}` starts, does what it can, and ends before the other goes on."""
    out, answer = tmp_path / "out", tmp_path / "answer"
    with Pause(pauses, phase) as pause:
        first = processes.start(processes.transfer, out, pauses=pauses)
        pause.until_reached(first)
        second = processes.start(processes.transfer_or_be_refused, out, names, answer, pauses=pauses)
        assert processes.end(second) == 0
    assert processes.end(first) == 0
    assert re.search(rf"\b{first.pid}\b", answer.read_text())
    assert files(out) == alone("ab")


@needs_sigkill
@pytest.mark.parametrize("names", ["ab", "mab", "ba", "a"])
def test_run_that_starts_before_the_other_has_a_store(names, pauses, alone, tmp_path):
    """One of them is right; the other is told, goes on with what it finds, or is refused as another study."""
    out, answer = tmp_path / "out", tmp_path / "answer"
    with Pause(pauses, BEFORE) as pause:
        first = processes.start(processes.transfer, out, pauses=pauses)
        pause.until_reached(first)
        second = processes.start(processes.transfer_or_be_refused, out, names, answer, pauses=pauses)
        assert processes.end(second) == 0
        is_done = answer.read_text() == "done"
        assert is_done or re.search(rf"\b{first.pid}\b", answer.read_text())
    if is_done and names == "mab":  # the study of the second is of more models than the first wants
        assert processes.end(first) == 1
        assert files(out) == alone("mab")
    else:
        assert processes.end(first) == 0
        assert files(out) == alone("ab")


@pytest.mark.parametrize("phase", WITH_STORE)
def test_two_runs_in_one_process(phase, pauses, alone, tmp_path):
    with Pause(pauses, phase) as pause:
        first = threading.Thread(target=processes.transfer, args=(tmp_path,), kwargs=dict(pauses=pauses))
        first.start()
        pause.until_reached()
        # Not `processes.transfer`, which would count the other run's attacks from the beginning.
        given = dict(attack=partial(processes.attack, pauses=str(pauses)), batch_size=12)
        for names in ("ab", "mab"):
            with pytest.raises(BlockingIOError, match=str(os.getpid())):
                tiny.transfer(tmp_path, zoo=processes.zoo(names, pauses), **given)
    first.join()
    assert files(tmp_path) == alone("ab")


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(
        n_workers=1, threads_per_worker=1, memory_limit=None, dashboard_address="127.0.0.1:0"
    ) as one:
        yield one


@needs_sigkill
@pytest.mark.parametrize("names", ["ab", "mab", "ba"])
def test_worker_left_over_from_a_killed_run_writes_nothing_into_the_store_of_another(
    names, pauses, alone, cluster, tmp_path
):
    address = cluster.scheduler_address
    cluster.wait_for_workers(1)
    with Client(address, set_as_default=False) as client:
        client.run(processes.begin)  # it has counted the attacks of another test
    with killed(tmp_path, "attack 1", pauses=pauses, scheduler=address):
        processes.transfer(tmp_path, names, pauses=pauses)
        assert files(tmp_path) == alone(names)
    processes.wait_for((pauses / "gone").exists)
    with Client(address, set_as_default=False) as client:
        client.submit(sum, [1, 1]).result()  # its one thread has come to the end of what was left over
    assert files(tmp_path) == alone(names)
    ms.open_study(tmp_path)


def test_folder_of_students_has_one_writer_too(tmp_path):
    with sole_writer(tmp_path):
        run = distillation.Run("resnet10t", "none", 0, "none")
        with pytest.raises(BlockingIOError, match=rf"\b{os.getpid()}\b"):
            distillation.distill_all([run], tmp_path, similarity=False)
    assert not list(tmp_path.glob("*.csv"))


def test_command_says_who_holds_the_folder_in_one_line(tmp_path):
    options = ["--images", "10", "--steps", "1", "--no-probabilities", "--out", str(tmp_path)]
    with sole_writer(tmp_path):
        result = CliRunner().invoke(app, ["transfer", "resmlp_24_224", *options])
    assert result.exit_code == 2
    assert str(os.getpid()) in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("modelsim: ")]) == 1


def test_refused_run_makes_no_folder(tmp_path):
    with pytest.raises(ValueError, match="the zoo is empty"):
        tiny.transfer(tmp_path / "out", zoo={})
    with pytest.raises(ValueError, match="workers must be at least 1"):
        tiny.transfer(tmp_path / "out", workers=0)
    assert list(tmp_path.iterdir()) == []


@needs_sigkill
@pytest.mark.parametrize("workers", [1, 2])
def test_runs_killed_at_random_moments_lose_nothing(workers, tmp_path):
    assert kill_runs.kill_runs(tmp_path, kills=4, workers=workers, seed=5).total() == 4


@pytest.mark.parametrize("renaming", range(2))
def test_study_of_other_options_goes_on_after_a_kill_while_it_was_replaced(renaming, tmp_path, monkeypatch):
    """Options that needn't be repeated are found also in the store that was put aside."""
    options = dict(fold=False, perturbations=False)
    few = {name: tiny.zoo()[name] for name in ("first", "second")}
    tiny.transfer(tmp_path / "whole", **options)
    tiny.transfer(tmp_path / "killed", zoo=few, **options)
    real, renamed = Path.rename, []

    def killing(path, target):
        renamed.append(path)
        if len(renamed) == renaming + 1:
            raise Killed
        return real(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killing)
        with pytest.raises(Killed):
            tiny.transfer(tmp_path / "killed")
    tiny.transfer(tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


# Identity of a network


class Normalised(nn.Module):
    """Keeps mean and scale as plain floats, where no state dict sees them."""

    def __init__(self, mean=0.0, scale=1.0, seed=1):
        super().__init__()
        self.inside, self.mean, self.scale = tiny.linear(seed), mean, scale

    def forward(self, x):
        return self.inside((x - self.mean) / self.scale)


class WithFunction(nn.Module):
    """Its repr holds the address of a function."""

    def __init__(self):
        super().__init__()
        self.inside, self.activation = tiny.linear(1), lambda x: x * 1

    def extra_repr(self):
        return f"activation={self.activation}, at {id(self)}"

    def forward(self, x):
        return self.inside(self.activation(x))


class Wrapped(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.model = network

    def forward(self, x):
        return self.model(x)


OTHERS = [
    pytest.param(lambda: Normalised(mean=5.0, scale=-0.5), id="plain floats"),
    pytest.param(lambda: Normalised(seed=5), id="weights"),
]


def pair(a):
    return {"a": a, "b": tiny.linear(2)}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("extended", [{}, {"c": tiny.linear(4)}])
def test_network_that_has_changed_is_refused_in_its_old_folder(other, extended, tmp_path):
    tiny.transfer(tmp_path, zoo=pair(Normalised()))
    before = files(tmp_path)
    with pytest.raises(REFUSALS, match=r"model 'a'|models\.a"):
        tiny.transfer(tmp_path, zoo=pair(other()) | extended)
    assert files(tmp_path) == before


class KilledUnderAttack(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = tiny.linear(2)

    def forward(self, x):
        if torch.is_grad_enabled():
            raise Killed
        return self.inside(x)


@pytest.mark.parametrize("other", OTHERS)
def test_network_that_has_changed_does_not_finish_what_the_old_one_began(other, tmp_path):
    with pytest.raises(Killed):
        tiny.transfer(tmp_path / "killed", zoo={"a": Normalised(), "b": KilledUnderAttack()})
    before = files(tmp_path / "killed")
    with pytest.raises(REFUSALS, match=r"model 'a'|models\.a"):
        tiny.transfer(tmp_path / "killed", zoo=pair(other()))
    assert files(tmp_path / "killed") == before
    tiny.transfer(tmp_path / "killed", zoo=pair(Normalised()))
    tiny.transfer(tmp_path / "whole", zoo=pair(Normalised()))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("other", OTHERS)
def test_network_that_has_changed_is_refused_when_one_compares_with_it(other, tmp_path):
    study = tiny.transfer(tmp_path, zoo=pair(Normalised()))
    given = dict(images=tiny.image_set(), attack=tiny.attack, progress=False)
    ms.compare(tiny.mlp(3), study, zoo=pair(Normalised()), **given)
    with pytest.raises(REFUSALS, match=r"'a'"):
        ms.compare(tiny.mlp(3), study, zoo=pair(other()), **given)


@pytest.mark.parametrize(
    "same",
    [
        pytest.param(WithFunction, id="address in a repr"),
        pytest.param(lambda: Wrapped(tiny.linear(1)), id="wrapper"),
        pytest.param(lambda: Wrapped(Wrapped(tiny.linear(1))), id="two wrappers"),
        pytest.param(lambda: nn.Sequential(tiny.linear(1), nn.Identity()), id="sequence"),
        pytest.param(lambda: nn.DataParallel(tiny.linear(1)), id="data parallel"),
        pytest.param(lambda: torch.compile(tiny.linear(1), backend="eager"), id="compiled"),
        pytest.param(lambda: tiny.linear(1).requires_grad_(False), id="frozen"),
        pytest.param(lambda: tiny.linear(1).train(), id="in training mode"),
    ],
)
def test_address_or_wrapper_makes_no_other_network(same, tmp_path):
    made = tiny.transfer(tmp_path, zoo=pair(tiny.linear(1)))
    assert tiny.transfer(tmp_path, zoo=pair(same())).identical(made)
    assert tiny.transfer(tmp_path, zoo=pair(same())).identical(made)
    given = dict(images=tiny.image_set(), attack=tiny.attack, progress=False)
    ms.compare(tiny.mlp(3), made, zoo=pair(same()), **given)


class Tipped(nn.Module):
    """Predicts another class on some of 400 images, which their first pixel numbers."""

    def __init__(self, *places):
        super().__init__()
        self.inside, self.places = tiny.linear(1), torch.tensor(places)

    def forward(self, x):
        logits = self.inside(x)
        is_tipped = torch.isin((x[:, 0, 0, :1] * 400).long(), self.places)
        return torch.where(is_tipped, logits.roll(1, 1), logits)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A study of a network that `Tipped` differs from, on 400 images."""
    images, folder = tiny.image_set(400), tmp_path_factory.mktemp("numbered")
    images.images[:, 0, 0, 0] = (torch.arange(400) + 0.5) / 400
    given = dict(images=images, attack=ms.fgsm)
    return folder, tiny.transfer(folder, zoo=pair(Tipped()), batch_size=200, **given), given


@pytest.mark.parametrize("places", [[7], [7, 8], [7, 399], [250, 251]])
def test_network_that_tells_half_a_per_cent_of_the_images_otherwise_is_the_same(places, numbered):
    folder, made, given = numbered
    assert tiny.transfer(folder, zoo=pair(Tipped(*places)), batch_size=200, **given).identical(made)
    ms.compare(tiny.mlp(3), made, zoo=pair(Tipped(*places)), progress=False, **given)


@pytest.mark.parametrize("places", [[0, 1, 2], [1, 200, 399], [397, 398, 399], range(300, 340)])
def test_network_that_tells_more_of_the_images_otherwise_is_another(places, numbered):
    folder, made, given = numbered
    with pytest.raises(REFUSALS, match=r"'a'.*\d"):
        tiny.transfer(folder, zoo=pair(Tipped(*places)), batch_size=200, **given)
    with pytest.raises(REFUSALS, match=r"'a'.*\d"):
        ms.compare(tiny.mlp(3), made, zoo=pair(Tipped(*places)), progress=False, **given)


def test_fingerprint_sees_every_weight_and_buffer_and_their_order():
    def of(*modules):
        return fingerprint(nn.Sequential(*modules))

    one, two = tiny.linear(1)[1], tiny.linear(2)[1]
    norm = nn.BatchNorm2d(4)
    shifted = nn.BatchNorm2d(4)
    shifted.running_mean[2] = 0.1
    assert of(one, two) == of(nn.Identity(), nn.Sequential(one), two) != of(two, one)
    assert of(norm) == of(nn.BatchNorm2d(4)) != of(shifted)
    wide, tall = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    tall.weight.data = wide.weight.data.reshape(2, 3)
    assert of(wide) != of(tall)
    network = tiny.linear(1)
    before = fingerprint(network)
    network[1].bias.data[0] += 1e-7
    assert fingerprint(network) != before


def test_fingerprint_sees_buffers_that_are_not_saved():
    network = tiny.linear(1)
    one, other = (ms.Classifier(network, input_size=8, mean=(mean,)) for mean in (0.1, 0.2))
    assert fingerprint(one) != fingerprint(other)


# Keeping a result


STRONG = partial(ms.pgd, eps=0.15, steps=3, step_size=0.1)


def knowing():
    """Networks that are right on every image, even on one alone."""
    return {"first": tiny.linear(1), "second": tiny.mlp(2), "third": tiny.convolutional(8)}


def mine():
    """Is right on every image, and fooled on every one."""
    return tiny.convolutional(7)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    test_images = tiny.image_set(30, seed=1)
    return tiny.transfer(
        tmp_path_factory.mktemp("made"), zoo=knowing(), attack=STRONG, test_images=test_images
    )


def compare(study, **changed):
    given = dict(
        name="mine", images=tiny.image_set(), zoo=knowing(), attack=STRONG, device="cpu", progress=False
    )
    return ms.compare(mine(), study, **(given | changed))


@pytest.mark.parametrize("write", ["to_netcdf", "to_zarr"])
@pytest.mark.parametrize("what", ["study", "compared", "part"])
def test_study_is_written_by_xarray_and_read_back_with_the_same_scores(write, what, made, tmp_path):
    study = {
        "study": lambda: made,
        "compared": lambda: compare(made),
        "part": lambda: made.sel(source=["first"], target=["first"]).isel(image=slice(0, 6)),
    }[what]()
    path = tmp_path / "kept"
    with warnings.catch_warnings():
        # Zarr's own word on strings and on metadata that it will consolidate.
        warnings.filterwarnings("ignore", "(The data type|Consolidated metadata)")
        getattr(study, write)(path)
        read = (xr.open_dataset if write == "to_netcdf" else xr.open_zarr)(path).load()
    for score in (ms.sat, ms.transferability, ms.white_box_success):
        np.testing.assert_array_equal(score(read), score(study))
    assert read.attrs.keys() == study.attrs.keys()
    assert all(isinstance(value, str | int | float) for value in study.attrs.values())


def test_one_compares_with_a_study_read_back(made, tmp_path):
    made.to_netcdf(tmp_path / "kept.nc")
    with xr.open_dataset(tmp_path / "kept.nc") as read:
        found, expected = compare(read), compare(made)
        for name in ("adversarial_prediction", "clean_prediction"):
            assert np.array_equal(found[name], expected[name])
        assert (
            ms.sat(compare(read.isel(image=slice(0, 6)), images=tiny.image_set()[range(6)])).sizes["model"]
            == 4
        )


@pytest.mark.parametrize(
    "score",
    [
        ms.sat,
        ms.transferability,
        ms.white_box_success,
        ms.interval,
        lambda study: ms.interval(study, "transferability"),
    ],
)
def test_scores_are_written_by_xarray_and_read_back(score, made, tmp_path):
    result = score(compare(made))
    result.to_netcdf(tmp_path / "score.nc")
    with xr.open_dataarray(tmp_path / "score.nc") as read:
        np.testing.assert_array_equal(read, result)
        assert set(read.coords) == set(result.coords)


PARTS = {
    "first half": slice(0, 6),
    "every third": slice(None, None, 3),
    "backwards": slice(None, None, -1),
    "one": [4],
    "some, in another order": [7, 2, 11, 0],
    "boolean": np.arange(12) % 2 == 0,
}


def predicted(network, canvas):
    with torch.no_grad():
        return network.eval()(canvas).argmax(1).tolist()


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_part_of_a_study_by_images_is_compared_as_that_part(part, made):
    few, places = made.isel(image=part), np.arange(12)[part]
    images = tiny.image_set()[places]
    found = compare(few, images=images)
    assert found.image.values.tolist() == list(images.ids)
    assert found.clean_prediction.sel(target="mine").values.tolist() == predicted(mine(), images.images)
    for source in knowing():
        seen = ms.adversarial_images(few, source, images)
        assert torch.equal(seen, ms.adversarial_images(made, source, tiny.image_set())[list(places)])
        shown = found.adversarial_prediction.sel(source=source, target="mine")
        assert shown.values.tolist() == predicted(mine(), seen)
    for name in ("clean_prediction", "adversarial_prediction"):
        old = {dim: list(knowing()) for dim in found[name].dims if dim != "image"}
        assert np.array_equal(found[name].sel(old), few[name])


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_network_is_attacked_on_a_part_as_in_a_study_of_these_images_alone(part, made):
    few, images = made.isel(image=part), tiny.image_set()[np.arange(12)[part]]
    found = compare(few, images=images)
    adversarial = [
        STRONG(mine(), images.images[i : i + 5], images.labels[i : i + 5], seed=i)
        for i in range(0, len(images), 5)
    ]
    seen = (torch.cat(adversarial) * 255).round() / 255
    for target, network in (knowing() | {"mine": mine()}).items():
        shown = found.adversarial_prediction.sel(source="mine", target=target)
        assert shown.values.tolist() == predicted(network, seen)


def test_part_by_images_and_by_models_at_once(made):
    few = made.sel(source=["third", "first"], target=["third", "first"]).isel(image=[1, 3, 8])
    found = compare(few, images=tiny.image_set()[[1, 3, 8]])
    assert found.source.values.tolist() == ["third", "first", "mine"]
    whole = compare(made)
    # What is shown to mine doesn't depend on the part.
    names = {"source": ["third", "first"], "target": "mine"}
    expected = whole.adversarial_prediction.sel(names).isel(image=[1, 3, 8])
    assert np.array_equal(found.adversarial_prediction.sel(names), expected)


def test_part_by_labels(made):
    few = made.sel(image=made.label == 1)
    found = compare(few, images=tiny.image_set()[[1, 4, 7, 10]])
    assert (found.label == 1).all()


def changed_in_half(images, change):
    """Change the first six images."""
    first, rest = change(images[range(6)]), images[range(6, len(images))]
    return ms.ImageSet(
        torch.cat([first.images, rest.images]),
        torch.cat([first.labels, rest.labels]),
        first.ids + rest.ids,
        images.classes,
        images.name,
    )


CHANGES = {
    "pixels": lambda images: replace(images, images=images.images.clamp(0.1, 1)),
    "one pixel": lambda images: replace(images, images=images.images.index_fill(3, torch.tensor([2]), 0.5)),
    "exchanged": lambda images: replace(images, images=images.images.flip(0)),
    "labels": lambda images: replace(images, labels=(images.labels + 1) % 3),
    "ids": lambda images: replace(images, ids=tuple(f"other/{i}" for i in range(len(images)))),
    "fewer": lambda images: images[range(3)],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("of", ["part", "whole"])
def test_images_that_are_not_those_of_the_part_are_refused(change, of, made):
    few = made if of == "whole" else made.isel(image=slice(0, 9))
    wrong = changed_in_half(tiny.image_set(few.sizes["image"]), change)
    for use in (partial(compare, few, images=wrong), partial(ms.adversarial_images, few, "first", wrong)):
        with pytest.raises(ValueError, match="image"):
            use()


def right_or_refused(use, expected):
    try:
        found = use()
    except ValueError as error:
        assert "image" in str(error)  # noqa: PT017
    else:
        assert found.identical(expected) if isinstance(found, xr.Dataset) else torch.equal(found, expected)


@pytest.mark.parametrize("part", [slice(None), [7, 2, 11]])
@pytest.mark.parametrize("given", [range(12), range(11, -1, -1), [2, 7, 11]])
def test_images_in_another_order_or_more_of_them_are_put_right_or_refused(part, given, made):
    few, images = made.isel(image=part), tiny.image_set()
    own = images[np.arange(12)[part]]
    right_or_refused(partial(compare, few, images=images[given]), compare(few, images=own))
    seen = partial(ms.adversarial_images, few, "first")
    right_or_refused(partial(seen, images[given]), seen(own))


def test_part_of_a_compared_study_can_be_compared_with(made):
    both = compare(made)
    few = both.drop_sel(source="third", target="third").isel(image=[0, 5, 6])
    score = ms.sat(few)
    assert score.model.values.tolist() == ["first", "second", "mine"]
    whole = compare(made).isel(image=[0, 5, 6])
    np.testing.assert_array_equal(score, ms.sat(whole).sel(model=score.model, other=score.model.values))


def test_part_of_the_shipped_study_finds_its_images_by_itself():
    study = ms.open_study(ms.data_directory() / "fashion69")
    few = study.sel(source=["resmlp_24_224"], target=["resmlp_24_224"]).isel(image=[900, 3, 17, 500, 4])
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model 'mine'", UserWarning)  # it has learned nothing
        found = ms.compare(network, few, progress=False)
    assert found.image.values.tolist() == few.image.values.tolist()
    images = ms.fashion_mnist("test", n=1000, seed=0)[[900, 3, 17, 500, 4]]
    assert found.label.values.tolist() == images.labels.tolist()
    with torch.no_grad():
        expected = network(ms.adversarial_images(few, "resmlp_24_224", images)).argmax(1)
    shown = found.adversarial_prediction.sel(source="resmlp_24_224", target="mine")
    assert shown.values.tolist() == expected.tolist()


def test_folder_of_the_store_is_answered_with_the_folder_of_the_study(tmp_path):
    tiny.transfer(tmp_path / "mine")
    inside = tmp_path / "mine" / "study.zarr"
    with pytest.raises(FileNotFoundError) as caught:
        ms.open_study(inside)
    said = str(caught.value).replace(str(inside), "")
    assert str(tmp_path / "mine") in said
    assert "study.zarr/study.zarr" not in str(caught.value)
    assert "--out" not in said


def test_no_study_is_written_into_a_store(tmp_path):
    tiny.transfer(tmp_path)
    before = files(tmp_path)
    with pytest.raises((*REFUSALS, OSError), match=re.escape(str(tmp_path))):
        tiny.transfer(tmp_path / "study.zarr")
    assert files(tmp_path) == before
