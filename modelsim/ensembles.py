"""Models that vote together: how often each set of them is right.

*Sets* are the rows of a `pandas.MultiIndex` whose levels hold names of models, one level a member.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from modelsim.zoo import unknown_name_message

Vote = Literal["soft", "hard", "logit"]

# Steps of a probability in a study. Counted in steps sums are exact, and so are ties.
_STEPS = 10_000
# Sets that are counted together: bounds the memory.
_AT_ONCE = 512


def vote(study: xr.Dataset, sets: Iterable[Sequence[str]], *, how: Vote = "soft") -> pd.Series:
    """Let sets of models vote on the test images of a study.

    Examples
    --------
    >>> vote(study, itertools.combinations(study.target.values, 2))
    >>> vote(study, [("resnet50", "convnext_tiny", "mixer_b16_224")], how="hard")

    Parameters
    ----------
    study : Dataset
        From `open_study`, with probabilities of test images.
    sets : MultiIndex or iterable of sequences of str
        Names of models; all sets of one size.
    how : {"soft", "hard", "logit"}
        The class with the highest mean probability; the one that most members rate highest; or the one
        with the highest mean log-probability, as if logits were averaged. Ties go to the class that comes
        first. Probabilities are in steps of 1/10,000, as in a study; in a logarithm, 0 is half a step.

    Returns
    -------
    Series
        Share of the images, 0 … 1, that each set gets right, in the given order.

    Raises
    ------
    ValueError
        If the study has no probabilities; a set has a repeated or unknown member, or another size than the
        first; a probability is missing (as where studies of different images or classes were merged), or
        those of an image don't add up to 1. The message names the culprit.
    """
    if how not in get_args(Vote):
        raise ValueError(f"how must be one of {', '.join(get_args(Vote))}; got {how!r}")
    index = sets if isinstance(sets, pd.MultiIndex) else _as_index([tuple(members) for members in sets])
    used, members = np.unique(_positions(index, study.target.to_index()), return_inverse=True)
    steps, label = _probability_steps(study.isel(target=used)), study.test_label.values
    disputed = (steps.argmax(axis=2) != label).any(axis=0)  # where all are right alone, every vote is
    score, tie = _scores(steps[:, disputed], how)
    truth = label[disputed]
    margin = np.take_along_axis(score, truth[None, :, None], axis=2) - score
    wrong = np.zeros(len(index), dtype=int)
    for start in range(0, len(index), _AT_ONCE):
        batch = np.eye(len(used), dtype=score.dtype)[members[start : start + _AT_ONCE]].sum(axis=1)
        beaten = np.zeros((len(batch), len(truth)), dtype=bool)
        for rival in range(score.shape[2]):
            # A class that comes first wins a tie, and no class is its own rival.
            limit = np.select([rival < truth, rival > truth], [tie, -tie], -np.inf).astype(score.dtype)
            beaten |= batch @ margin[..., rival] < limit
        wrong[start : start + _AT_ONCE] = beaten.sum(axis=1)
    return pd.Series((len(label) - wrong) / len(label), index, name="accuracy")


def _scores(steps: NDArray[np.integer], how: Vote) -> tuple[NDArray[Any], float]:
    """Return what a vote adds up, and within what a difference of sums is a tie."""
    if how == "logit":  # Sums of logarithms are off by 1e-14; members' probabilities differ by 1e-4.
        return np.log(np.maximum(2 * steps, 1)), 1e-12
    counted = np.eye(steps.shape[2])[steps.argmax(axis=2)] if how == "hard" else steps
    return counted.astype(np.float32), 0.5  # float32 adds whole numbers exactly, up to 2**24


def _as_index(rows: list[tuple[str, ...]]) -> pd.MultiIndex:
    sizes = sorted({len(members) for members in rows})
    if len(sizes) != 1 or sizes[0] < 2:
        raise ValueError(f"sets must have 2 members or more, all as many; got {sizes or 'no set'}")
    return pd.MultiIndex.from_tuples(rows)


def _positions(sets: pd.MultiIndex, names: pd.Index) -> NDArray[np.integer]:
    """Return where the members (set, member) stand among `names`."""
    members = np.column_stack([names.get_indexer(sets.get_level_values(i)) for i in range(sets.nlevels)])
    for row, column in np.argwhere(members < 0):
        raise ValueError(unknown_name_message("model", str(sets[row][column]), map(str, names)))
    ordered = np.sort(members, axis=1)
    for row, column in np.argwhere(np.diff(ordered) == 0):
        raise ValueError(f"{names[ordered[row, column]]} is repeated in the set {', '.join(sets[row])}")
    return members


def _probability_steps(study: xr.Dataset) -> NDArray[np.integer]:
    """Return the probabilities (model, image, class) in whole steps, once they are known to be some."""
    if "clean_probability" not in study or study.sizes["test_image"] == 0:
        raise ValueError("this study holds no probabilities of test images: give `test_images` to `transfer`")
    array = study.clean_probability.transpose("target", "test_image", "class")
    exact = array.values * _STEPS
    # Each is rounded by half a step at the most. Comparisons with NaN are False.
    fine = (abs(exact.sum(axis=2) - _STEPS) <= exact.shape[2] / 2 + 1e-6) & (exact >= 0).all(axis=2)
    for i, j in np.argwhere(~fine):
        raise ValueError(
            "models vote on the same images and classes, with probabilities that add up to 1; those of "
            f"{array.target.values[i]} for image {array.test_image.values[j]} are {array.values[i, j]}"
        )
    return np.rint(exact).astype(int)
