import os
import sys
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupKFold
from typer.testing import CliRunner

import modelsim as ms
from modelsim.__main__ import _CAVEAT, app
from modelsim.scores import labelled

SAT, MODULE = "SAT", sys.modules["modelsim.forecast"]  # `ms.forecast` is the function
TINY = {"activation": ["ReLU", "GeLU", "ReLU"], "accuracy": [70.0, 80.0, 75.0], "hybrid": [True, False, True]}


def zoo(n, *, seed=0):
    drawn = np.random.default_rng(seed).integers(3, size=(n, 4)).astype(str)
    return pd.DataFrame(drawn, [f"m{i}" for i in range(n)], [f"component {i}" for i in range(4)])


def planted(components):
    """Similarity by agreement in components 1 and 3, each network's own level, and noise."""
    values, (level, *noise) = components.to_numpy(), np.random.default_rng(0).normal(0, 0.1, (81, 80))
    same, noise = (values[:, None] == values) @ GAINS, np.triu(noise, 1)
    return labelled(2 + same + level[:, None] + level + noise + noise.T, list(components.index), SAT)


GAINS = 0, 1, 0, 0.6
KNOWN, NEW, TRUE = zoo(80)[:40], zoo(80)[40:], planted(zoo(80))


def foretold(new, **options):
    return ms.forecast(new, components=KNOWN, **{"similarity": TRUE, **options})


def test_features_of_a_tiny_zoo():
    features = ms.pair_features(pd.DataFrame(TINY, ["a", "b", "c"]))
    assert features.index.to_list() == [("a", "b"), ("a", "c"), ("b", "c")]
    assert features["activation"].to_dict("list") == {"same": [0, 1, 0], "GeLU": [1, 0, 1], "ReLU": [1, 2, 1]}
    assert features["accuracy"].to_dict("list") == {"difference": [10, 5, 5], "mean": [75, 72.5, 77.5]}
    assert features["hybrid"].to_dict("list") == {"difference": [1, 0, 1], "mean": [0.5, 1, 0.5]}


@given(st.permutations(range(8)), st.integers(0, 100))
def test_features_do_not_depend_on_which_network_comes_first(order, seed):
    components = zoo(8, seed=seed).assign(accuracy=np.arange(8) ** 2)
    straight, permuted = map(ms.pair_features, (components, components.iloc[order]))
    permuted.index = pd.MultiIndex.from_tuples([sorted(pair) for pair in permuted.index])
    pd.testing.assert_frame_equal(permuted.loc[straight.index, straight.columns], straight, check_names=False)


def test_forecast_finds_the_planted_components_and_no_others():
    newcomer = pd.DataFrame([["0"] * 4], ["new"], KNOWN.columns)
    row = foretold(newcomer)[SAT]
    for component, gain in zip(KNOWN, GAINS, strict=True):
        moved = foretold(newcomer.assign(**{component: "1"}))[SAT] - row
        toward, away = (moved["new"][KNOWN[component] == value].mean() for value in "10")
        assert toward - away == pytest.approx(2 * gain, abs=0.15)
    assert np.corrcoef(foretold(NEW)[SAT], TRUE.to_series().loc[foretold(NEW).index])[0, 1] > 0.9


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
def test_intervals_hold_as_many_pairs_of_newcomers_as_they_say(level):
    told = foretold(NEW, level=level)
    true, half = TRUE.to_series().loc[told.index], (told.high - told.low).iloc[0] / 2
    assert true.between(told.low, told.high).mean() == pytest.approx(level, abs=0.07)
    np.testing.assert_allclose(told[["low", "high"]], told[[SAT]].to_numpy() + np.array([-half, half]))


def test_a_forecast_does_not_depend_on_what_else_is_asked_for():
    for some in (pd.concat([NEW[:2], KNOWN[5:6]]), pd.concat([KNOWN[5:6], NEW[1::-1]])):
        together = foretold(some)
        assert together.index.unique("model").tolist() == [*some.index]
        for name in some.index:
            alone = foretold(some.loc[[name]]).loc[name]
            assert alone.index.tolist() == [other for other in KNOWN.index if other != name]
            pd.testing.assert_frame_equal(together.loc[name], alone)


def test_values_that_no_known_network_has_are_all_alike():
    one, other = (foretold(NEW.iloc[:1].assign(**{"component 1": value})) for value in ("9", "of its own"))
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize("name", ["m3", "m3.some_weights"])
def test_the_row_of_a_known_network_is_not_used_for_its_forecast(name):
    table = KNOWN.rename(index={"m3": name}).loc[[name]]
    spoilt = TRUE.copy()
    spoilt.loc["m3"] = spoilt.loc[:, "m3"] = 9
    pd.testing.assert_frame_equal(foretold(table, similarity=spoilt), foretold(table))
    assert not foretold(NEW[:1], similarity=spoilt).equals(foretold(NEW[:1]))


WRONG = {
    "unknown model of timm 'resnet81': did you mean 'resnet18'": {"models": "resnet81"},
    "no component 1, component 2, component 3": {"models": NEW[["component 0"]]},
    "m40": {"models": pd.concat([NEW[:1]] * 2)},
    "40 networks known, level must be above 0, at most 40/41, got 0.99": {"models": NEW, "level": 0.99},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_named(message):
    with pytest.raises(ValueError, match=message):
        ms.forecast(components=KNOWN, similarity=TRUE, **WRONG[message])


def test_command_shows_components_new_values_and_both_ends_of_the_row(monkeypatch, tmp_path):
    study = ms.sat(ms.first_seeds(ms.open_study(ms.data_directory() / "fashion69")))
    monkeypatch.setattr(MODULE, "published_sat", lambda: study)
    names, csv = ["mobilenetv3_large_100", "resnet50"], tmp_path / "rows.csv"
    shown, told = CliRunner().invoke(app, ["forecast", *names, "--csv", str(csv)]).output, ms.forecast(names)
    pd.testing.assert_frame_equal(pd.read_csv(csv, index_col=[0, 1]), told)
    assert [line.split()[0] for line in shown.splitlines() if "none of the 69" in line] == ["Activation"]
    assert shown.endswith(f"{_CAVEAT}\n")
    for name, part in zip(names, shown.split("\n\n"), strict=False):
        lines, row = part.splitlines(), told.loc[name]
        for title, other in (("most similar", row[SAT].idxmax()), ("least similar", row[SAT].idxmin())):
            first, *numbers, base = lines[lines.index(title) + 2].split()
            assert (first, base) == (other, ms.CATALOGUE[other].base)
            assert [float(number) for number in numbers] == row.loc[other].round(2).tolist()


def test_command_without_the_released_scores_is_one_line(monkeypatch):
    unavailable = Mock(side_effect=ms.PublishedScoresUnavailable("can't fetch"))
    monkeypatch.setattr(MODULE, "published_sat", unavailable)
    result = CliRunner().invoke(app, ["forecast", "resnet18"])
    assert (result.exit_code, result.stderr) == (2, "modelsim: can't fetch\n")


@pytest.mark.skipif(not os.environ.get("MODELSIM_CACHE"), reason="the paper's files aren't here")
def test_released_scores_of_families_left_out_lie_inside_as_often_as_the_command_says():
    known, measured = ms.components_table(), ms.published_sat().to_series()
    files = np.array([timm.model_entrypoint(name).__module__ for name in known.index])
    alike = (known.values[:, None] == known.values).all(axis=2) | (files[:, None] == files)
    _, family = connected_components(alike)
    splits = GroupKFold(10).split(known, groups=family)
    told = pd.concat([ms.forecast(known.iloc[out], components=known.iloc[kept]) for kept, out in splits])
    inside = measured.loc[told.index].between(told.low, told.high).groupby("model").mean()
    assert inside.mean() == pytest.approx(0.9, abs=0.05)
    said = f"{inside.mean():.0%} of all pairs, but of a single network's {inside.min():.0%}"
    assert said.replace("%", " %") in _CAVEAT
    assert inside.max() == 1
