import hashlib
import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

import pandas as pd
import pooch
import pytest
import timm

import modelsim as ms
from modelsim import published

NAMES = ["gluon_xception65", "resnet50", "jx_nest_tiny"]
HASHES = f"is not the released file: SHA-256 {hashlib.sha256(b',').hexdigest()}, not [0-9a-f]{{64}}"
FILES = ["SAT_release.csv", "Model Feature_release.csv"]


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A folder with files of the released form, whose hashes count as the right ones."""
    folder = tmp_path / "made up"
    folder.mkdir()
    pd.DataFrame([[4.6, 2, 3], [2, 4.5, 1], [3, 1, 4.4]], NAMES, NAMES).to_csv(folder / FILES[0])
    kinds = {"Base architecture": ["CNN", "Hybrid", "CNN"], "Location of CW attention": ["~", "None", "NA"]}
    pd.DataFrame(kinds, pd.Index(NAMES[::-1], name="Model name")).to_csv(folder / FILES[1])
    monkeypatch.setattr(published, "_SHA256", {name: pooch.file_hash(folder / name) for name in FILES})
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the user, and no folder named by the environment."""
    monkeypatch.delenv("MODELSIM_CACHE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    return tmp_path / "cache" / "modelsim"


@pytest.fixture
def server(made_up, cache, monkeypatch):
    """Serve the made-up files; yields the names asked for so far."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(unquote(self.path.strip("/")))

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=made_up)) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(published, "_SOURCE", f"http://127.0.0.1:{running.server_port}/")
        yield asked
        running.shutdown()


@pytest.mark.skipif(
    not os.environ.get("MODELSIM_CACHE"), reason="the paper's files are not in the repository"
)
def test_scores_and_components_are_the_released_ones():
    scores, components = ms.published_sat(), ms.published_components()
    pairs, own = ms.pairs(scores), scores.values.diagonal()
    assert (pairs.size, components.shape) == (2346, (69, 13))
    statistics = pairs.mean(), pairs.median(), pairs.min(), pairs.max(), own.min(), own.max()
    assert [round(value, 4) for value in statistics] == [2.6649, 2.6577, 1.8276, 4.1409, 4.4955, 4.6052]
    assert set(pairs.idxmin()) == {"vit_base_patch32_224", "wide_resnet50_2"}
    assert set(pairs.idxmax()) == {"swin_tiny_patch4_window7_224", "swin_s3_tiny_224"}
    assert components.index.tolist() == scores.model.values.tolist() == scores.other.values.tolist()
    assert components.loc["resnet50", "Stem layer"] == "7s2"
    assert not components.isna().any(axis=None)
    assert set(components["Location of CW attention"]) == {"~", "Middle", "End"}
    present = set(timm.list_models())
    assert set(components.index) <= present
    assert not set(published.TODAYS_NAMES) & present


def test_released_files_are_fetched_once_without_a_note_and_anew_where_damaged(server, cache, capfd):
    first = ms.published_sat()
    assert server == FILES[:1]
    second, components = ms.published_sat(), ms.published_components()
    assert server == FILES
    (cache / FILES[0]).write_text("half")
    assert all(first.identical(again) for again in (second, ms.published_sat()))
    assert server == [*FILES, FILES[0]]
    assert sorted(path.name for path in cache.iterdir()) == sorted(FILES)
    assert capfd.readouterr() == ("", "")
    assert components.index.tolist() == ["xception65", "resnet50", "nest_tiny_jx"]


def test_tables_of_a_named_folder_keep_their_values_under_present_names(server, made_up, cache, monkeypatch):
    monkeypatch.setenv("MODELSIM_CACHE", str(made_up))
    scores, components = ms.published_sat(), ms.published_components()
    assert (
        scores.model.values.tolist()
        == components.index.tolist()
        == ["xception65", "resnet50", "nest_tiny_jx"]
    )
    assert float(scores.sel(model="xception65", other="nest_tiny_jx")) == 3
    assert scores.attrs["units"] == "log of per cent"
    assert components["Location of CW attention"].tolist() == ["NA", "None", "~"]
    assert (server, cache.exists()) == ([], False)


# What is wrong: the folder that the environment names, what is done to the files, error and message.
UNAVAILABLE = ms.PublishedScoresUnavailable
WRONG = {
    "no network": (None, "offline", UNAVAILABLE, "Connect to the network .* MODELSIM_CACHE"),
    "not on the server": (None, "gone", UNAVAILABLE, "404"),
    "cache that can't be written": (
        None,
        "blocked",
        UNAVAILABLE,
        r"into .*cache/modelsim \(.*MODELSIM_CACHE",
    ),
    "other content": (None, "spoilt", ValueError, r"hash of downloaded file \(SAT_.* does not match"),
    "missing folder": ("no such", "", FileNotFoundError, "set to /.*/no such, which is not a folder"),
    "missing file": ("made up", "gone", FileNotFoundError, "made up, which has no file 'SAT_release.csv'"),
    "another file": ("made up", "spoilt", ValueError, HASHES),
}


@pytest.mark.parametrize(("folder", "how", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(folder, how, error, message, server, made_up, cache, monkeypatch, capfd):
    monkeypatch.chdir(made_up.parent)
    if folder:
        monkeypatch.setenv("MODELSIM_CACHE", folder)  # relative: named by where it was looked for
    if how == "offline":
        monkeypatch.setattr(published, "_SOURCE", "http://127.0.0.1:9/")
    if how == "blocked":
        cache.parent.write_text("a file, where a folder would have to be made")
    if how == "gone":
        (made_up / FILES[0]).unlink()
    if how == "spoilt":
        (made_up / FILES[0]).write_text(",")
    for read in (ms.published_sat, ms.published_components):
        with pytest.raises(error, match=message):
            read()
    assert not (cache / FILES[0]).exists()
    assert capfd.readouterr() == ("", "")
