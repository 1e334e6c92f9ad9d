import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import modelsim as ms
import modelsim.__main__
from modelsim.__main__ import app

PAIR = ["deit_small_patch16_224", "resnet50"]
CLUSTER = "tcp://10.0.0.1:8786"
BOOK = ms.data_directory() / "fashion69"
WEIGHTS = f"--weights {BOOK / 'weights/resnet50.safetensors'}"
MINE = f"compare --study {BOOK}"


def call(line, *more):
    return CliRunner().invoke(app, [*line.split(), *map(str, more)], env={"COLUMNS": "200"})


def words(text):
    return " ".join(re.sub(r"[^\w./ -]", " ", text).split())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The study of two shipped models on ten images, made by the command."""
    out = tmp_path_factory.mktemp("study")
    settings = "--images 10 --steps 2 --eps 8 --step-size 4 --no-probabilities --out"
    result = call(f"transfer {' '.join(PAIR)} {settings}", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize(
    "example",
    [
        "train resnet50 resnet50-seed1 --workers 2",
        "transfer resnet50 convnext_tiny --images 100 --workers 2 --out runs/mine",
        f"transfer --scheduler {CLUSTER}",
        "score data/fashion69 --measure sat --intervals --csv sat.csv",
        "components resnet50 maxvit_tiny_tf_224",
        "forecast resnet18 mobilenetv4_conv_small --level 0.8",
        "compare mobilenetv3_small_050 --weights mine.safetensors --out runs/mine",
    ],
)
def test_help_of_a_command_shows_its_example(example):
    result = call(f"{example.split()[0]} --help")
    assert result.exit_code == 0
    assert words(f"python -m modelsim {example}") in words(result.output)


def test_module_is_a_program_that_lists_its_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["modelsim", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(modelsim.__main__.__file__, run_name="__main__")
    assert {"train", "transfer", "score"} <= set(words(capsys.readouterr().out).split())


def test_study_records_the_settings_given_in_255ths(pair):
    study = ms.open_study(pair)
    expected = {"eps": 8 / 255, "steps": 2, "step_size": 4 / 255, "seed": 0}
    assert json.loads(study.attrs["attack_settings"]) == expected
    assert study.source.values.tolist() == PAIR
    assert tuple(study.image.values) == ms.fashion_mnist("test", n=10).ids


HERE = {"workers": 1, "scheduler": None}
COMMANDS = {  # their defaults, and an error of each
    "transfer": (
        HERE
        | {"fold": None, "perturbations": None, "n_test": 10_000, "precision": "fp32", "network_memory": 2},
        TypeError,
    ),
    "train": (HERE, FloatingPointError),
    "distill": (HERE | {"similarity": True}, ValueError),
}


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("transfer resnet50", {}),
        ("transfer resnet50 --no-probabilities --workers 3", {"n_test": 0, "workers": 3}),
        ("transfer resnet50 --no-fold --perturbations", {"fold": False, "perturbations": True}),
        ("transfer resnet50 --fold --no-perturbations", {"fold": True, "perturbations": False}),
        (
            "transfer resnet50 --precision bf16 --network-memory 0.5",
            {"precision": "bf16", "network_memory": 0.5},
        ),
        ("train --workers 3", {"workers": 3}),
        ("distill --workers 3 --no-similarity", {"workers": 3, "similarity": False}),
        *((f"{command} --scheduler {CLUSTER}", {"scheduler": CLUSTER}) for command in COMMANDS),
    ],
)
def test_options_reach_the_function_whose_error_is_one_plain_line(line, changed, monkeypatch):
    given, (defaults, error) = {}, COMMANDS[line.split()[0]]

    def note(*args, test_images=(), **options):
        given.update(options, n_test=len(test_images or ()))
        raise error("enough")

    for name in ("modelsim.transfer", "modelsim.__main__.train_zoo", "modelsim.distillation.distill_all"):
        monkeypatch.setattr(name, note)
    result = call(line)
    assert (result.exit_code, result.stderr) == (2, "modelsim: enough\n")
    assert {name: given[name] for name in defaults} == defaults | changed


@pytest.mark.parametrize("measure", ["sat", "transferability"])
def test_scores_written_and_shown_are_those_of_the_package(pair, measure, tmp_path):
    table = tmp_path / "scores.csv"
    shown, written = (
        call(f"score --measure {measure} {pair} {more}") for more in ("", f"--intervals --csv {table}")
    )
    assert (shown.exit_code, written.exit_code) == (0, 0)
    study = ms.open_study(pair)
    score, bounds, rate = getattr(ms, measure)(study), ms.interval(study, measure), ms.transferability(study)
    for name in PAIR:
        (line,) = (line for line in shown.output.splitlines() if line.startswith(name))
        assert [float(n) for n in line.split()[1:]] == score.loc[name].values.round(3).tolist()
    rows = pd.read_csv(table, index_col=[0, 1])
    assert len(rows) == 4
    assert rows.columns.tolist() == [score.name, "low", "high", "hits", "trials"]
    for (one, other), row in rows.iterrows():
        place, made = {score.dims[0]: one, score.dims[1]: other}, rate.sel(source=one, target=other)
        expected = [score.sel(place), *bounds.sel(place), made.hits, made.trials]
        np.testing.assert_allclose(row.to_numpy(dtype=float), np.array(expected, dtype=float))


def test_components_shown_and_written_are_those_of_the_package(tmp_path):
    result = call("components seresnet18 --csv", tmp_path / "components.csv")
    assert result.exit_code == 0, result.output
    assert "Yes (SE)" in result.output
    written = pd.read_csv(tmp_path / "components.csv", index_col="model", keep_default_na=False)
    pd.testing.assert_frame_equal(written, ms.read_components(["seresnet18"]))


OUT_OF_RANGE = {
    "train resnet50": ["--workers 0"],
    "transfer resnet50": [
        "--workers 0",
        "--steps 0",
        "--steps 2.5",
        "--seed -1",
        "--image-seed -1",
        "--precision fp16",
        "--network-memory -1",
    ],
    "distill": ["--seed -1", "--images 0", "--epochs 0", "--workers 0"],
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train resnet5O", "modelsim: unknown architecture 'resnet5O': did you mean 'resnet50'"),
        ("transfer resnet50 resnet50", "modelsim: duplicate model names: resnet50"),
        ("transfer resnet50 --images 7", "modelsim: n must be a positive multiple of the 10 classes, got 7"),
        ("transfer resnet50 --images 10 --steps 1 --eps 128", "modelsim: eps must be at most 127, got 128.0"),
        ("transfer resnet50 --images 10 --steps 1 --step-size inf", "modelsim: step_size must be at most"),
        ("distill --teacher none --temperature nan", "modelsim: temperature must be greater than 0, got nan"),
        ("components resnet18 --csv nowhere/table.csv", "nowhere"),
        ("score nowhere", "modelsim: no study at nowhere"),
        (f"score {BOOK.parent}", f"of its folder, such as {BOOK}"),
        ("train resnet50-seedx", "modelsim: 'resnet50-seedx' has no seed: write it as a whole number"),
        ("forecast resnet50.nonsense", "modelsim: unknown model of timm 'resnet50.nonsense': did you mean"),
        (f"{MINE} resnet50", "modelsim: 'resnet50' needs --weights FILE; or give MODULE:FUNCTION"),
        (
            f"{MINE} resnet5O --weights x",
            "modelsim: unknown architecture 'resnet5O': did you mean 'resnet50'",
        ),
        (f"{MINE} resnet18 {WEIGHTS}", "resnet50.safetensors belongs to another architecture: "),
        (
            f"{MINE} resnet50 {WEIGHTS} --name resnet50",
            "modelsim: 'resnet50' is a model of the study already",
        ),
        (f"{MINE} a --models resnet5O", "modelsim: unknown model of the study 'resnet5O': did you mean"),
        (f"{MINE} no_net:a", "modelsim: model 'no_net:a': ModuleNotFoundError: No module named 'no_net'"),
        (f"{MINE} json:a", "modelsim: model 'json:a': AttributeError: module 'json' has no attribute 'a'"),
        *(
            (f"{command} {option}", f"Invalid value for '{option.split()[0]}'")
            for command, options in OUT_OF_RANGE.items()
            for option in options
        ),
    ],
)
def test_mistake_ends_with_code_2_and_is_named(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(line)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["train resnet50", "transfer resnet50", "distill"])
def test_nothing_is_written_where_no_data_of_ours_is(line, tmp_path, monkeypatch):
    (tmp_path / "thesis").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELSIM_DATA", "thesis")
    result = call(line)
    assert result.exit_code == 2
    assert f"modelsim: no data of modelsim at {tmp_path / 'thesis'}" in result.stderr
    assert list(tmp_path.rglob("*")) == [tmp_path / "thesis"]


def test_next_command_can_be_pasted_where_the_path_has_a_space(monkeypatch):
    monkeypatch.setattr(ms, "transfer", lambda *args, **options: None)
    result = call("transfer resnet50 --no-probabilities --out", "a b/study")
    assert result.exit_code == 0, result.output
    command = result.output.partition("next: ")[2]
    assert shlex.split(command) == ["python", "-m", "modelsim", "score", "a b/study"]


# A network of one's own


@pytest.mark.parametrize("network", ["resnet50", "my_networks:small"])
def test_network_of_a_name_or_a_function_is_told_its_neighbours_and_kept(
    network, pair, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_networks.py").write_text("import modelsim as ms\n\nsmall = lambda: ms.build('resnet50')\n")
    result = call(f"compare {network} {WEIGHTS} --name again --study {pair} --out", "a b")
    assert result.exit_code == 0, result.output
    study, table = ms.open_study("a b"), ms.neighbours(ms.open_study("a b"), "again")
    right = float((study.clean_prediction.sel(target="again") == study.label).mean())
    assert result.stdout.startswith(f"again is right on {right:.1%} of 10 images, the others on")
    assert table.index.tolist() == PAIR[::-1]
    for name, score in table.SAT.items():
        assert re.search(rf"^{name} +{score:.2f} ", result.stdout, re.M)
    assert (network in ms.CATALOGUE) == bool(re.search("^resnet50 .* CNN +13 of 13$", result.stdout, re.M))
    assert result.stdout.endswith("next: python -m modelsim score 'a b'\n")


def test_part_of_the_books_study_is_balanced_and_read_with_groups_and_partners():
    name, kin = "resnet50-seed1", ["resnet50", "seresnet50", "resnext50_32x4d", "nfnet_l0"]
    names = [*kin, "pit_s_224", "pit_b_224", "gmlp_s16_224", "nest_tiny_jx", name]
    part = modelsim.__main__._part(ms.open_study(BOOK), names, 40)
    assert part.source.values.tolist() == part.target.values.tolist() == names
    assert np.bincount(part.label).tolist() == [4] * 10
    text, table = modelsim.__main__._reading(part, name, "resnet50"), ms.neighbours(part, name)
    assert re.findall(r"^(\w+) .* of 13$", text, re.M) == table.index.tolist()
    group = ms.spectral_clusters(ms.relative_sat(ms.transferability(part)), 4).to_series()
    mates = [other for other in table.index if group[other] == group[name]]
    assert f"\n\nof four groups it falls into that of {', '.join(mates)}\n\n" in text
    best = ms.vote(part, [(name, other) for other in table.index]).nlargest(1)
    assert f"in a vote of two: {best.index[0][1]} ({best.iloc[0]:.1%} right together)" in text
