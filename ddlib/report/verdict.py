"""One verdict for README, notebooks, pages and claims: how a figure of ours stands to a printed one.

Pure functions of plain data; nothing is read and nothing is trained. The rules are older than the runs of the profile
`paper` that they judge (those of `small` are older than the rules), and the first that applies decides:

1. *changed method*: a setting that is neither neutral nor budget differs, or the network. Named, never counted.
2. *inconclusive*: our standard error is over one point, or unknown because there is one network alone.
3. *matched on less*: less budget than the paper's, and ours is no worse than the paper's within the tolerance. A
   baseline has no merit in being better: a coreset above the tolerance is *inconclusive*.
4. *reduced budget*: less budget than the paper's, and ours is below that.
5. *contradicted*: the paper's setting, and the difference is over 0.5 points and over two standard errors of it.
6. *inconclusive*: within that, but over a quarter of the paper's lead over random images, or no such lead is known.
7. *reproduced*.

The tolerance is the larger of 0.5 points and two standard errors of the difference, and for a distilled set no more
than a quarter of the paper's lead over random images under the same protocol: a set at the level of random images
must not pass for a good one where all figures are near one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from ..data.dataset import derived, subset_name

# The verdicts, from the best to the least that can be said, and their colours (Okabe and Ito, Tol).
VERDICTS = {
    "reproduced": "#117733",
    "matched on less": "#44AA99",
    "reduced budget": "#56B4E9",
    "changed method": "#E69F00",
    "inconclusive": "#DDCC77",
    "contradicted": "#D55E00",
    "not attempted": "#BBBBBB",
}
COUNTED = ("reproduced", "matched on less")  # what stands for the paper
UNPUBLISHED = "no published figure"  # what a table says of a row that nothing can be held against
SENSES = ("at most", "at least", "about")

# Settings that leave the result alone, or that only look at it.
NEUTRAL = (
    "compile",
    "chunk",
    "micro",
    "keep",
    "engine",
    "threads",
    "evaluations",
    "snapshots",
    "eval_precision",
    "precision",  # of DM's networks: three pairs of runs, docs/results.md
    "extractor_precision",  # no paper says how its extractor was trained
)
# Settings of which a shortened run has less. `subset` is the training images per class, 0 all of them.
BUDGET = ("iterations", "eval_epochs", "networks", "experts", "expert_total", "subset")

# Folders that are known to hold a published dataset: checksum -> its name, and what a verdict says of the copy.
COPIES = {
    "4e83476eaa8ece643f548c9f6632f844134392e9c843d9050291f62bd9ade102": (
        "cifar10",
        "on the JPEG copy",
    ),
    "e093b07c5fa2da20f57b28ae0b6f39007f9f33cc6b23ed2237417973d664d936": ("mnist", ""),
}
UNKNOWN_CODE = "code unknown"  # the mark of a record without a commit

NEAR = 0.5  # points that are always near enough
NOISY = 1.0  # points of standard error above which nothing is concluded
SHARE_OF_LEAD = 0.25
ABOUT = 0.10  # relative tolerance of a factor that is printed as "about"
DEFAULT_COUNT = 5  # networks behind a printed spread where the paper does not say


@dataclass(frozen=True)
class Verdict:
    """A key of `VERDICTS` (or `UNPUBLISHED`), the reason, and marks such as "on the JPEG copy"."""

    word: str
    why: str = ""
    marks: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        return ", ".join((self.word, *self.marks))

    def __str__(self) -> str:
        return f"{self.short}: {self.why}" if self.why else self.short


@dataclass(frozen=True)
class Published:
    """A printed accuracy in per cent. `spread` is the printed standard deviation (population, ddof 0), NaN for none,
    and `count` the independent results that it is taken over: five sets in DM's family, else a set's networks."""

    value: float
    spread: float = math.nan
    count: int = DEFAULT_COUNT

    @property
    def error(self) -> float:
        """Standard error of the printed mean; 0 where no spread is printed, which is the stricter reading."""
        return 0.0 if math.isnan(self.spread) else self.spread / math.sqrt(self.count - 1)


@dataclass(frozen=True)
class Differences:
    """The settings in which a run is not the paper's, as key -> (ours, the paper's)."""

    less: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of the paper's budget that the run has, all budget settings but `subset` multiplied."""
        return math.prod(
            ours / paper for key, (ours, paper) in self.less.items() if key != "subset"
        )

    def __str__(self) -> str:
        changed = [f"{key} {_short(a)} for {_short(b)}" for key, (a, b) in self.changed.items()]
        if len(changed) > 3:
            changed = [f"{len(changed)} settings ({', '.join(self.changed)})"]
        less = [_reduced(key, *pair) for key, pair in self.less.items()]
        return ", ".join(changed + less)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def _reduced(key: str, ours: float, paper: float) -> str:
    if key == "subset":
        return f"{ours} training images per class"
    factor = f" ({paper / ours:.0f}x less)" if ours and paper >= 2 * ours else ""
    return f"{key} {ours:g} of {paper:g}{factor}"


def differences(ours: Mapping[str, Any], paper: Mapping[str, Any]) -> Differences:
    """How the settings of a run differ from the paper's; more budget than the paper's is a change too.

    More evaluation networks than the paper's are only more certain, and epochs of experts that no segment reaches are
    never read: both count as none.
    """
    less, changed = {}, {}
    for key, theirs in paper.items():
        mine = ours[key]
        if mine == theirs or key in NEUTRAL:
            continue
        if key == "expert_total" and mine >= _last_epoch(paper):
            continue
        if key in BUDGET and _amount(key, mine) < _amount(key, theirs):
            less[key] = (mine, theirs)
        elif key != "networks":
            changed[key] = (mine, theirs)
    return Differences(less, changed)


def _last_epoch(paper: Mapping[str, Any]) -> int:
    """The last epoch of an expert that the paper's run reads: DATM's first labels are the answers after all of them."""
    if paper["labels"] == "learned":
        return paper["expert_total"]
    return max(paper["max_start"] - 1 + paper["expert_epochs"], paper["init_epoch"])


def _amount(key: str, value: float) -> float:
    return math.inf if key == "subset" and value == 0 else value


def data_of(dataset: str, checksum: str | None = None, subset: int = 0) -> tuple[str, str]:
    """(the published dataset that a run saw, a mark such as "on the JPEG copy"); ("", "") for an unknown folder.

    A name of ddlib's own is what it says. A folder is known by the checksum of its images alone, also where the run
    took `subset` training images per class of it, never by the folder's name.
    """
    if not dataset.startswith("folder:"):
        return dataset, ""
    for whole, known in COPIES.items():
        if checksum in (whole, derived(whole, subset_name(subset))):
            return known
    return "", ""


def standard_error(scores: Sequence[Sequence[float]]) -> float:
    """Of the mean of accuracies by distillation seed and network: the sample standard deviation (ddof 1) over the
    seeds' means by the root of their number where there are several seeds, else over the networks of the one.

    NaN for one network alone, whose error nothing tells.
    """
    values = [fmean(networks) for networks in scores] if len(scores) > 1 else list(scores[0])
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def accuracy(
    scores: Sequence[Sequence[float]],
    figure: Published,
    differs: Differences,
    lead: float = math.inf,
    marks: tuple[str, ...] = (),
) -> Verdict:
    """The verdict on accuracies (per cent, by seed and network) beside a printed one; the rules of the module.

    lead: the paper's figure less that of random images under its protocol; infinite for a coreset, which is no
        distilled set, and NaN where no figure of random images is known.
    """
    if differs.changed:
        return Verdict("changed method", str(differs), marks)
    error = standard_error(scores)
    if math.isnan(error):
        return Verdict("inconclusive", _also("one network alone", differs), marks)
    if error > NOISY:
        why = f"our standard error is {error:.1f} points"
        return Verdict("inconclusive", _also(why, differs), marks)
    gap = fmean(fmean(networks) for networks in scores) - figure.value
    near = max(NEAR, 2 * math.hypot(error, figure.error))
    close = 0.0 if math.isnan(lead) else SHARE_OF_LEAD * max(lead, 0.0)
    if differs.less and math.isinf(lead) and gap > near:
        why = f"a baseline {gap:+.1f} points above the print"
        return Verdict("inconclusive", _also(why, differs), marks)
    if differs.less:
        word = "matched on less" if gap >= -min(near, close) else "reduced budget"
        return Verdict(word, str(differs), marks)
    distance = f"{gap:+.1f} points, {near:.1f} are near"
    if abs(gap) > near:
        return Verdict("contradicted", distance, marks)
    if math.isnan(lead) or abs(gap) > close:
        return Verdict("inconclusive", _beside_random(lead), marks)
    return Verdict("reproduced", distance, marks)


def _also(why: str, differs: Differences) -> str:
    return ", ".join(filter(None, (why, str(differs))))


def _beside_random(lead: float) -> str:
    if math.isnan(lead):
        return "no random images under this protocol to stand beside it"
    return f"the paper leads random images by {lead:.1f} points alone"


def factor(
    ours: float,
    printed: str,
    sense: str = "about",
    elsewhere: str = "",
    marks: tuple[str, ...] = (),
) -> Verdict:
    """The verdict on a factor, a gap, a correlation or an AUC beside a printed one, both rounded as the print is.

    sense: what the print means (`SENSES`); "about" allows a tenth. elsewhere: in what ours was taken at another
    setting than the print's, where it stands beside it and judges nothing.
    """
    if elsewhere:
        return Verdict("not attempted", f"ours is at another setting, {elsewhere}", marks)
    digits = len(printed.partition(".")[2])
    mine, theirs = round(ours, digits), float(printed)
    if sense == "at most":
        holds = mine <= theirs
    elif sense == "at least":
        holds = mine >= theirs
    else:
        holds = mine == theirs or abs(ours - theirs) <= ABOUT * abs(theirs)
    if holds:
        return Verdict("reproduced", "", marks)
    return Verdict("contradicted", f"printed as {sense} {printed}", marks)
