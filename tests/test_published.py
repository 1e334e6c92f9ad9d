import os
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pooch
import pytest
import timm

import modelsim as ms
from modelsim import published

NAMES = ["gluon_xception65", "resnet50", "jx_nest_tiny"]
FILES = ["SAT_release.csv", "Model Feature_release.csv"]


@pytest.fixture(scope="module")
def released():
    """The folder that holds the paper's own files."""
    if not os.environ.get("MODELSIM_CACHE"):
        pytest.skip("the paper's released files are not in the repository: set MODELSIM_CACHE to a folder")
    return Path(os.environ["MODELSIM_CACHE"])


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A folder with files of the released form, whose hashes count as the right ones."""
    folder = tmp_path / "made up"
    folder.mkdir()
    scores = pd.DataFrame([[4.6, 2, 3], [2, 4.5, 1], [3, 1, 4.4]], NAMES, NAMES)
    scores.to_csv(folder / FILES[0])
    kinds = {"Base architecture": ["CNN", "Hybrid", "CNN"], "Location of CW attention": ["~", "None", "NA"]}
    components = pd.DataFrame(kinds, pd.Index(reversed(NAMES), name="Model name"))
    components.to_csv(folder / FILES[1])
    hashes = {name: pooch.file_hash(str(folder / name)) for name in FILES}
    monkeypatch.setattr(published, "_SHA256", hashes)
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


def test_scores_are_the_released_ones(released):
    scores = ms.published_sat()
    matrix = scores.values
    pairs = scores.where(np.tri(69, k=-1, dtype=bool)).stack(pair=("model", "other")).dropna("pair")
    assert scores.dims == ("model", "other")
    assert pairs.size == 2346
    np.testing.assert_array_equal(matrix, matrix.T)
    assert scores.model.values.tolist() == scores.other.values.tolist()
    assert round(float(pairs.mean()), 4) == 2.6649
    assert round(float(pairs.median()), 4) == 2.6577
    assert round(float(pairs.min()), 4) == 1.8276
    assert set(pairs.idxmin().item()) == {"vit_base_patch32_224", "wide_resnet50_2"}
    assert round(float(pairs.max()), 4) == 4.1409
    assert set(pairs.idxmax().item()) == {"swin_tiny_patch4_window7_224", "swin_s3_tiny_224"}
    assert round(matrix.diagonal().min(), 4) == 4.4955
    assert round(matrix.diagonal().max(), 4) == 4.6052


def test_components_are_of_the_same_models_in_the_same_order(released):
    components = ms.published_components()
    assert components.shape == (69, 13)
    assert components.index.tolist() == ms.published_sat().model.values.tolist()
    assert components.loc["resnet50", "Stem layer"] == "7s2"
    assert not components.isna().any(axis=None)
    assert set(components["Location of CW attention"]) == {"~", "Middle", "End"}


def test_models_have_the_names_that_timm_knows(released):
    present = set(timm.list_models())
    assert set(ms.published_sat().model.values) <= present
    assert not set(published.TODAYS_NAMES) & present


def test_released_files_are_fetched_once_without_a_note(server, cache, capfd):
    first = ms.published_sat()
    assert server == ["SAT_release.csv"]
    second, components = ms.published_sat(), ms.published_components()
    assert server == FILES
    assert sorted(path.name for path in cache.iterdir()) == sorted(FILES)
    assert first.identical(second)
    assert capfd.readouterr() == ("", "")
    assert components.index.tolist() == ["xception65", "resnet50", "nest_tiny_jx"]


def test_tables_keep_their_values_under_present_names_in_one_order(made_up, monkeypatch):
    monkeypatch.setenv("MODELSIM_CACHE", str(made_up))
    scores, components = ms.published_sat(), ms.published_components()
    assert scores.model.values.tolist() == ["xception65", "resnet50", "nest_tiny_jx"]
    assert float(scores.sel(model="xception65", other="nest_tiny_jx")) == 3
    assert scores.attrs["units"] == "log of per cent"
    assert components.index.tolist() == scores.model.values.tolist()
    assert components["Location of CW attention"].tolist() == ["NA", "None", "~"]


def test_folder_of_the_environment_is_used_in_place_of_the_network(server, made_up, cache, monkeypatch):
    monkeypatch.setenv("MODELSIM_CACHE", str(made_up))
    assert ms.published_sat().shape == (3, 3)
    assert server == []
    assert not cache.exists()


def test_file_fetched_with_another_content_is_refused_and_not_kept(server, made_up, cache):
    (made_up / FILES[0]).write_text(",resnet50\nresnet50,4.6\n")
    with pytest.raises(ValueError, match=r"hash of downloaded file \(SAT_release.csv\) does not match"):
        ms.published_sat()
    assert list(cache.iterdir()) == []


def test_damaged_file_in_the_cache_is_fetched_anew(server, cache):
    whole = ms.published_sat()
    (cache / FILES[0]).write_text("half")
    assert ms.published_sat().identical(whole)
    assert server == [FILES[0]] * 2


def test_without_network_and_cache_both_ways_out_are_named(cache, monkeypatch, capfd):
    monkeypatch.setattr(published, "_SOURCE", "http://127.0.0.1:9/")
    for read in (ms.published_sat, ms.published_components):
        with pytest.raises(ms.PublishedScoresUnavailable, match=r"Connect to the network .* MODELSIM_CACHE"):
            read()
    assert capfd.readouterr() == ("", "")


def test_cache_that_cannot_be_written_is_named_with_the_way_out(server, cache, tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder would have to be made")
    with pytest.raises(ms.PublishedScoresUnavailable, match=rf"into {cache} \(.*MODELSIM_CACHE"):
        ms.published_sat()


def test_relative_folder_of_the_environment_is_named_by_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELSIM_CACHE", "released")
    with pytest.raises(FileNotFoundError, match=f"set to {tmp_path / 'released'}, which is not a folder"):
        ms.published_sat()


def test_file_that_the_server_does_not_have_is_unavailable(server, made_up):
    (made_up / FILES[0]).unlink()
    with pytest.raises(ms.PublishedScoresUnavailable, match="404"):
        ms.published_sat()


def test_another_file_in_the_folder_is_named_with_both_hashes(made_up, monkeypatch):
    monkeypatch.setenv("MODELSIM_CACHE", str(made_up))
    path = made_up / FILES[0]
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="is not the released file") as caught:
        ms.published_sat()
    for part in (str(path), published._SHA256[FILES[0]], pooch.file_hash(str(path))):
        assert part in str(caught.value)


def test_folder_without_the_file_and_missing_folder_are_named(made_up, monkeypatch):
    monkeypatch.setenv("MODELSIM_CACHE", str(made_up))
    (made_up / FILES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"made up, which has no file 'Model Feature_release.csv'"):
        ms.published_components()
    shutil.rmtree(made_up)
    with pytest.raises(FileNotFoundError, match=r"made up, which is not a folder.*SAT_release\.csv"):
        ms.published_sat()
