"""The frame of every claim: arms that differ in one thing are trained alike, judged alike and reported alike.

Every arm gets its learning rate as the best of three, chosen with a seed and on pictures that the final figures never
see. Three seeds are then trained, each on its own frozen order of data that all arms share, so that arms are compared
seed by seed. Curves run against steps and against seconds of training, evaluation not counted.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from latentae.console import Progress
from latentae.training.optimization import Schedule, parameter_groups

SEARCH_SEED = 100  # of the search for learning rates; no reported run has it
STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # two-sided 95 % quantiles by degrees of freedom


@dataclass(frozen=True)
class Plan:
    """How much is trained, the same for every arm.

    Attributes:
        steps: of a reported run.
        search_steps: of each of the runs that choose a learning rate.
        learning_rates: the three to choose from; the chosen one is the peak of a warm-up and a cosine to zero.
        evaluations: points of a curve after the one at step 0.
        seeds: of the reported runs.
    """

    steps: int
    search_steps: int
    learning_rates: tuple[float, ...]
    evaluations: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """One way of doing it.

    Attributes:
        build: the module to train, from a seed; arms of one seed should start as equal as they can.
        loss: of a module at a step, on the data that all arms of a seed share: ``loss(module, seed, step)``.
        keep: what becomes of the module of a reported run, ``keep(module, seed)``; nothing by default.
    """

    name: str
    build: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, int, int], Tensor]
    keep: Callable[[nn.Module, int], None] = lambda module, seed: None


@dataclass
class Run:
    """One training run: what was measured at which step, after how many seconds of training."""

    seed: int
    learning_rate: float
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: list[dict[str, float]] = field(default_factory=list)
    diverged: bool = False

    def final(self, metric: str) -> float:
        """The last value; minus infinity for a run that diverged, so that it is never the best."""
        return -math.inf if self.diverged else self.values[-1][metric]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Evaluate = Callable[[nn.Module], dict[str, float]]  # higher is better for every value


def train(
    arm: Arm, seed: int, learning_rate: float, steps: int, evaluate: Evaluate, evaluations: int, reported: bool = False
) -> Run:
    """Train one arm once; a loss that is not finite ends the run as diverged."""
    torch.manual_seed(seed)
    module = arm.build(seed)
    optimizer = torch.optim.AdamW(parameter_groups(module), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = Schedule(warmup_steps=steps // 20, kind="cosine")
    run = Run(seed, learning_rate)
    points = {round(steps * i / evaluations) for i in range(evaluations + 1)}
    seconds = 0.0
    for step in range(steps + 1):
        if step in points:
            run.steps.append(step)
            run.seconds.append(seconds)
            module.eval()
            with torch.no_grad():
                run.values.append(evaluate(module))
            module.train()
        if step == steps:
            break
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule.factor(step, steps)
        loss = arm.loss(module, seed, step)
        loss.backward()
        clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        if not loss.isfinite():
            run.diverged = True
            break
    if reported and not run.diverged:
        arm.keep(module.eval(), seed)
    return run


def train_start(
    build: Callable[[int], nn.Module],
    loss: Callable[[nn.Module, int, int], Tensor],
    seed: int,
    learning_rate: float,
    steps: int,
) -> Any:
    """What arms begin with or keep frozen: one module, trained as an arm is, judged by nothing, in eval mode."""
    kept: list[nn.Module] = []
    arm = Arm("start", build, loss, keep=lambda module, seed: kept.append(module))
    train(arm, seed, learning_rate, steps, lambda module: {}, evaluations=1, reported=True)
    return kept[0]


@dataclass
class Outcome:
    """What came of one arm.

    Attributes:
        search: final tuning value at each learning rate, None where it diverged.
        runs: one per seed, at the best of them.
    """

    name: str
    parameters: int
    search: dict[float, float | None]
    runs: list[Run]

    @property
    def learning_rate(self) -> float:
        return self.runs[0].learning_rate

    def finals(self, metric: str) -> list[float]:
        return [run.final(metric) for run in self.runs]

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.finals(metric))

    def as_json(self, metrics: Sequence[str]) -> dict[str, Any]:
        finals = {metric: [v if math.isfinite(v) else None for v in self.finals(metric)] for metric in metrics}
        return {
            "parameters": self.parameters,
            "learning_rate": self.learning_rate,
            "learning_rate_is_at_edge": self.learning_rate in (min(self.search), max(self.search)),
            "search": {str(rate): value for rate, value in self.search.items()},
            "final": finals,
            "runs": [run.as_json() for run in self.runs],
        }


def run_arms(arms: Sequence[Arm], plan: Plan, tune: Evaluate, test: Evaluate, metric: str) -> list[Outcome]:
    """Choose every arm's learning rate by ``metric`` of ``tune``, then train all seeds and judge them by ``test``."""
    outcomes = []
    total = len(arms) * (len(plan.learning_rates) + len(plan.seeds))
    with Progress("arms", total, unit="runs") as progress:
        for arm in arms:
            search: dict[float, float | None] = {}
            for rate in plan.learning_rates:
                run = train(arm, SEARCH_SEED, rate, plan.search_steps, tune, evaluations=1)
                search[rate] = None if run.diverged else run.final(metric)
                progress.advance()
            best = best_rate(search)
            runs = []
            for seed in plan.seeds:
                runs.append(train(arm, seed, best, plan.steps, test, plan.evaluations, reported=True))
                progress.advance()
            parameters = sum(p.numel() for p in arm.build(0).parameters() if p.requires_grad)
            outcomes.append(Outcome(arm.name, parameters, search, runs))
    return outcomes


def best_rate(search: Mapping[float, float | None]) -> float:
    """The learning rate with the highest value; the smallest where all diverged."""
    finite = {rate: value for rate, value in search.items() if value is not None}
    return max(finite, key=finite.__getitem__) if finite else min(search)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and its 95 % interval (Student's t over seeds)."""

    mean: float
    low: float
    high: float


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference | None:
    """``a - b`` seed by seed; None with fewer than two seeds or a run that diverged."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2 or not all(math.isfinite(value) for value in differences):
        return None
    mean = statistics.fmean(differences)
    half = STUDENT_95[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Threshold:
    """A sentence that the numbers support or not; written before the run.

    Supported means: ``better`` beats ``worse`` in ``metric`` by ``least`` on average, and the interval is above zero;
    where ``least`` is negative, a loss that is allowed, the whole interval is above it.
    """

    sentence: str
    metric: str
    better: str
    worse: str
    least: float

    def judge(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        by_name = {outcome.name: outcome.finals(self.metric) for outcome in outcomes}
        difference = paired_difference(by_name[self.better], by_name[self.worse])
        shown = difference is not None and difference.mean >= self.least and difference.low > min(self.least, 0)
        found = "a run diverged"
        if difference:
            found = (
                f"{difference.mean:+.2f} dB [{difference.low:+.2f}, {difference.high:+.2f}], wanted {self.least:+.2f}"
            )
        as_json = asdict(difference) if difference else None
        return {**asdict(self), "difference": as_json, "found": found, "shown": shown}


def draw_curves(
    path: Path, title: str, outcomes: Sequence[Outcome], metric: str, label: str, references: Mapping[str, float]
) -> None:
    """A PNG: the mean over seeds and the range of them, against steps and against seconds; references are lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    plot_curves(axes, outcomes, metric, label, references)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_curves(
    axes: Any, outcomes: Sequence[Outcome], metric: str, label: str, references: Mapping[str, float]
) -> None:
    """The curves on two axes of a figure."""
    for number, outcome in enumerate(outcomes):
        runs = [run for run in outcome.runs if not run.diverged]
        if not runs:
            continue
        values = torch.tensor([[value[metric] for value in run.values] for run in runs])  # (seeds, points)
        seconds = torch.tensor([run.seconds for run in runs]).mean(0)
        for axis, x in zip(axes, [torch.tensor(runs[0].steps), seconds]):
            axis.plot(x, values.mean(0), color=f"C{number}", label=f"{outcome.name} (rate {outcome.learning_rate:g})")
            axis.fill_between(x, values.amin(0), values.amax(0), color=f"C{number}", alpha=0.2)
    for number, (name, value) in enumerate(references.items()):
        for axis in axes:
            axis.axhline(value, color="0.4", linewidth=1, linestyle=["-", "--", ":", "-."][number % 4], label=name)
    for axis, x_label in zip(axes, ["steps", "seconds of training"]):
        axis.set_xlabel(x_label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    axes[1].legend(fontsize=8, loc="lower right")
