import json
import os
import shlex

import numpy as np
import pandas as pd
import pytest
from pages import BOOK, page
from scipy.stats import f, spearmanr
from sklearn.linear_model import Ridge
from typer.testing import CliRunner

import modelsim as ms
from modelsim import distillation
from modelsim.__main__ import app
from modelsim.clustering import distance

here = page("distillation")


def accuracies(spread, seed=0):
    """27 teachers, three seeds that differ much."""
    random = np.random.default_rng(seed)
    return spread * random.normal(size=(27, 1)) + 5 * random.normal(size=3) + random.normal(size=(27, 3))


def test_layout_is_that_of_least_squares_and_its_interval_that_of_f():
    values = accuracies(1)
    teacher, seed = (np.eye(n)[i.ravel()] for n, i in zip((27, 3), np.indices((27, 3)), strict=True))
    whole, without = (
        (here.rest(values.ravel(), *x.T) ** 2).sum() for x in (np.hstack([teacher, seed]), seed)
    )
    ratio = (without - whole) / 26 / (whole / 52)
    between, low, high, noise, reliability = here.layout(values)
    assert (noise, reliability) == pytest.approx((np.sqrt(whole / 52), 1 - 1 / ratio))
    assert 3 * between**2 == pytest.approx(noise**2 * (ratio - 1))
    tails = [f.sf(ratio / (1 + 3 * bound**2 / noise**2), 26, 52) for bound in (low, high)]
    assert tails == pytest.approx([0.025, 0.975])


def test_teachers_alike_are_found_alike_and_others_not_whatever_the_seeds():
    p_values = [here.alike(accuracies(0, seed), shuffles=199) for seed in range(20)]
    assert sum(p <= 0.05 for p in p_values) < 5  # by chance once in 400
    assert here.alike(accuracies(1), shuffles=999) == 0.001


def test_relation_that_is_only_accuracy_goes_when_it_is_fixed_and_is_that_of_the_textbook():
    accuracy, *noise = np.random.default_rng(0).normal(size=(3, 60))
    x, y, z = (pd.Series(v).rank().to_numpy() for v in (accuracy + noise[0], accuracy + noise[1], accuracy))
    alone, fixed = here.relation(y, x, draws=300), here.relation(y, x, z, draws=300)
    assert alone[1] > 0 > fixed[1]
    assert alone[3] < 0.01 < fixed[3]
    xy, xz, yz = (spearmanr(*pair)[0] for pair in ((x, y), (x, z), (y, z)))
    few = np.arange(60) < 2
    assert here.relation(y, x, few, strata=few, draws=50)[1] > 0  # never without one of the few
    assert fixed[0] == pytest.approx((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))


def test_planted_resemblance_is_found_beside_what_is_general_to_students_and_networks():
    random = np.random.default_rng(0)
    general = 3 * random.normal(size=(3, 8, 1)) + 3 * random.normal(size=(3, 1, 8))
    assert here.resemblance(general + 0.5 * np.eye(8), shuffles=99)[0] == pytest.approx(0.5)
    noise = 0.2 * random.normal(size=(3, 8, 8))
    found, low, high, p_value = here.resemblance(general + noise + 0.5 * np.eye(8), shuffles=999)
    assert 0 < low < found < high
    assert p_value == 0.001
    assert here.resemblance(general + noise, shuffles=999)[3] > 0.05


def test_rules_learn_nothing_from_those_who_judge_and_the_planted_one_wins():
    random, names = np.random.default_rng(0), [*here.rules(np.zeros((3, 4)), *[here.ridge(*DATA)] * 2)]
    x = random.normal(size=(27, 4))
    students = [(x, x[:, 1] + 0.1 * random.normal(size=27)), (x, -x[:, 1])]
    best = pd.DataFrame(here.choice(students, divisions=10, draws=10)[:8], names)
    assert best.loc[["the most similar", "regression"], 1].min() > 0
    assert best.loc[["the least similar", "regression from the other student"], 2].max() < 0
    left, changed = np.arange(9), [(x, np.where(np.arange(27) < 9, 7.0, y)) for x, y in students]
    assert here.advantages(changed, np.arange(27), left) == [0] * 16


def test_ridge_is_that_of_scikit_learn():
    x, y = np.random.default_rng(0).normal(1, size=(18, 4)), np.arange(18.0)
    np.testing.assert_allclose(here.ridge(x, y), Ridge(alpha=4).fit(x, y).coef_)


DATA = np.eye(4), np.arange(4.0)


def test_teachers_are_those_that_span_their_base():
    place = pd.Series({"a": 0, "b": 1, "c": 2, "d": 9})
    apart = pd.DataFrame(np.abs(place.values[:, None] - place.values), place.index, place.index)
    assert here.spanning(apart, 3) == ["b", "d", "a"]
    if os.environ.get("MODELSIM_CACHE"):
        apart = distance(ms.published_sat()).to_pandas()
        base = pd.Series({name: entry.base for name, entry in ms.CATALOGUE.items()})
        for _, names in base.groupby(base).groups.items():
            ours = [name for name in distillation.TEACHERS if name in names]
            assert here.spanning(apart.loc[names, names], len(ours)) == ours


def test_command_of_the_page_is_one_that_runs_and_its_other_options_count(monkeypatch):
    asked = {}

    def note(runs, out, **given):
        asked.update(given, runs=runs)
        return pd.DataFrame()

    monkeypatch.setattr(distillation, "distill_all", note)
    cells = json.loads((BOOK / "distillation.ipynb").read_text(encoding="utf-8"))["cells"]
    (text,) = ("".join(cell["source"]) for cell in cells if "-m modelsim distill" in "".join(cell["source"]))
    words = shlex.split(text.split("python -m modelsim ")[1].split("```")[0].replace("\\\n", ""))
    others = ["--images", "100", "--epochs", "1", "--kind", "hard", "--no-similarity"]
    assert CliRunner().invoke(app, [*words, *others]).exit_code == 0
    kinds = {"none": "none", "convnext_tiny": "hard"}
    assert {run[1:] for run in asked["runs"]} == {(t, s, kinds[t]) for t in kinds for s in (0, 1)}
    assert (asked["setting"].images, asked["setting"].recipe.epochs, asked["similarity"]) == (100, 1, False)
