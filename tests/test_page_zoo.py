import numpy as np
import pandas as pd
import pytest
from pages import page

zoo = page("zoo")


def test_share_explained_by_groups_is_that_of_a_regression_on_them():
    random = np.random.default_rng(0)
    groups = pd.Series(list("aaabbbbcc"))
    values = pd.Series(random.normal(size=9))
    design = pd.get_dummies(groups).to_numpy(float)
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    by_group = {g: v.to_numpy() for g, v in values.groupby(groups)}
    assert zoo.explained(by_group) == pytest.approx(1 - left.var(ddof=0) / values.var(ddof=0))


def test_groups_explain_all_nothing_or_what_chance_gives():
    assert zoo.explained({"a": np.array([1.0, 1.0]), "b": np.array([3.0, 3.0])}) == 1
    assert zoo.explained({"a": np.array([1.0, 3.0]), "b": np.array([3.0, 1.0])}) == 0
    random = np.random.default_rng(0)
    noise = {g: random.normal(size=(4000, n)) for g, n in zip("abcde", (39, 10, 3, 8, 9), strict=True)}
    assert zoo.explained(noise).mean() == pytest.approx(4 / 68, abs=0.002)  # the page's 6 %


def test_redrawn_values_stay_in_their_group_and_number():
    groups = pd.Series(list("aabbb"))
    draws = zoo.redrawn(pd.Series([1.0, 2.0, 3.0, 4.0, 5.0]), groups, times=200)
    assert {g: draws[g].shape for g in draws} == {"a": (200, 2), "b": (200, 3)}
    assert {g: {*np.unique(draws[g])} for g in draws} == {"a": {1, 2}, "b": {3, 4, 5}}


def test_values_of_a_component_are_counted_once_each():
    assert zoo.values(pd.Series(["No"] * 3 + ["Yes"] * 2 + ["SE", "ECA"])) == "No (3), Yes (2), 2 more once"
    assert zoo.values(pd.Series(["No", "No"])) == "No (2)"


def test_disagreements_are_listed_unless_they_are_of_spelling():
    read = pd.DataFrame([["BN", "ReLU"], ["LN", "GeLU"]], ["a", "b"], ["Normalization", "Activation"])
    labels = pd.DataFrame([["BN", "SiLU"], ["ln", "GELU"]], ["a", "b"], ["Normalization", "Activation"])
    found = zoo.disagreements(read, labels)
    assert found.to_dict("records") == [
        {"Network": "a", "Component": "Activation", "By hand": "SiLU", "By program": "ReLU"}
    ]
