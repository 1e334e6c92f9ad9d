"""The explorer, built as a page of the book and used in a real browser, from a file."""

import os
import re
import shutil
import subprocess
import sys
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
from pages import BOOK, page
from PIL import Image
from scipy.spatial.distance import squareform
from scipy.stats import rankdata

import modelsim as ms

THEME = re.compile("THEBE_JS_URL|invalid theme mode")  # what the theme complains of on every page
RANKS = "Ranks here − ImageNet, per cent"
HERE = "const it = document.getElementById('two-studies'); return "
CUT = (
    "[...it.querySelectorAll('th, td, dt, dd, li, h4, .note')].filter(e => e.scrollWidth > e.clientWidth + 1)"
)
explorer = page("explorer")


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """Build a book of this page alone."""
    pytest.importorskip("jupyter_book")
    folder = tmp_path_factory.mktemp("explorer") / "book"
    shutil.copytree(BOOK, folder, ignore=shutil.ignore_patterns("*.ipynb", "*.md", "_build"))
    for name in ("explorer.ipynb", "glossary.md"):
        shutil.copy(BOOK / name, folder)
    (folder / "_toc.yml").write_text("format: jb-book\nroot: explorer\nchapters:\n  - file: glossary\n")
    (folder.parent / "data").symlink_to(ms.data_directory())
    code = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", code, "build", ".", "--all"]
    environment = os.environ | {"PYTHONPATH": str(BOOK.parent), "MPLCONFIGDIR": str(folder / "matplotlib")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    built = folder / "_build" / "html" / "explorer.html"
    assert built.exists(), done.stdout + done.stderr
    return built


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    paths = map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])
    if (path := next(filter(None, paths), None)) is None:
        pytest.skip("there is no Chromium to open the page in")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=path, args=options)


@pytest.fixture
def one(browser, html):
    """The page, opened; afterwards nothing was wrong in it, and nothing was asked of another host."""
    wrong = []
    one = browser.new_page(viewport={"width": 1280, "height": 900})
    one.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or wrong.append(r.url))
    one.on("pageerror", lambda error: wrong.append(str(error)))
    one.on("console", lambda said: said.type in ("error", "warning") and wrong.append(said.text))
    one.goto(html.as_uri())
    for name in ("two-studies", "agreement"):
        one.wait_for_selector(f"#{name}[data-ready]")
    yield one
    one.close()
    assert [text for text in wrong if not THEME.search(text)] == []


@pytest.fixture(scope="module")
def study():
    return ms.first_seeds(ms.open_study(ms.data_directory() / "fashion69"))


@pytest.fixture(scope="module")
def sat(study):
    return ms.sat(study)


def ordering(one, sat):
    return sat.model.values[one.evaluate(f"() => {{{HERE} it.explorer.ordering()}}")].tolist()


def point(one, figure, *where):
    """Where on the screen a cell (row, column) of the heatmap is, or a network's dot on the map."""
    one.locator(f"#two-studies .{figure} .over").scroll_into_view_if_needed()
    what = "cell" if figure == "heat" else "dot"
    return one.evaluate(f"where => {{{HERE} it.explorer.{what}(...where)}}", where)


def numbers(one):
    facts = one.locator("#two-studies dl > div").all()
    return {fact.locator("dt").inner_text(): fact.locator("dd").inner_text() for fact in facts}


def listed(one, title):
    """Names and numbers in the list that is titled so."""
    section = one.locator("#two-studies .near section").filter(has=one.get_by_text(title))
    rows = [text.split() for text in section.locator("button").all_inner_texts()]
    return [row[0] for row in rows], [float(row[1].replace("−", "-")) for row in rows]


def chosen(one):
    return [one.get_by_label(f"{which} network").first.input_value() for which in ("First", "Second")]


def test_hovering_tells_the_pair_its_interval_and_both_directions(one, study, sat):
    a, b = (ordering(one, sat)[k] for k in (3, 40))
    one.mouse.move(*point(one, "heat", 3, 40))
    low, high = ms.interval(study, "sat").sel(model=a, other=b).values
    rate = 100 * ms.transferability(study)
    assert one.locator("#two-studies .heat .tip").inner_text().splitlines() == [
        *(a, b, f"SAT, here: {sat.sel(model=a, other=b):.2f} [{low:.2f}, {high:.2f}]"),
        f"first → second, here: {rate.sel(source=a, target=b):.1f} %",
        f"first ← second, here: {rate.sel(source=b, target=a):.1f} %",
    ]


def test_click_shows_components_neighbours_and_partners(one, study, sat):
    one.mouse.click(*point(one, "heat", 7, 50))
    pair = row, column = [ordering(one, sat)[k] for k in (7, 50)]
    assert chosen(one) == pair
    assert numbers(one)["SAT, here"].startswith(f"{sat.sel(model=row, other=column):.2f} [")
    table = ms.components_table().loc[pair]
    shown = [line.locator("td").all_inner_texts() for line in one.locator("#two-studies tbody tr").all()]
    assert [values[1:] for values in shown] == table.T.to_numpy().tolist()
    assert [values[0] == "≠" for values in shown] == table.nunique().gt(1).tolist()
    names, values = listed(one, "SAT, here: highest with")
    nearest = sat.sel(model=row).drop_sel(other=row).to_series().nlargest(6)
    assert names == nearest.index.tolist()
    assert values == pytest.approx(nearest.to_numpy(), abs=0.006)
    names, values = listed(one, "Best partners of")
    votes = 100 * ms.vote(study, [(row, other) for other in sat.model.values if other != row]).droplevel(0)
    assert values == pytest.approx(votes.nlargest(6).to_numpy(), abs=0.006)
    assert values == pytest.approx(votes[names].to_numpy(), abs=0.006)


def test_a_dot_and_a_listed_name_choose_in_the_heatmap_too(one, sat):
    one.mouse.click(*point(one, "map", sat.model.to_index().get_loc("vit_base_patch32_224")))
    one.locator("#two-studies .near button").nth(1).click()
    assert chosen(one) == ["vit_base_patch32_224", listed(one, "SAT, here")[0][1]]
    one.get_by_label("Swap the two").first.click()
    assert chosen(one)[1] == "vit_base_patch32_224"


def test_search_finds_the_networks_that_hold_it(one, sat):
    search, hits = one.get_by_label("Find a name").first, one.locator("#two-studies .hits button")
    activation = ms.components_table().Activation[sat.model.values].str.lower()
    search.fill("gelu")
    assert hits.all_inner_texts() == activation.index[activation.str.contains("gelu")].tolist()
    search.fill("activation: silu")
    assert hits.count() == (activation == "silu").sum()
    search.fill("crossvit_base")
    search.press("Enter")
    assert chosen(one)[0] == "crossvit_base_240"
    search.press("Escape")
    assert hits.count() == 0


def test_rows_stand_in_the_order_that_is_asked_for(one, study, sat):
    one.get_by_label("Order by").first.select_option("accuracy")
    right = study.clean_probability.argmax("class") == study.test_label
    accuracy = right.mean("test_image").to_series()
    ranked = accuracy[ordering(one, sat)].to_numpy()
    assert ranked[0] == accuracy.max()
    assert (np.diff(ranked) <= 0).all()
    base = {name: one.base for name, one in ms.CATALOGUE.items()}
    for name, label in {"Activation": ms.components_table().Activation, "base": base}.items():
        one.get_by_label("Order by").first.select_option(name)
        groups = [label[network] for network in ordering(one, sat)]
        assert sum(a != b for a, b in pairwise(groups)) == len({*groups}) - 1


def test_keys_move_choose_and_clear_and_every_control_is_reached(one, sat):
    heat = one.locator("#two-studies .heat .over")
    for key in ("PageUp", "End", "ArrowDown", "ArrowLeft"):
        heat.press(key)
    assert heat.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    assert chosen(one) == [ordering(one, sat)[k] for k in (1, 67)]
    assert " and ".join(chosen(one)) in one.locator("#two-studies .live").inner_text()
    heat.press("Enter")
    assert one.evaluate("document.activeElement.getAttribute('aria-label')") == "The chosen pair"
    heat.press("Escape")
    assert "click a cell" in one.locator("#two-studies .empty").inner_text()
    one.get_by_label("Show").first.focus()
    for label in ("Order by", "Heatmap", "Arrows go", "Find", "First network", "Swap", "Second network"):
        one.keyboard.press("Tab")
        assert one.get_by_label(label).first.evaluate("node => node === document.activeElement"), label


def test_difference_of_ranks_is_that_of_the_released_scores(one, sat):
    try:
        there = ms.published_sat().sel(model=sat.model.values, other=sat.model.values)
    except ms.PublishedScoresUnavailable as error:
        pytest.skip(str(error))
    one.get_by_label("Show").first.select_option(label=RANKS)
    one.mouse.click(*point(one, "heat", 10, 20))
    i, j = (sat.model.values.tolist().index(name) for name in chosen(one))
    ranks = [rankdata(matrix.values[np.triu_indices(69, 1)]) / 23.46 for matrix in (sat, there)]
    assert float(numbers(one)[RANKS].replace("−", "-")) == pytest.approx(
        squareform(ranks[0] - ranks[1])[i, j], abs=0.06
    )
    assert numbers(one)["SAT, ImageNet"] == f"{there.values[i, j]:.2f}"


def test_figures_follow_the_theme(one):
    bright = {}
    for theme in ("light", "dark"):
        one.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
        one.wait_for_timeout(300)
        picture = Image.open(BytesIO(one.locator("#two-studies .map").screenshot()))
        bright[theme] = np.asarray(picture.convert("L"))[5:-5, 5:-5]  # without the frame
    assert np.median(bright["light"]) > 240 > 60 > bright["light"].min()  # ground, then names and rings
    assert np.median(bright["dark"]) < 40 < 200 < bright["dark"].max()


def test_it_fits_a_phone_and_no_name_is_cut(one):
    one.set_viewport_size({"width": 390, "height": 800})
    one.get_by_label("First network").first.fill("lamhalobotnet50ts_256")
    one.get_by_label("First network").first.press("Enter")
    assert chosen(one)[0] == "lamhalobotnet50ts_256"
    assert one.evaluate("document.documentElement.scrollWidth") == 390
    assert one.evaluate(f"() => {{{HERE} {CUT}.map(e => e.innerText)}}") == []


def test_page_is_small_and_strangers_have_no_components(one, html):
    assert html.stat().st_size < 3e6
    one.get_by_label("Find a name").last.fill("-seed1")
    assert one.locator("#agreement .hits button").count() == 12
    one.locator("#agreement .hits button").first.click()
    assert one.locator("#agreement tbody tr td:nth-child(3)").all_inner_texts() == ["–"] * 13
    assert "no base given" in one.locator("#agreement .legend").inner_text()


def test_half_a_matrix_holds_every_pair_once_and_nan_as_none():
    assert explorer.triangle(np.array([[np.nan, 1.234], [1.234, 5]]), 2) == [None, 1.23, 5.0]
