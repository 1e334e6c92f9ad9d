import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import modelsim as ms
from modelsim import distillation
from modelsim.__main__ import app

PAIR = ["deit_small_patch16_224", "resnet50"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def words(text):
    return " ".join(re.sub(r"[^\w./ -]", " ", text).split())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The study of two shipped models on ten images, made by the command."""
    out = tmp_path_factory.mktemp("study")
    settings = ["--images", 10, "--steps", 2, "--eps", 8, "--step-size", 4, "--no-probabilities"]
    result = call("transfer", *PAIR, *settings, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"modelsim score {out}" in result.output.replace("\n", "")
    return out


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("train", "python -m modelsim train resnet50 resnet50-seed1 --workers 2"),
        (
            "transfer",
            "python -m modelsim transfer resnet50 convnext_tiny --images 100 --workers 2 --out runs/mine",
        ),
        ("transfer", "python -m modelsim transfer --scheduler tcp //10.0.0.1 8786"),
        ("score", "python -m modelsim score data/fashion69 --measure sat --intervals --csv sat.csv"),
        ("components", "python -m modelsim components resnet50 maxvit_tiny_tf_224"),
    ],
)
def test_help_of_a_command_shows_its_example(command, example):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert example in words(result.output)


def test_program_without_arguments_lists_its_commands():
    result = subprocess.run(
        [sys.executable, "-m", "modelsim", "--help"], capture_output=True, text=True, check=True
    )
    assert {"train", "transfer", "score"} <= set(words(result.stdout).split())


def test_study_records_the_settings_given_in_255ths(pair):
    study = ms.open_study(pair)
    expected = {"eps": 8 / 255, "steps": 2, "step_size": 4 / 255, "seed": 0}
    assert json.loads(study.attrs["attack_settings"]) == expected
    assert study.source.values.tolist() == PAIR
    assert tuple(study.image.values) == ms.fashion_mnist("test", n=10).ids


@pytest.mark.parametrize(
    ("options", "n_test", "expected"),
    [
        ([], 10_000, {}),
        (["--no-probabilities", "--workers", 3], 0, {"workers": 3}),
        (["--scheduler", "tcp://10.0.0.1:8786"], 10_000, {"scheduler": "tcp://10.0.0.1:8786"}),
        (["--no-fold", "--perturbations"], 10_000, {"fold": False, "perturbations": True}),
        (["--fold", "--no-perturbations"], 10_000, {"fold": True, "perturbations": False}),
    ],
)
def test_options_of_transfer_reach_the_engine(options, n_test, expected, monkeypatch):
    given = {}
    monkeypatch.setattr(ms, "transfer", lambda *args, **options: given.update(options))
    assert call("transfer", "resnet50", *options).exit_code == 0
    assert len(given.pop("test_images") or ()) == n_test
    defaults = {"workers": 1, "scheduler": None, "fold": None, "perturbations": None}
    assert given == defaults | expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--workers", 3], {"workers": 3, "scheduler": None}),
        (["--scheduler", "tcp://10.0.0.1:8786"], {"workers": 1, "scheduler": "tcp://10.0.0.1:8786"}),
    ],
)
def test_training_and_distilling_go_where_the_options_say(options, expected, monkeypatch):
    given = []

    def note(*args, **options):
        given.append({key: options[key] for key in expected})
        raise ValueError("enough")

    monkeypatch.setattr("modelsim.__main__.train_zoo", note)
    monkeypatch.setattr(distillation, "distill_all", note)
    for command in ("train", "distill"):
        assert "modelsim: enough" in call(command, *options).stderr
    assert given == [expected, expected]


@pytest.mark.parametrize("measure", ["sat", "transferability"])
def test_scores_written_are_those_of_the_package(pair, measure, tmp_path):
    result = call("score", pair, "--measure", measure, "--intervals", "--csv", tmp_path / "scores.csv")
    assert result.exit_code == 0, result.output
    study = ms.open_study(pair)
    score, bounds, rate = getattr(ms, measure)(study), ms.interval(study, measure), ms.transferability(study)
    written = pd.read_csv(tmp_path / "scores.csv", index_col=[0, 1])
    assert len(written) == 4
    assert written.columns.tolist() == [score.name, "low", "high", "hits", "trials"]
    for (one, other), row in written.iterrows():
        place = {score.dims[0]: one, score.dims[1]: other}
        made = rate.sel(source=one, target=other)
        expected = [score.sel(place), *bounds.sel(place), made.hits, made.trials]
        np.testing.assert_allclose(row.to_numpy(dtype=float), np.array(expected, dtype=float))


def test_components_shown_and_written_are_those_of_the_package(tmp_path):
    names, path = ["resnet18", "seresnet18"], tmp_path / "components.csv"
    result = call("components", *names, "--csv", path)
    assert result.exit_code == 0, result.output
    assert "Yes (SE)" in result.output
    written = pd.read_csv(path, index_col="model", keep_default_na=False)
    pd.testing.assert_frame_equal(written, ms.read_components(names))


def test_scores_shown_are_those_of_the_package(pair):
    result = call("score", pair)
    assert result.exit_code == 0
    score = ms.sat(ms.open_study(pair))
    for name in PAIR:
        (line,) = (line for line in result.output.splitlines() if line.startswith(name))
        assert [float(n) for n in line.split()[1:]] == score.sel(model=name).values.round(3).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "resnet5O"], "unknown architecture 'resnet5O': did you mean 'resnet50'"),
        (["transfer", "resnet5O"], "unknown architecture 'resnet5O': did you mean 'resnet50'"),
        (["transfer", "resnet50", "resnet50"], "duplicate model names: resnet50"),
        (["transfer", "resnet50", "--images", 7], "n must be a positive multiple of the 10 classes, got 7"),
        (["transfer", "resnet50", "--eps", 0], "eps must be greater than 0, got 0.0"),
        (["transfer", "resnet50", "--eps", "nan"], "eps must be greater than 0, got nan"),
        (["transfer", "resnet50", "--eps", "inf"], "eps must be at most 127, got inf"),
        (["transfer", "resnet50", "--eps", "128"], "eps must be at most 127, got 128.0"),
        (["transfer", "resnet50", "--step-size", "nan"], "step_size must be greater than 0, got nan"),
        (["transfer", "resnet50", "--step-size", "inf"], "step_size must be at most"),
        (["transfer", "resnet50", "--images", 0], "n must be at least 1, got 0"),
        (
            ["distill", "--teacher", "none", "--temperature", "nan"],
            "temperature must be greater than 0, got nan",
        ),
        (["distill", "--teacher", "none", "--temperature", "inf"], "temperature must be at most"),
        (["distill", "--teacher", "none", "--weight", "nan"], "weight must be at least 0, got nan"),
        (["components", "resnet18", "--csv", "nowhere/table.csv"], "nowhere"),
        (["score", "nowhere"], "no study at nowhere"),
    ],
)
def test_mistake_ends_with_code_2_and_one_plain_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("modelsim: ")]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["train", "resnet50", "--workers", 0], "--workers"),
        (["transfer", "resnet50", "--workers", 0], "--workers"),
        (["transfer", "resnet50", "--steps", 0], "--steps"),
        (["transfer", "resnet50", "--steps", 2.5], "--steps"),
        (["transfer", "resnet50", "--seed", -1], "--seed"),
        (["transfer", "resnet50", "--image-seed", -1], "--image-seed"),
        (["distill", "--seed", -1], "--seed"),
        (["distill", "--images", 0], "--images"),
        (["distill", "--epochs", 0], "--epochs"),
        (["distill", "--workers", 0], "--workers"),
    ],
)
def test_whole_number_out_of_range_is_refused_by_the_name_of_its_option(arguments, option):
    result = call(*arguments)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr


@pytest.mark.parametrize("given", ["absolute", "relative"])
@pytest.mark.parametrize("command", [["train", "resnet50"], ["transfer", "resnet50"], ["distill"]])
def test_nothing_is_written_where_no_data_of_ours_is(command, given, tmp_path, monkeypatch):
    stranger = tmp_path / "thesis"
    stranger.mkdir()
    (stranger / "chapter.tex").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELSIM_DATA", str(stranger if given == "absolute" else "thesis"))
    result = call(*command)
    assert result.exit_code == 2
    assert f"modelsim: no data of modelsim at {stranger}" in result.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chapter.tex", "thesis"]


def test_next_command_can_be_pasted_where_the_path_has_a_space(monkeypatch):
    monkeypatch.setattr(ms, "transfer", lambda *args, **options: None)
    result = call("transfer", "resnet50", "--no-probabilities", "--out", "a b/study")
    assert result.exit_code == 0, result.output
    command = result.output.partition("next: ")[2]
    assert shlex.split(command) == ["python", "-m", "modelsim", "score", "a b/study"]


def test_damaged_study_ends_with_code_2_and_says_what_to_delete(pair, tmp_path):
    copied = tmp_path / "study"
    copied.mkdir()
    for path in pair.rglob("*"):
        if path.is_file():
            target = copied / path.relative_to(pair)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (copied / "study.zarr" / "perturbation" / "c.0.0.0.0.0").unlink()
    result = call("score", copied)
    assert result.exit_code == 2
    assert f"delete {copied / 'study.zarr' / 'finished' / 'c.0'}" in result.stderr
