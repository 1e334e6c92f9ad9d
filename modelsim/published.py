"""The paper's released scores and components, fetched when asked for; no part of them ships with the book."""

import os
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import pooch
import xarray as xr

from modelsim.scores import labelled

_SOURCE = "https://raw.githubusercontent.com/J-H-Hwang/SAT/79f23d152680b8c0fb3744dcf7a373f21e1e3aea/"
_SAT = "SAT_release.csv"
_COMPONENTS = "Model Feature_release.csv"
_SHA256 = {
    _SAT: "d2ddbfe54d1a0e8644a9373d2f69de400c2ce06dc2e23c55b0f589d7f7f860f1",
    _COMPONENTS: "8e5c16fbbb12e9d3f83a662029645bbc50bff24082c6ebb3a55ae0e122547f61",
}
TODAYS_NAMES = dict(
    gluon_resnet101_v1c="resnet101c", gluon_xception65="xception65", jx_nest_tiny="nest_tiny_jx"
)
"""timm's present names of three models of the paper; it no longer has Gluon's weights of the second."""


class PublishedScoresUnavailable(ConnectionError):
    """The released files are neither on this computer nor could they be fetched."""


def published_sat() -> xr.DataArray:
    """Return the paper's similarity of 69 ImageNet models by attack transferability.

    The file is fetched once from the paper's repository, checked against its SHA-256 and kept in the
    user's cache. Where there is no network, set the environment variable `MODELSIM_CACHE` to a folder
    that holds it.

    Examples
    --------
    >>> published_sat().sel(model="resnet50", other="convnext_tiny")

    Returns
    -------
    DataArray
        (model, other), 69 × 69, symmetric, log of per cent: from 1.83 to 4.14 for two models, about
        log 100 ≈ 4.605 on the diagonal. Models have timm's present names, see `TODAYS_NAMES`.

    Raises
    ------
    PublishedScoresUnavailable
        If the file isn't cached and can't be fetched, or the cache can't be written.
    FileNotFoundError
        If `MODELSIM_CACHE` names a folder that doesn't exist or lacks the file.
    ValueError
        If the file in that folder, or the one fetched, isn't the released one.

    References
    ----------
    Hwang et al., *Similarity of Neural Architectures Based on Input Gradient Transferability*,
    arXiv 2210.11407.
    """
    table = _read(_SAT)
    values, source = table[table.index].to_numpy(dtype=float), _SOURCE + quote(_SAT)
    return labelled(values, table.index.tolist(), "SAT", units="log of per cent", source=source)


def published_components() -> pd.DataFrame:
    """Return the 13 components of the paper's 69 models, labelled by hand by its authors.

    Fetched and kept as by `published_sat`.

    Examples
    --------
    >>> published_components().loc["resnet50", "Stem layer"]
    '7s2'

    Returns
    -------
    DataFrame
        One row a model, in the order of `published_sat`; one column of strings a component, named
        and valued as released.

    Raises
    ------
    PublishedScoresUnavailable, FileNotFoundError, ValueError
        As `published_sat`.
    """
    return _read(_COMPONENTS).loc[list(_read(_SAT).index)].rename_axis(index="model")


def _read(name: str) -> pd.DataFrame:
    """Read a released table; its first column is the model, by timm's present name."""
    folder = os.environ.get("MODELSIM_CACHE")
    path = _given(Path(folder).absolute(), name) if folder else _fetched(name)
    table = pd.read_csv(path, index_col=0, keep_default_na=False)
    return table.rename(index=TODAYS_NAMES, columns=TODAYS_NAMES)


def _given(folder: Path, name: str) -> Path:
    """Find a file in the folder that the user named, and check its hash."""
    path, advice = folder / name, f"put {_SOURCE}{quote(name)} there, or unset MODELSIM_CACHE to fetch it"
    if not path.is_file():
        missing = f"has no file {name!r}" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(f"MODELSIM_CACHE is set to {folder}, which {missing}: {advice}")
    if (found := pooch.file_hash(path)) != _SHA256[name]:
        raise ValueError(f"{path} is not the released file: SHA-256 {found}, not {_SHA256[name]}; {advice}")
    return path


def _fetched(name: str) -> Path:
    """Find a file in the user's cache, or fetch it there; either way its hash is checked."""
    # By default pooch notes every download on stderr, where a page of the book must have nothing.
    pooch.get_logger().setLevel("WARNING")
    url, folder = _SOURCE + quote(name), pooch.os_cache("modelsim")
    try:
        return Path(pooch.retrieve(url, _SHA256[name], fname=name, path=folder))
    except OSError as error:  # of the network, or of a home that can't be written
        raise PublishedScoresUnavailable(
            f"can't fetch {url} into {folder} ({error}). Connect to the network and try again, or "
            "set MODELSIM_CACHE to a folder that holds the file"
        ) from error
