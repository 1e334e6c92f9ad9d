"""What diversity is good for: models that vote together, and how similar they are.

*Sets* are the rows of a `pandas.MultiIndex` whose levels hold names of models, one level a member. Tables of
sets have it as their index.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor

from modelsim.clustering import Labels
from modelsim.scores import check_matrix
from modelsim.zoo import split_model_name, unknown_name_message

Vote = Literal["soft", "hard", "logit"]
Rule = Literal["accuracy", "diversity", "both"]
Sets: TypeAlias = pd.MultiIndex | Iterable[Sequence[str]]
Floats = NDArray[np.floating]
Integers = NDArray[np.integer]

_STEPS = 10_000
"""Steps of a probability in a study. Counted in steps sums are exact, and so are ties."""


def member_sets(names: Sequence[str], size: int, *, most: int = 100_000, seed: int = 0) -> pd.MultiIndex:
    """List all sets of `size` models, or `most` different ones drawn by `seed` where there are more.

    Examples
    --------
    >>> member_sets(["resnet50", "seresnet50", "convnext_tiny"], 2)

    Raises
    ------
    ValueError
        If a name is given twice, the size isn't 2 … number of models, or there are 2⁶³ sets or more.
    """
    n = len(names)
    if len(set(names)) < n:
        raise ValueError(f"{next(name for name in names if list(names).count(name) > 1)} is named twice")
    _check_size(size, n)
    total = math.comb(n, size)
    if total >= 2**63:
        raise ValueError(f"there are {total:.1e} sets of {size} out of {n} models: choose a smaller size")
    random = np.random.default_rng(seed)
    numbers = np.arange(total) if total <= most else np.sort(random.choice(total, most, replace=False))
    # A set's number, counted from the last, is a sum of binomial coefficients: the combinatorial number
    # system (Knuth, The Art of Computer Programming, 7.2.1.3).
    rest, members = total - 1 - numbers, []
    for left in range(size, 0, -1):
        below = np.array([math.comb(i, left) for i in range(n)])
        digit = np.searchsorted(below, rest, side="right") - 1
        rest = rest - below[digit]
        members.append(n - 1 - digit)
    return pd.MultiIndex([list(names)] * size, members, names=_member_names(size))


def _member_names(size: int) -> list[str]:
    return [f"member {i}" for i in range(1, size + 1)]


def _check_size(size: int, n: int) -> None:
    if not 2 <= size <= n:
        raise ValueError(f"size must be 2 … {n}, the number of models; got {size}")


def _check_choice(name: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {value!r}")


def ensembles(
    study: xr.Dataset,
    sets: Sets,
    similarity: xr.DataArray,
    *,
    vote: Vote = "soft",
    batch_size: int = 256,
    device: str | None = None,
) -> pd.DataFrame:
    """Let sets of models vote on the test images of a study.

    Examples
    --------
    >>> table = ensembles(study, member_sets(study.target.values, 2), sat(study))
    >>> table.loc[("resnet50", "convnext_tiny")]
    >>> ensembles(study, [("resnet50", "convnext_tiny", "mixer_b16_224")], sat(study), vote="hard")

    Parameters
    ----------
    study : Dataset
        From `open_study`, with probabilities of test images.
    sets : MultiIndex or iterable of sequences of str
        From `member_sets`, or names of models; all of one size.
    similarity : DataArray
        Symmetric (model, other), such as SAT or relative SAT. The diagonal doesn't count.
    vote : {"soft", "hard", "logit"}
        The class with the highest mean probability; the one that most members rate highest; or the one
        with the highest mean log-probability, as if logits were averaged. Ties go to the class that comes
        first. Probabilities are in steps of 1/10,000, as in a study; in a logarithm, 0 is half a step.
    batch_size : int
        Sets at a time: bounds the memory, changes nothing else.
    device : str, optional
        By default `"cuda"` where there is one, else `"cpu"`.

    Returns
    -------
    DataFrame
        A row for each set, in the given order.

        - `accuracy` of the ensemble, `mean_accuracy` of its members, `best_accuracy` among them: 0 … 1;
        - `reduction`: 1 - error / mean error of the members; `reduction_of_best`: 1 - error / error of the
          best; at most 1, 0 where voting gains nothing, NaN where these members make no error;
        - `all_wrong`: share of the images that no member gets right, 0 … 1;
        - `mean_similarity`, `max_similarity` of the pairs of members.

    Raises
    ------
    ValueError
        If the study has no probabilities; a set has a repeated or unknown member, or another size than the
        first; a probability is missing (as where studies of different images or classes were merged), or
        those of an image don't add up to 1; or a similarity is missing. The message names the culprit.
    """
    _check_choice("vote", vote, Vote)
    _check_study(study)
    index = _as_index(sets)
    used, members = np.unique(_positions(index, study.target.values), return_inverse=True)
    alike = _square(similarity, study.target.values[used])
    ballot = _ballot(study.isel(target=used), vote, device)
    images, alone = ballot.images, ballot.wrong_alone[members]
    wrong = _count_wrong(ballot.contests, members, batch_size)
    pairs = np.stack([alike[a, b] for a, b in combinations(members.T, 2)])
    columns = {
        "accuracy": (images - wrong) / images,
        "mean_accuracy": (images - alone.mean(axis=1)) / images,
        "best_accuracy": (images - alone.min(axis=1)) / images,
        "reduction": _reduction(wrong, alone.mean(axis=1)),
        "reduction_of_best": _reduction(wrong, alone.min(axis=1)),
        "all_wrong": _count_wrong(ballot.any_right, members, batch_size) / images,
        "mean_similarity": pairs.mean(axis=0),
        "max_similarity": pairs.max(axis=0),
    }
    return pd.DataFrame(columns, index)


def _reduction(error: Integers, reference: Floats) -> Floats:
    return np.asarray(1 - error / np.where(reference > 0, reference, np.nan))


def _check_study(study: xr.Dataset) -> None:
    if "clean_probability" not in study or study.sizes["test_image"] == 0:
        raise ValueError(
            "this study holds no probabilities of test images: make one with `python -m modelsim transfer` "
            "(without --no-probabilities), or give `test_images` to `transfer`"
        )
    names = study.target.to_index()
    if names.has_duplicates:
        raise ValueError(f"{names[names.duplicated()][0]} stands more than once in the study")


def _as_index(sets: Sets) -> pd.MultiIndex:
    if isinstance(sets, pd.MultiIndex):
        return sets
    rows = [tuple(members) for members in sets]
    sizes = sorted({len(members) for members in rows})
    if len(sizes) != 1 or sizes[0] < 2:
        raise ValueError(f"sets must have 2 members or more, all as many; got {sizes or 'no set'}")
    return pd.MultiIndex.from_tuples(rows, names=_member_names(sizes[0]))


def _positions(sets: pd.MultiIndex, names: Sequence[str]) -> Integers:
    """Return where the members (set, member) stand among `names`."""
    levels = [sets.get_level_values(i) for i in range(sets.nlevels)]
    members = np.column_stack([pd.Index(names).get_indexer(level) for level in levels])
    for row, column in np.argwhere(members < 0)[:1]:
        raise ValueError(unknown_name_message("model", str(sets[row][column]), map(str, names)))
    ordered = np.sort(members, axis=1)
    for row, column in np.argwhere(np.diff(ordered) == 0)[:1]:
        raise ValueError(f"{names[ordered[row, column]]} is repeated in the set {', '.join(sets[row])}")
    return members


def _square(similarity: xr.DataArray, names: Sequence[str]) -> Floats:
    """Return the similarity of these models as (model, other), NaN on the diagonal."""
    for name in names:
        if not all(name in similarity[dim] for dim in similarity.dims):
            raise ValueError(f"{name} has no similarity to others: give a matrix with all members")
    matrix = similarity.sel(dict.fromkeys(similarity.dims, names)).astype(float)
    np.fill_diagonal(matrix.values, np.nan)
    check_matrix(matrix)
    return np.asarray(matrix.values)


class _Contest(NamedTuple):
    """A rival class on each of some images. A vote is wrong if its margins add up to less than the limit."""

    margin: Tensor
    """(model, image): score of the true class less that of the rival."""
    limit: Tensor
    """(image,): a little above 0 if the rival would win a tie, else a little below."""


class _Ballot(NamedTuple):
    contests: list[_Contest]
    right: Tensor
    """(model, image): what each gets right alone, of the images that some model gets wrong."""
    images: int
    """Number of all images."""

    @property
    def wrong_alone(self) -> Integers:
        """Number of images (model,) that each gets wrong alone."""
        return np.asarray((~self.right).sum(1).cpu())

    @property
    def any_right(self) -> list[_Contest]:
        """The contest of a vote that is right if any member is."""
        return [_Contest(self.right.float(), torch.full_like(self.right[0], 0.5, dtype=torch.float32))]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: on a busy machine, sharing out pieces of 0.1 ms takes 20 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def _ballot(study: xr.Dataset, vote: Vote, device: str | None) -> _Ballot:
    """Lay out what votes depend on: the rivals that some model prefers to the true class.

    Other rivals never win: the sum of margins that are on one side of the limit is on this side too. Nor
    does a rival win without any score: where the true class has none either, a third class has some.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    steps, labels = _probability_steps(study), study.test_label.values.astype(np.int64)
    right = steps.argmax(axis=2) == labels
    disputed = ~right.all(axis=0)
    score, tie = _scores(steps[:, disputed], vote)
    score, label = score.to(device), torch.from_numpy(labels[disputed]).to(device)[:, None]
    margin = score.gather(2, label.expand(len(score), -1, 1)) - score
    comes_first = torch.arange(score.shape[2], device=device) < label
    limit = torch.where(comes_first, tie, -tie).to(score.dtype)
    matters = ((margin < limit) & (score > 0)).any(0)
    # The first rival of every image makes a contest, then the second of those that have two, and so on.
    number, images = matters.sum(1).sort(descending=True)
    rivals = matters[images].int().argsort(1, descending=True)
    contests = []
    for turn in range(score.shape[2]):
        n = int((number > turn).sum())
        at = images[:n], rivals[:n, turn]
        contests.append(_Contest(margin[:, *at].contiguous(), limit[at]))
    return _Ballot(contests, torch.from_numpy(right[:, disputed]).to(device), len(labels))


def _scores(steps: NDArray[np.int64], vote: Vote) -> tuple[Tensor, float]:
    """Return what a vote adds up, 0 or more, and within what a difference of sums is a tie."""
    if vote == "logit":  # Sums of logarithms are off by 1e-14; members' probabilities differ by 1e-4.
        return torch.from_numpy(np.log(np.maximum(2 * steps, 1))), 1e-12
    highest = np.eye(steps.shape[2])[steps.argmax(axis=2)]
    # float32 adds whole numbers exactly, up to 2**24.
    return torch.from_numpy((highest if vote == "hard" else steps).astype(np.float32)), 0.5


def _probability_steps(study: xr.Dataset) -> NDArray[np.int64]:
    """Return the probabilities (model, image, class) in whole steps, once they are known to be some."""
    array = study.clean_probability.transpose("target", "test_image", "class")
    exact = array.values * _STEPS
    for where in np.argwhere(np.isnan(exact))[:1]:
        model, image, name = (array[dim].values[i] for dim, i in zip(array.dims, where, strict=True))
        raise ValueError(
            f"{model} has no probability of class {name} for image {image}: models can only vote together "
            "on the same images and classes"
        )
    slack = exact.shape[2] / 2 + 1e-6  # each is rounded by half a step at the most
    bad = (abs(exact.sum(axis=2) - _STEPS) > slack) | (exact < 0).any(axis=2)
    for i, j in np.argwhere(bad)[:1]:
        raise ValueError(
            f"probabilities must be at least 0 and add up to 1; those of {array.target.values[i]} for image "
            f"{array.test_image.values[j]} are {(exact[i, j] / _STEPS).round(4).tolist()}"
        )
    return np.rint(exact).astype(np.int64)


@_one_thread()
def _count_wrong(contests: list[_Contest], members: Integers, batch_size: int = 256) -> Integers:
    """Count the images on which the vote of each set (set, member) is wrong in any contest."""
    device, width = contests[0].limit.device, max(len(limit) for _, limit in contests)
    counts = np.empty(len(members), dtype=np.int64)
    for start in range(0, len(members), batch_size):
        batch = torch.from_numpy(members[start : start + batch_size]).to(device)
        wrong = torch.zeros(len(batch), width, dtype=torch.bool, device=device)
        for margin, limit in contests:
            if len(limit) == 0:  # no image left to decide
                continue
            total = torch.nn.functional.embedding_bag(batch, margin, mode="sum")
            wrong[:, : len(limit)] |= total < limit
        counts[start : start + batch_size] = wrong.sum(1).cpu()
    return counts


class Correlation(NamedTuple):
    """A correlation over sets, -1 … 1, with its interval."""

    correlation: float
    low: float
    high: float


def set_correlation(
    table: pd.DataFrame,
    outcome: str = "reduction",
    by: str = "mean_similarity",
    *,
    given: Sequence[str] = (),
    level: float = 0.95,
) -> Correlation:
    """Correlate two columns over sets (Spearman), with an interval that speaks of other architectures.

    Sets share members: 100,000 sets of 69 architectures know no more than 69 architectures do. So one
    architecture at a time is left out, that is all sets with one of its models, and ranks are taken anew.
    This jackknife is made for functions of means over all sets of a size. (A bootstrap would have few sets
    left in which no model is drawn twice, and give some of them dozens of times the weight of others.)

    Examples
    --------
    >>> set_correlation(table)
    >>> set_correlation(table, given=["mean_accuracy", "best_accuracy"])

    Parameters
    ----------
    table : DataFrame
        From `ensembles`, perhaps with further columns.
    outcome, by : str
        The columns to correlate.
    given : sequence of str
        Controls: ranks are compared after a linear fit on the controls' ranks.
    level : float
        Coverage of the interval, 0 … 1; by Student's t, on the scale of Fisher's z.

    Raises
    ------
    ValueError
        If a column is unknown, holds NaN, or doesn't vary (after the fit); there are fewer than four
        architectures, or one is in all sets; or the level is out of range.

    References
    ----------
    Arvesen, *Jackknifing U-statistics*, Annals of Mathematical Statistics 1969.
    """
    codes = [np.unique(_complete(table, column), return_inverse=True)[1] for column in (outcome, by, *given)]

    def statistic(kept: NDArray[np.bool_]) -> Floats:
        found = _rank_correlation([code[kept] for code in codes])
        if math.isnan(found):
            raise ValueError(f"{outcome!r} or {by!r} doesn't vary by itself: there is nothing to correlate")
        return np.arctanh(np.clip(found, -1 + 1e-12, 1 - 1e-12))  # arctanh(1) is infinite

    return Correlation(*(float(np.tanh(z)) for z in _leaving_out(table.index, statistic, level)))


def _complete(table: pd.DataFrame, column: str) -> Floats:
    if column not in table:
        raise ValueError(unknown_name_message("column", column, map(str, table.columns)))
    for members in table.index[table[column].isna()]:
        raise ValueError(f"{column!r} of the set {', '.join(members)} is NaN: leave such sets out")
    return table[column].to_numpy(float)


def _rank_correlation(codes: Sequence[Integers]) -> float:
    """Correlate the ranks of the first two after a fit on those of the others; NaN if nothing is left."""
    counts = [np.bincount(code) for code in codes]
    ranks = [(count.cumsum() - count / 2)[code] for count, code in zip(counts, codes, strict=True)]
    moments = np.cov(ranks)
    both, across = moments[:2, :2], moments[:2, 2:]
    rest = both - across @ np.linalg.pinv(moments[2:, 2:]) @ across.T
    if (np.diag(rest) <= 1e-9 * np.diag(both)).any():
        return math.nan
    return float(rest[0, 1] / np.sqrt(rest[0, 0] * rest[1, 1]))


def _leaving_out(
    sets: pd.MultiIndex, statistic: Callable[[NDArray[np.bool_]], Floats], level: float
) -> tuple[Floats, Floats, Floats]:
    """Compute a statistic of the sets kept, with its interval by jackknife over architectures."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    names, members = _architectures(sets)
    n = len(names)
    kept = [(members != i).all(axis=1) for i in range(n)]
    if n < 4 or not all(some.any() for some in kept):
        raise ValueError(f"an interval needs four architectures, none of them in all sets; got {names}")
    found, each = statistic(np.ones(len(sets), dtype=bool)), np.array([statistic(some) for some in kept])
    error = np.sqrt((n - 1) / n * ((each - each.mean(axis=0)) ** 2).sum(axis=0))
    half = student.ppf((1 + level) / 2, n - 1) * error
    return found, found - half, found + half


def _architectures(sets: pd.MultiIndex) -> tuple[list[str], Integers]:
    """Return the names of the architectures, and where among them the members (set, member) stand."""
    sets = sets.remove_unused_levels()
    owners = [[split_model_name(name)[0] for name in level] for level in sets.levels]
    names = sorted(set().union(*owners))
    positions = [pd.Index(names).get_indexer(level) for level in owners]
    return names, np.column_stack([at[codes] for at, codes in zip(positions, sets.codes, strict=True)])


def set_means(table: pd.DataFrame, outcome: str, groups: pd.Series, *, level: float = 0.95) -> pd.DataFrame:
    """Average a column in groups of sets, with intervals, and errors raised, as in `set_correlation`.

    `groups` has a value for every row. The table has a row for each, sorted, and columns `sets` (how many),
    `mean`, `low`, `high`; the last two are NaN if all sets of the group share an architecture.

    Examples
    --------
    >>> set_means(table, "reduction", count_clusters(table.index, clusters))
    >>> set_means(table, "reduction", pd.qcut(table.mean_similarity, 10))
    """
    values = _complete(table, outcome)
    codes, names = pd.factorize(groups, sort=True)

    def statistic(kept: NDArray[np.bool_]) -> Floats:
        counts = np.bincount(codes[kept], minlength=len(names))
        sums = np.bincount(codes[kept], values[kept], minlength=len(names))
        return np.asarray(sums / np.where(counts > 0, counts, np.nan))

    mean, low, high = _leaving_out(table.index, statistic, level)
    columns = {"sets": np.bincount(codes), "mean": mean, "low": low, "high": high}
    return pd.DataFrame(columns, pd.Index(names, name=groups.name))


def count_clusters(sets: pd.MultiIndex, clusters: Labels) -> pd.Series:
    """Count the different clusters that the members of each set come from: 1 … size of the set.

    Examples
    --------
    >>> count_clusters(table.index, spectral_clusters(sat(study), 10))

    Raises
    ------
    ValueError
        If a member has no cluster.
    """
    groups = clusters.to_series() if isinstance(clusters, xr.DataArray) else pd.Series(clusters)
    codes = pd.factorize(groups)[0][_positions(sets, groups.index)]
    different = np.diff(np.sort(codes, axis=1)) > 0
    return pd.Series(1 + different.sum(axis=1), sets, name="clusters")


def split_halves(study: xr.Dataset, *, seed: int = 0) -> tuple[xr.Dataset, xr.Dataset]:
    """Split a study in two, at random and evenly by class: test images to choose on, and to judge on.

    An attacked image stays out of the half that doesn't have it as a test image, so that a score of one
    half, such as `sat`, knows nothing of the other.

    Examples
    --------
    >>> chosen_on, judged_on = split_halves(study)

    Raises
    ------
    ValueError
        If the study has no probabilities of test images.
    """
    _check_study(study)
    order = np.random.default_rng(seed).permutation(study.sizes["test_image"])
    labels = pd.Series(study.test_label.values[order])
    in_first = labels.groupby(labels).cumcount().to_numpy() % 2 == 0
    one, other = (np.sort(order[part]) for part in (in_first, ~in_first))

    def half(test_images: Integers, left_out: Integers) -> xr.Dataset:
        kept = ~np.isin(study.image.values, study.test_image.values[left_out])
        return study.isel(test_image=test_images, image=np.flatnonzero(kept))

    return half(one, other), half(other, one)


def choose_teammates(
    study: xr.Dataset,
    size: int,
    similarity: xr.DataArray,
    *,
    rule: Rule = "both",
    first: str | None = None,
    budget: float = math.inf,
    cost: Mapping[str, float] | None = None,
    vote: Vote = "soft",
    device: str | None = None,
) -> tuple[str, ...]:
    """Choose the members of an ensemble one after the other, the first included.

    Examples
    --------
    >>> chosen_on, judged_on = split_halves(study)
    >>> team = choose_teammates(chosen_on, 3, sat(chosen_on), first="resnet50")
    >>> ensembles(judged_on, [team], sat(judged_on)).accuracy

    Parameters
    ----------
    study, similarity, vote, device
        As for `ensembles`. Judge the choice on other images: see `split_halves`.
    size : int
        Members, 2 … number of models.
    rule : {"accuracy", "diversity", "both"}
        The next member is the one that is most accurate by itself; that is least similar, on average, to
        the members so far; or with which the ensemble is most accurate (ensemble selection). Ties go to
        the model that comes first in the study.
    first : str, optional
        The first member; by default the one that is most accurate by itself.
    budget : float
        What all members may cost together. A model is passed over if the rest wouldn't pay for the others.
    cost : mapping, optional
        Of every model, in the unit of the budget; such as `training_table().flops`.

    Raises
    ------
    ValueError
        As `ensembles`; or if the size is out of range, the budget is short, or a model has no cost.

    References
    ----------
    Caruana et al., *Ensemble selection from libraries of models*, ICML 2004; here without replacement.
    """
    _check_choice("rule", rule, Rule)
    _check_choice("vote", vote, Vote)
    _check_study(study)
    names = [str(name) for name in study.target.values]
    _check_size(size, len(names))
    if first is not None and first not in names:
        raise ValueError(unknown_name_message("model", first, names))
    prices = _prices(names, budget, cost)
    alike, ballot = _square(similarity, names), _ballot(study, vote, device)
    team = [] if first is None else [names.index(first)]
    while len(team) < size:
        candidates = _affordable(prices, team, size, budget)
        worth = _worth(rule, team, candidates, ballot, alike)
        team.append(candidates[int(worth.argmax())])
    return tuple(names[i] for i in team)


def _prices(names: list[str], budget: float, cost: Mapping[str, float] | None) -> Floats:
    if cost is None and budget < math.inf:
        raise ValueError("a budget needs costs: give the cost of every model too")
    prices = pd.Series(0.0, names) if cost is None else pd.Series(cost, dtype=float).reindex(names)
    for name in prices.index[prices.isna()]:
        raise ValueError(f"{name} has no cost")
    return prices.to_numpy()


def _affordable(prices: Floats, team: list[int], size: int, budget: float) -> list[int]:
    """List the models that leave enough for the cheapest others to complete the team."""
    free = [i for i in np.argsort(prices).tolist() if i not in team]
    more, spent = size - len(team) - 1, prices[team].sum()
    totals = {i: spent + prices[[i, *[j for j in free if j != i][:more]]].sum() for i in free}
    if budget < (least := min(totals.values())):
        raise ValueError(f"a budget of {budget:g} is too small: the cheapest such ensemble costs {least:g}")
    return sorted(i for i, total in totals.items() if total <= budget)


def _worth(
    rule: Rule, team: list[int], candidates: list[int], ballot: _Ballot, alike: Floats
) -> NDArray[Any]:
    """Rate every candidate by what the rule wants of the next member."""
    if not team or rule == "accuracy":
        return -ballot.wrong_alone[candidates]
    if rule == "diversity":
        return np.asarray(-alike[np.ix_(candidates, team)].mean(axis=1))
    return -_count_wrong(ballot.contests, np.array([[*team, candidate] for candidate in candidates]))
