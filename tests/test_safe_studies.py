"""Two runs on one folder, networks that have changed since, results that are kept: right, or refused."""

import os
import platform
import random
import re
import signal
import sys
import threading
import time
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import processes
import pytest
import tiny
import torch
import xarray as xr
from distributed import Client
from processes import Pause, killed
from tiny import files
from torch import nn
from typer.testing import CliRunner

import modelsim as ms
from modelsim.__main__ import app
from modelsim.workers import sole_writer

needs_sigkill = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")


@pytest.fixture(scope="module")
def pauses(tmp_path_factory):
    """One folder for all pauses of this module, because its name is a setting of the studies."""
    return tmp_path_factory.mktemp("pauses")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, pauses):
    """What the store of some models holds if nobody disturbs the run."""
    made = {}
    for names in ("ab", "mab", "ba"):
        out = tmp_path_factory.mktemp("alone")
        processes.transfer(out, names, pauses=pauses)
        made[names] = files(out)
    return made


# Two runs on one folder

SECONDS = {
    "the same": {},
    "more models": {"names": "mab"},
    "models in another order": {"names": "ba"},
    "test images": {"test_images": tiny.image_set(30, seed=1)},
    "other settings": {"batch_size": 6},
    "fewer models": {"names": "a"},
    "another name of the folder": {"out": "link"},
    "another way to the folder": {"out": "link/../out"},
}


@needs_sigkill
@pytest.mark.parametrize("phase", ["attack 1", "attack 2", "evaluate 2"])
def test_second_run_is_told_who_holds_the_folder_and_disturbs_nothing(
    phase, pauses, alone, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(out, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    with Pause(pauses, phase) as pause:
        first = processes.start(processes.transfer, out, pauses=pauses)
        pause.until_reached(first)
        before = files(out)
        holder = rf"\b{first.pid}\b.*{re.escape(platform.node())}"
        for what, changed in SECONDS.items():
            with pytest.raises(BlockingIOError, match=holder):
                processes.transfer(**({"out": out, "pauses": pauses} | changed))
            assert files(out) == before, what
        with pytest.raises(ValueError, match=r"has [01] of 2 sources"):
            ms.open_study(out)
    assert processes.end(first) == 0
    assert files(out) == alone["ab"]
    assert [path.name for path in out.glob(".writer*")] in ([], [".writer.lock"])
    processes.transfer(out, "mab", pauses=pauses)
    assert files(out) == alone["mab"]


@needs_sigkill
@pytest.mark.parametrize(
    ("phase", "names"),
    [
        ("evaluate 0", "ab"),
        ("attack 1", "ba"),
        ("attack 2", "mab"),
        ("evaluate 2", "ab"),
        ("evaluate 2", "mab"),
    ],
)
def test_folder_of_a_run_that_was_killed_is_free(names, phase, pauses, alone, tmp_path):
    killed(tmp_path, phase, pauses=pauses)
    processes.transfer(tmp_path, names, pauses=pauses)
    assert files(tmp_path) == alone[names]


@needs_sigkill
def test_of_runs_started_at_once_one_works_and_the_others_are_told(pauses, alone, tmp_path):
    out, answers = tmp_path / "out", [tmp_path / str(i) for i in range(4)]
    runs = [
        processes.start(processes.transfer_or_be_refused, out, names, answer, pauses=pauses)
        for names, answer in zip(("ab", "mab", "ab", "mab"), answers, strict=True)
    ]
    assert [processes.end(run) for run in runs] == [0] * 4
    said = [answer.read_text() for answer in answers]
    # Between taking the folder and saying so, a holder has no name yet.
    holders = "|".join([*(rf"\b{run.pid}\b" for run in runs), "another process"])
    assert "done" in said
    assert all(text == "done" or re.search(holders, text) for text in said), said
    processes.transfer(out, "mab", pauses=pauses)
    assert files(out) == alone["mab"]


@needs_sigkill
@pytest.mark.parametrize("names", ["ab", "mab", "ba", "a"])
def test_run_that_starts_before_the_other_has_a_store(names, pauses, alone, tmp_path):
    """The second has the folder; the first goes on with what it finds, or is refused as another study."""
    out, answer = tmp_path / "out", tmp_path / "answer"
    with Pause(pauses, "evaluate 0") as pause:
        first = processes.start(processes.transfer, out, pauses=pauses)
        pause.until_reached(first)
        processes.transfer_or_be_refused(out, names, answer, pauses=pauses)
        assert answer.read_text() == "done"
    # The study of the second may be of more models than the first wants.
    assert processes.end(first) == (names == "mab")
    assert files(out) == alone["mab" if names == "mab" else "ab"]


def test_two_runs_in_one_process(pauses, alone, tmp_path):
    with Pause(pauses, "attack 2") as pause:
        first = threading.Thread(target=processes.transfer, args=(tmp_path,), kwargs=dict(pauses=pauses))
        first.start()
        pause.until_reached()
        for names in ("ab", "mab"):
            with pytest.raises(BlockingIOError, match=str(os.getpid())):
                tiny.transfer(tmp_path, **processes.options(names, pauses=pauses))
    first.join()
    assert files(tmp_path) == alone["ab"]


@pytest.fixture(scope="module")
def address():
    with processes.cluster() as one:
        yield one.scheduler_address


@needs_sigkill
@pytest.mark.parametrize("names", ["ab", "mab", "ba"])
def test_worker_left_over_from_a_killed_run_writes_nothing_into_the_store_of_another(
    names, pauses, alone, address, tmp_path
):
    with Client(address, set_as_default=False) as client:
        client.run(processes.begin)  # it has counted the attacks of another test
    with killed(tmp_path, "attack 1", pauses=pauses, scheduler=address):
        processes.transfer(tmp_path, names, pauses=pauses)
        assert files(tmp_path) == alone[names]
    processes.wait_for((pauses / "gone").exists)
    with Client(address, set_as_default=False) as client:
        client.submit(sum, [1, 1]).result()  # its one thread has come to the end of what was left over
    assert files(tmp_path) == alone[names]


def is_undamaged(out):
    try:
        ms.open_study(out)
    except (FileNotFoundError, ValueError) as error:
        return bool(re.search(r"no study at|has \d of \d sources: run the same", str(error)))
    return True


@needs_sigkill
@pytest.mark.parametrize(("workers", "perturbations", "kills"), [(1, False, 3), (2, True, 2)])
def test_runs_killed_at_random_moments_lose_nothing(workers, perturbations, kills, pauses, tmp_path):
    """Of fewer models first, then of more, or with test images; in the end the bytes of one never killed."""
    chance, killed, whole = random.Random(5), 0, tmp_path / "never killed"
    given = dict(pauses=pauses, workers=workers, perturbations=perturbations)

    def run(out, names, is_tested, *, seconds=processes.SECONDS):
        one = processes.start(processes.transfer_by_forks, str(out), names, is_tested=is_tested, **given)
        one.join(seconds)
        if one.exitcode is None:
            os.kill(one.pid, signal.SIGKILL)
        return processes.end(one)

    run(tmp_path / "first", "b", False)  # the first process to start takes seconds to import torch
    begun = time.monotonic()
    assert run(whole, "mab", True) == 0
    takes = time.monotonic() - begun
    stages = [[("mab", True)], [("b", False), ("ab", True)], [("ba", False)]]
    while killed < kills:
        out = tmp_path / f"round {len([*tmp_path.iterdir()])}"
        for names, is_tested in chance.choice(stages):
            for _ in range(chance.randint(1, 3)):
                code = run(out, names, is_tested, seconds=chance.uniform(0, takes))
                assert code in (0, -signal.SIGKILL)
                assert is_undamaged(out)
                killed += code != 0
        assert run(out, "mab", True) == 0
        assert files(out) == files(whole)


def test_command_says_who_holds_the_folder_in_one_line(tmp_path):
    options = ["--images", "10", "--steps", "1", "--no-probabilities", "--out", str(tmp_path)]
    with sole_writer(tmp_path):
        result = CliRunner().invoke(app, ["transfer", "resmlp_24_224", *options])
    assert result.exit_code == 2
    assert str(os.getpid()) in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("modelsim: ")]) == 1


# Identity of a network


def pair(a):
    return {"a": a, "b": tiny.linear(2)}


class Tipped(tiny.Odd):
    """Predicts another class on some of 400 images, which their first pixel numbers."""

    def __init__(self, *places):
        super().__init__()
        self.places = torch.tensor(places)

    def forward(self, x):
        logits = super().forward(x)
        is_tipped = torch.isin((x[:, 0, 0, :1] * 400).long(), self.places)
        return torch.where(is_tipped, logits.roll(1, 1), logits)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """How to transfer to, and to compare with, a network that `Tipped` differs from, on 400 images."""
    images, folder = tiny.image_set(400), tmp_path_factory.mktemp("numbered")
    images.images[:, 0, 0, 0] = (torch.arange(400) + 0.5) / 400
    given = dict(images=images, attack=ms.fgsm)
    made = partial(tiny.transfer, folder, batch_size=200, **given)
    return made, partial(tiny.compare, made(zoo=pair(Tipped())), tiny.mlp(3), **given), folder


@pytest.mark.parametrize(
    ("places", "is_same"),
    [([7, 399], True), ([250, 251], True), ([1, 200, 399], False), ([397, 398, 399], False)],
)
def test_network_that_tells_more_than_half_a_per_cent_of_the_images_otherwise_is_another(
    places, is_same, numbered
):
    *uses, folder = numbered
    before = files(folder)
    for use in uses:
        if is_same:
            use(zoo=pair(Tipped(*places)))
        else:
            with pytest.raises(ValueError, match=r"'a' is not the one in the study: .* 0\.8% of the clean"):
                use(zoo=pair(Tipped(*places)))
    assert files(folder) == before


# Keeping a result, or a part of it


def knowing():
    """Networks that are right on every image, even on one alone."""
    return {"first": tiny.linear(1), "second": tiny.mlp(2), "third": tiny.convolutional(8)}


MINE = tiny.convolutional(7).eval()
"""Is right on every image, and fooled on every one."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    given = dict(zoo=knowing(), attack=tiny.QUICK, test_images=tiny.image_set(30, seed=1))
    return tiny.transfer(tmp_path_factory.mktemp("made"), **given)


def compare(study, **changed):
    return tiny.compare(study, MINE, **({"name": "mine", "zoo": knowing()} | changed))


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
@pytest.mark.parametrize("what", ["study", "compared", "part"])
def test_study_is_written_by_xarray_read_back_with_the_same_scores_and_compared_with(
    kind, what, made, tmp_path
):
    part = made.sel(source=["first"], target=["first"]).isel(image=slice(0, 6))
    study = {"study": made, "compared": compare(made), "part": part}[what]
    with warnings.catch_warnings():
        # Zarr's own word on strings and on metadata that it will consolidate.
        warnings.filterwarnings("ignore", "(The data type|Consolidated metadata)")
        getattr(study, f"to_{kind}")(tmp_path / "kept")
        read = (xr.open_dataset if kind == "netcdf" else xr.open_zarr)(tmp_path / "kept").load()
    for score in (ms.sat, ms.transferability, ms.white_box_success):
        np.testing.assert_array_equal(score(read), score(study))
    assert read.attrs.keys() == study.attrs.keys()
    assert all(isinstance(value, str | int | float) for value in study.attrs.values())
    if what != "compared":
        assert tiny.same_predictions(compare(read), compare(study))


@pytest.mark.parametrize("score", [ms.sat, ms.white_box_success, ms.interval])
def test_scores_are_written_by_xarray_and_read_back(score, made, tmp_path):
    result = score(compare(made))
    result.to_netcdf(tmp_path / "score.nc")
    with xr.open_dataarray(tmp_path / "score.nc") as read:
        np.testing.assert_array_equal(read, result)
        assert set(read.coords) == set(result.coords)


PARTS = {
    "first half": slice(0, 6),
    "backwards": slice(None, None, -1),
    "one": [4],
    "some, in another order": [7, 2, 11, 0],
    "boolean": np.arange(12) % 2 == 0,
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_part_of_a_study_is_compared_as_a_study_of_that_part_alone(part, made):
    few, images = made.isel(image=part), tiny.image_set()[np.arange(12)[part]]
    found = compare(few)
    assert found.identical(compare(few, images=images))
    assert found.image.values.tolist() == list(images.ids)
    assert found.clean_prediction.sel(target="mine").values.tolist() == tiny.predicted(MINE, images.images)
    for source in knowing():
        seen = ms.adversarial_images(few, source, tiny.image_set())
        whole = ms.adversarial_images(made, source, tiny.image_set())
        assert torch.equal(seen, whole[np.arange(12)[part].tolist()])
        shown = found.adversarial_prediction.sel(source=source, target="mine")
        assert shown.values.tolist() == tiny.predicted(MINE, seen)
    for name in ("clean_prediction", "adversarial_prediction"):
        old = {dim: list(knowing()) for dim in found[name].dims if dim != "image"}
        assert np.array_equal(found[name].sel(old), few[name])
    batches = zip(images.images.split(5), images.labels.split(5), (0, 5, 10), strict=False)
    seen = torch.cat([tiny.QUICK(MINE, x, y, seed=start) for x, y, start in batches])
    for target, network in (knowing() | {"mine": MINE}).items():
        shown = found.adversarial_prediction.sel(source="mine", target=target)
        assert shown.values.tolist() == tiny.predicted(network, (seen * 255).round() / 255)


def test_part_by_images_and_by_models_at_once_and_part_of_a_compared_study(made):
    names, places = ["third", "first"], [1, 3, 8]
    whole = compare(made)
    found = compare(made.sel(source=names, target=names).isel(image=places))
    assert found.source.values.tolist() == [*names, "mine"]
    # What is shown to mine doesn't depend on the part.
    shown = {"source": names, "target": "mine"}
    expected = whole.adversarial_prediction.sel(shown).isel(image=places)
    assert np.array_equal(found.adversarial_prediction.sel(shown), expected)
    score = ms.sat(whole.sel(source=["first", "mine"], target=["first", "mine"]).isel(image=places))
    of_all = ms.sat(whole.isel(image=places))
    np.testing.assert_array_equal(score, of_all.sel(model=["first", "mine"], other=["first", "mine"]))


CHANGES = {
    "pixels": lambda half: replace(half, images=half.images.clamp(0.1, 1)),
    "one pixel": lambda half: replace(half, images=half.images.index_fill(3, torch.tensor([2]), 0.5)),
    "exchanged": lambda half: replace(half, images=half.images.flip(0)),
    "labels": lambda half: replace(half, labels=(half.labels + 1) % 3),
    "ids": lambda half: replace(half, ids=tuple(f"other/{i}" for i in range(len(half)))),
    "fewer": lambda half: half[range(3)],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("n", [9, 12])
def test_images_that_are_not_those_of_the_study_are_refused(change, n, made):
    half, rest = change(tiny.image_set()[range(6)]), tiny.image_set()[range(6, n)]
    parts = [torch.cat([getattr(half, what), getattr(rest, what)]) for what in ("images", "labels")]
    wrong, few = ms.ImageSet(*parts, half.ids + rest.ids, half.classes, "tiny"), made.isel(image=slice(n))
    for use in (partial(compare, few, images=wrong), partial(ms.adversarial_images, few, "first", wrong)):
        with pytest.raises(ValueError, match=r"these are not the images of the study \(tiny\)"):
            use()


def test_part_of_the_shipped_study_finds_its_images_by_itself():
    study, places = ms.open_study(ms.data_directory() / "fashion69"), [900, 3, 17, 500, 4]
    few = study.sel(source=["resmlp_24_224"], target=["resmlp_24_224"]).isel(image=places)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model 'mine'", UserWarning)  # it has learned nothing
        found = ms.compare(network, few, progress=False)
    images = ms.fashion_mnist("test", n=1000, seed=0)[places]
    assert found.image.values.tolist() == list(images.ids)
    assert found.label.values.tolist() == images.labels.tolist()
    shown = found.adversarial_prediction.sel(source="resmlp_24_224", target="mine").values.tolist()
    assert shown == tiny.predicted(network, ms.adversarial_images(few, "resmlp_24_224", images))
