"""Local intrinsic dimension: how few numbers of one submodule, the rest frozen, do nearly what all of them do.

    W_m <- W_m + reshape(P theta_d);    the smallest d whose score is share x the score of full tuning of W_m alone

with P a random projection with orthonormal columns (methods/intrinsic_dimension.py). Submodules with a low one are
easier to adapt, and are where an update goes.

The task head trains each time. d = D is full tuning of the submodule's weights: P is then square, and Adam's step on
theta is that on the weights. The learning rate of theta is that of a weight times sqrt(D / d), so that a step of Adam
moves each weight as far at every d.

Source: Li et al., 2018, "Measuring the Intrinsic Dimension of Objective Landscapes", arXiv 1804.08838; of single
submodules: He et al., 2023, "Parameter-Efficient Model Adaptation for Vision Transformers", arXiv 2203.16329.
"""
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from slimtune.core import Anatomy, attach, dissect
from slimtune.core.sites import LINEAR
from slimtune.data.examples import Collate
from slimtune.data.metrics import METRICS, Score
from slimtune.errors import SiteError, SlimtuneError, listing
from slimtune.methods import from_config
from slimtune.search.bracket import smallest, tries
from slimtune.train import evaluate, fit
from slimtune.train.predict import Step
from slimtune.train.spec import TrainSpec

ROLES = ("attn.q", "attn.v", "mlp.up", "mlp.down")
LONGEST = 100
"""Characters of a part's name: trainings' folders are named by it."""
Of = Literal["score", "gain"]
Against = Literal["part", "run"]


@dataclass(frozen=True)
class Part:
    """A submodule that is measured: the weights at these sites, D = `numbers` of them."""

    name: str
    sites: tuple[str, ...]
    numbers: int


@dataclass(frozen=True)
class Search:
    """How the dimension of each part is looked for.

    share: of the score of full tuning; of="gain": of what full tuning has above the head alone; against: full tuning
    of the part itself, or of all parts of the run together. start, most: the smallest and the largest d of the
    doubling; bisections: steps of bisection behind it.
    """

    share: float = 0.9
    of: Of = "score"
    against: Against = "part"
    start: int = 16
    most: int = 4096
    bisections: int = 2

    def check(self, higher: bool) -> None:
        """Errors: SlimtuneError for a share of a score of which less is better."""
        if self.of == "score" and not higher:
            raise SlimtuneError("a share of the score means nothing for a metric of which less is better.",
                                "Take a share of the gain over the head alone: --of gain")

    def tries(self, part: Part) -> int:
        """Trainings of a part at most, its full tuning among them.

        Example:
            >>> Search(start=8, most=64).tries(Part("attn.q", ("attn.q",), 1024))
            7
        """
        return (self.against == "part") + tries(self.start, min(self.most, part.numbers), self.bisections)


@dataclass(frozen=True)
class Measured:
    """A part's dimension; None where no d up to the search's largest reaches the target.

    full: the score of full tuning; scores: of each d that was trained.
    """

    part: Part
    full: float
    target: float
    dimension: int | None
    scores: dict[int, float] = field(repr=False)


def parts(anatomy: Anatomy, sites: Sequence[str], per_block: bool = False) -> list[Part]:
    """The parts that these patterns name: one a pattern, or one a site.

    Errors: SiteError for a pattern that matches nothing, or sites that are no linear maps.
    """
    found = []
    for pattern in sites:
        places = anatomy.select((pattern,), who="this search")
        other = sorted({s.role for s in places if s.role not in LINEAR})
        if other:
            raise SiteError(f"'{pattern}' is no weight of a linear map: {listing(other)}.",
                            f"Choose among: {listing(r for r in anatomy.roles if r in LINEAR)}")
        groups = {s.name: [s] for s in places} if per_block else {pattern: places}
        found += [Part(name, (name,), sum(s.d_in * s.d_out for s in group)) for name, group in groups.items()]
    return list({part.name: part for part in found}.values())


def measure(part: Part, score: Callable[[Part, int], float], head: float, search: Search, higher: bool,
            whole: float | None = None) -> Measured:
    """A part's local intrinsic dimension.

    score: of a training with d numbers of the part; head: the score of the head alone, which stands for d = 0;
    higher: whether more is better; whole: the score of full tuning of the run, for against="run".
    Errors: SlimtuneError for a share of a score of which less is better.
    Example:
        >>> measure(Part("toy", (), 500), lambda part, d: min(d / 40, 1.0), 0.0, Search(bisections=9), True).dimension
        36
    """
    search.check(higher)
    scores = {0: head}
    full = whole if whole is not None else scores.setdefault(part.numbers, score(part, part.numbers))
    floor = 0.0 if search.of == "score" else head
    target = floor + search.share * (full - floor)

    def passes(d: int) -> bool:
        if d not in scores:
            scores[d] = score(part, d)
        return scores[d] >= target if higher else scores[d] <= target

    dimension = 0 if passes(0) else smallest(passes, search.start, min(search.most, part.numbers), search.bisections)
    return Measured(part, full, target, dimension, scores)


def together(anatomy: Anatomy, parts: Sequence[Part]) -> Part:
    """All parts as one, for full tuning of the run; a site that several have counts once.

    Its name is made of theirs: what is trained is another thing for other parts.
    """
    name = "+".join(part.name for part in parts)
    if len(name) > LONGEST:
        name = f"{len(parts)}-parts-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    sites = tuple(name for part in parts for name in part.sites)
    return Part(name, sites, sum(s.d_in * s.d_out for s in anatomy.select(sites)))


def ranked(found: Sequence[Measured]) -> list[Measured]:
    """The lowest dimension first, those that were not reached last."""
    return sorted(found, key=lambda m: (m.dimension is None, m.dimension or 0))


def lowest(found: Sequence[Measured]) -> list[Part]:
    """The parts to adapt: those within a power of two of the lowest dimension; none where the head alone will do.

    Example:
        >>> sizes = {"attn.q": 40, "attn.v": 64, "mlp.up": 300}
        >>> [p.name for p in lowest([Measured(Part(n, (n,), 1), 1.0, 0.9, d, {}) for n, d in sizes.items()])]
        ['attn.q', 'attn.v']
    """
    reached = [m for m in found if m.dimension]
    least = min((m.dimension or 0 for m in reached), default=0)
    return [m.part for m in ranked(reached) if (m.dimension or 0) <= 2 * least]


@dataclass(frozen=True)
class Trials:
    """The trainings of a search on one model, which each of them leaves as it was.

    spec: how each is trained; its learning rate is a weight's. Its score is that of the validation data after the
    last step. folder: of their checkpoints; seed: of the head's start and of the projections.
    """

    model: nn.Module
    train: Any
    validation: Any
    collate: Collate
    score: Score
    step: Step
    metric: str
    spec: TrainSpec
    folder: Path
    seed: int = 0

    @property
    def higher(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric != "loss" and METRICS[self.metric].higher

    def head(self) -> float:
        """The score of the head alone; of the model as it is, where it has no head."""
        if dissect(self.model).heads:
            return self._fit({"name": "linear_probe"}, self.spec, "head")
        return evaluate(self.model, self.validation, self.collate, self.score, self.spec.eval_batch_size,
                        step=self.step, precision=self.spec.precision)[self.metric]

    def part(self, part: Part, d: int) -> float:
        """The score with d numbers of a part, and the head."""
        rate = self.spec.learning_rate * (part.numbers / d) ** 0.5
        spec = self.spec.model_copy(update={
            "learning_rate": rate, "head_learning_rate": self.spec.head_learning_rate or self.spec.learning_rate})
        method = {"name": "intrinsic_dimension", "dimension": d, "sites": part.sites, "seed": self.seed}
        return self._fit(method, spec, name_of(part, d))

    def _fit(self, method: dict[str, Any], spec: TrainSpec, name: str) -> float:
        delta = attach(self.model, from_config(method), "intrinsic", seed=self.seed)
        try:
            result = fit(delta, self.train, self.validation, self.collate, self.score, spec, self.folder / name,
                         step=self.step)
        finally:
            delta.detach()
        return result.metrics[self.metric]


def name_of(part: Part, d: int) -> str:
    """A training's name in files."""
    return f"{part.name.replace('*', 'all').replace('?', 'any')}-{d}"
