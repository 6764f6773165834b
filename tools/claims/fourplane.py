"""Latents that grow with a clip's faces and not with its volume: what they keep, and what they save.

First half: five autoencoders with equally many floats of latents in a clip, of one encoder trunk and one decoder, each
decoder given the time coordinate, trained alike on pans, zooms and rotations of photos and on moving dead leaves:

- four planes, halves: the first spatial plane is the mean of the first half of the time, the second of the second;
- four planes, hat: means with weights that fall linearly from the beginning, and from the end;
- tri-plane, doubled: both spatial planes are the mean of all the time. Two heads on one mean are one plane of twice the
  channels, since the decoder adds what convolutions make of both: only the pooling differs from the two above;
- tri-plane, uniform: one spatial plane, and as many channels in all planes;
- volume: no planes, and few channels.

On a CPU the nets see blocks of 8 x 8 pixels as channels and have no levels below: as many multiplications as narrow
nets with three levels need, and they come much farther in them. On a GPU they have the levels.

They are judged on held-out clips of both kinds, and with ``--clips FOLDER`` on real ones, by PSNR and SSIM of frames
and by the PSNR of differences of successive frames. References: block means and the best linear codes of equally many
floats, and the untrained model. Mean squared error alone, no regulariser, and the latents are not quantised.

Second half: what a diffusion transformer costs on planes and on a volume, see `plane_costs`.

Found on the cpu tier (`tools/results/fourplane.json`): the costs, not the quality. In 1500 steps of 2 clips no arm
comes to the best linear code of its floats, so that which planes are better cannot be said: the arms with planes end
within 0.4 dB of each other and 1.0 to 1.5 dB below the volume. Among linear codes, which are trained to the end, four
planes are 0.8 dB above the doubled tri-plane on made clips, 0.4 below it on real ones, and above the volume on both.

Every run is a cell that is kept in ``fourplane-cells`` beside the figure and not run again, unless the settings or the
clips change. The same command in another process takes other cells, and all end with the same report.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from claims import plane_costs
from claims.clips import batch_at, block_mean, figures, linear_code, pool, real_clips, test_clips, tune_clips
from claims.frame import (
    SEARCH_SEED,
    Arm,
    Evaluate,
    Outcome,
    Plan,
    Run,
    Threshold,
    best_rate,
    plot_curves,
    train,
)
from claims.probe import locked
from latentae.console import format_table, say
from latentae.errors import RequestError
from latentae.families.fourplane import FourPlane
from latentae.files import write_json
from latentae.nn.pixels import to_float

CELLS = "fourplane-cells"
HALVES, HAT = "four planes, halves", "four planes, hat"
DOUBLED, UNIFORM, VOLUME = "tri-plane, doubled", "tri-plane, uniform", "volume"
SYNTHETIC, REAL = "psnr", "psnr_real"

# Latents of a clip are 8 x 8 x 8: 256 positions of four planes, 192 of a tri-plane and 512 of a volume. So 6, 8 and 3
# channels are all 1,536 floats, and so are the average colours of blocks of 1 x 8 x 8 or of 4 x 4 x 4 pixels.
FRAMES, SIZE, FACTOR = 8, 64, 8
ARMS: dict[str, dict[str, Any]] = {
    HALVES: dict(spatial_planes=2, time_weights="halves", plane_channels=6),
    HAT: dict(spatial_planes=2, time_weights="hat", plane_channels=6),
    DOUBLED: dict(spatial_planes=2, time_weights="uniform", plane_channels=6),
    UNIFORM: dict(spatial_planes=1, time_weights="uniform", plane_channels=8),
    VOLUME: dict(spatial_planes=0, plane_channels=3),
}

# Written before the first run; each is judged on synthetic clips, and on real ones where there are any.
WANTED = [
    ("four planes (hat) beat the tri-plane of doubled channels", HAT, DOUBLED, 0.3),
    ("four planes (halves) beat the tri-plane of doubled channels", HALVES, DOUBLED, 0.3),
    ("four planes (hat) beat the uniform tri-plane", HAT, UNIFORM, 0.3),
    ("hat beats halves", HAT, HALVES, 0.1),
    ("four planes (hat) lose less than 0.5 dB to the volume", HAT, VOLUME, -0.5),
]


@dataclass(frozen=True)
class Tier:
    """How much is trained, and where.

    Attributes:
        patch: side of the blocks that the nets see as channels; ``widths``, ``groups`` and ``layers`` are of the nets.
        pool: clips that the runs draw from; ``test`` of each synthetic kind, ``real`` of the real ones.
    """

    device: str
    patch: int
    widths: tuple[int, ...]
    groups: int
    layers: int
    batch: int
    steps: int
    search_steps: int
    pool: int
    test: int
    real: int
    evaluations: int = 6
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)


TIERS = {
    "cpu": Tier("cpu", 8, (64,), 4, 1, batch=2, steps=1500, search_steps=600, pool=2400, test=12, real=24),
    "gpu": Tier(
        "cuda", 1, (32, 64, 128, 256), 8, 2, batch=16, steps=20000, search_steps=2000, pool=9600, test=48, real=96
    ),
}
QUICK = Tier("cpu", 8, (8,), 4, 1, batch=1, steps=2, search_steps=1, pool=6, test=1, real=1, evaluations=1)


class OnBlocks(nn.Module):
    """A clip's reconstruction (B, 3, T, H, W) by a net that sees blocks of ``patch`` x ``patch`` pixels as channels."""

    def __init__(self, net: FourPlane, patch: int):
        super().__init__()
        self.net, self.patch = net, patch

    def blocks(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(pixels.transpose(1, 2), self.patch).transpose(1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        made = self.net(self.blocks(pixels)).sample
        return F.pixel_shuffle(made.transpose(1, 2), self.patch).transpose(1, 2)


def build(name: str, tier: Tier, seed: int) -> OnBlocks:
    """An arm with weights of a seed; all of a seed have the same trunks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reference = _net(ARMS[HALVES], tier)
        torch.manual_seed(seed)
        model = _net(ARMS[name], tier)
    own = model.state_dict()
    own |= {key: x for key, x in reference.state_dict().items() if key in own and x.shape == own[key].shape}
    model.load_state_dict(own)
    return nn.Module.to(OnBlocks(model, tier.patch), tier.device).train()


def _net(arm: dict[str, Any], tier: Tier) -> FourPlane:
    return FourPlane(
        in_channels=3 * tier.patch**2,
        temporal_compression=1,
        block_out_channels=tier.widths,
        layers_per_block=tier.layers,
        norm_num_groups=tier.groups,
        mid_block_add_attention=False,
        window_frames=FRAMES,
        window_overlap=0,
        **arm,
    )


def floats_of(model: OnBlocks) -> int:
    """Floats of the latents of a clip."""
    return model.net.encode(model.blocks(torch.zeros(1, 3, FRAMES, SIZE, SIZE))).latent_dist.mean.numel()


def evaluator(clips: dict[str, Tensor], device: str) -> Evaluate:
    def evaluate(module: Any) -> dict[str, float]:
        made = {
            kind: torch.cat([module(to_float(few).to(device)).cpu() for few in x.split(4)]) for kind, x in clips.items()
        }
        return figures(made, clips)

    return evaluate


def run(tier: str, quick: bool, steps: int | None, figure: Path | None, clips: Path | None = None) -> dict[str, Any]:
    """Run all cells that are not there; prints the tables and draws the figure. See `claims.py` for the arguments.

    Args:
        clips: folder of real clips.
    """
    if tier == "gpu" and not torch.cuda.is_available():
        raise RequestError("The tier gpu of the claim fourplane needs a CUDA device: leave --tier out.")
    if figure is None:
        raise RequestError("The claim fourplane keeps its cells beside its figure: give --json or --figure.")
    how = QUICK if quick else TIERS[tier]
    cost_tier = plane_costs.QUICK if quick else plane_costs.TIERS[tier]
    plan = Plan(steps or how.steps, min(how.search_steps, steps or how.steps), how.learning_rates, how.evaluations)
    test = dict(test_clips(how.test, FRAMES, SIZE))
    if clips is not None:
        test["real"] = real_clips(clips, how.real, FRAMES, SIZE)
    setting = describe(how, plan, test)
    cells = Cells(figure.parent / CELLS, tier)
    outcomes = quality(cells, how, plan, test, setting)
    costs = cells.gather({"costs": lambda: plane_costs.measure(cost_tier)}, asdict(cost_tier))["costs"]
    references = reference_codes(how, test, outcomes)

    metrics = {SYNTHETIC: "synthetic clips"} | ({REAL: "real clips"} if clips else {})
    thresholds = [
        Threshold(f"{sentence}, {where}", metric, better, worse, least)
        for metric, where in metrics.items()
        for sentence, better, worse, least in WANTED
    ]
    verdicts = [threshold.judge(outcomes) for threshold in thresholds] + plane_costs.thresholds(costs)
    best_linear = max(v[SYNTHETIC] for name, v in references.items() if "linear" in name)
    below = [outcome.name for outcome in outcomes if outcome.mean(SYNTHETIC) < best_linear]
    print_quality(outcomes, references, bool(clips))
    if below:
        print(f"below the best linear code, so not trained to the end: {', '.join(below)}")
    print()
    plane_costs.print_table(costs)
    draw(figure, outcomes, references, costs, list(metrics)[-1])
    return {
        "claim": "Planes hold a clip as well as a volume does, with fewer tokens (four-plane, arXiv 2412.04452).",
        "setting": setting,
        "references": references,
        "arms": {o.name: o.as_json(list(references["untrained"])) for o in outcomes},
        "below_the_best_linear_code": below,
        "costs": {"tier": asdict(cost_tier), "rows": costs},
        "thresholds": verdicts,
        "shown": all(verdict["shown"] for verdict in verdicts),
    }


def describe(tier: Tier, plan: Plan, test: dict[str, Tensor]) -> dict[str, Any]:
    """Everything that the figures of a trained arm depend on, as JSON has it."""
    digest = {kind: hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] for kind, x in test.items()}
    setting = {
        **asdict(tier),
        **asdict(plan),
        "clips": [FRAMES, SIZE],
        "arms": {name: {**arm, "floats": floats_of(build(name, QUICK, 0))} for name, arm in ARMS.items()},
        "test_clips": {kind: [len(x), digest[kind]] for kind, x in test.items()},
        "loss": "mean squared error of pixels",
    }
    return json.loads(json.dumps(setting))


class Cells:
    """What has been measured, each in a file of its own, which processes share.

    Args:
        folder: of the files.
        tier: those of one tier leave those of the other.
    """

    def __init__(self, folder: Path, tier: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.prefix = folder, "gpu-" if tier == "gpu" else ""

    def gather(self, work: Mapping[str, Callable[[], Any]], identity: Any) -> dict[str, Any]:
        """What each cell holds: first what nobody else is at, then what others have not finished."""
        found: dict[str, Any] = {}
        identity = json.loads(json.dumps(identity))
        for waits in (False, True):
            for name, make in work.items():
                if name not in found:
                    with locked(self.folder / f"{self.prefix}{name}.lock", waits) as mine:
                        if mine:
                            found[name] = self._kept(name, make, identity)
        return {name: found[name] for name in work}

    def _kept(self, name: str, make: Callable[[], Any], identity: Any) -> Any:
        file = self.folder / f"{self.prefix}{name}.json"
        if file.exists():
            held = json.loads(file.read_text())
            if held["identity"] == identity:
                return held["found"]
        say(f"{name}: begun at {time.strftime('%H:%M:%S')}")
        found = json.loads(json.dumps(make()))
        write_json(file, {"identity": identity, "found": found})
        return found


def quality(cells: Cells, tier: Tier, plan: Plan, test: dict[str, Tensor], setting: dict[str, Any]) -> list[Outcome]:
    """All arms: the search for their learning rates, then the runs of all seeds."""
    tune = evaluator(tune_clips(tier.test, FRAMES, SIZE), tier.device)
    judge = evaluator(test, tier.device)

    def loss(module: Any, seed: int, step: int) -> Tensor:
        pixels = to_float(batch_at(pool(tier.pool, FRAMES, SIZE), seed, step, tier.batch)).to(tier.device)
        return F.mse_loss(module(pixels), pixels)

    def search_cell(arm: Arm, rate: float) -> dict[str, Any]:
        pool(tier.pool, FRAMES, SIZE)  # so that no arm's clock pays for it
        return train(arm, SEARCH_SEED, rate, plan.search_steps, tune, evaluations=1).as_json()

    def run_cell(arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        pool(tier.pool, FRAMES, SIZE)
        return train(arm, seed, rate, plan.steps, judge, plan.evaluations).as_json()

    arms = [Arm(name, lambda seed, name=name: build(name, tier, seed), loss) for name in ARMS]  # type: ignore[misc]
    rates = plan.learning_rates
    identity = {key: value for key, value in setting.items() if key != "learning_rates"}  # they are in the names
    work = {
        f"{slug(arm.name)}-search-{rate:g}": (lambda arm=arm, rate=rate: search_cell(arm, rate))  # type: ignore[misc]
        for arm in arms
        for rate in rates
    }
    of_search = {key: value for key, value in identity.items() if key != "steps"}
    searched = {name: Run(**run) for name, run in cells.gather(work, of_search).items()}
    searches = {}
    for arm in arms:
        runs = {rate: searched[f"{slug(arm.name)}-search-{rate:g}"] for rate in rates}
        searches[arm.name] = {rate: None if x.diverged else x.final(SYNTHETIC) for rate, x in runs.items()}
    best = {name: best_rate(search) for name, search in searches.items()}
    work = {
        f"{slug(arm.name)}-{seed}-{best[arm.name]:g}": (lambda arm=arm, seed=seed: run_cell(arm, best[arm.name], seed))  # type: ignore[misc]
        for seed in plan.seeds
        for arm in arms
    }
    found = cells.gather(work, identity)
    outcomes = []
    for arm in arms:
        runs_of = [Run(**found[f"{slug(arm.name)}-{seed}-{best[arm.name]:g}"]) for seed in plan.seeds]
        parameters = sum(p.numel() for p in arm.build(0).parameters())
        outcomes.append(Outcome(arm.name, parameters, searches[arm.name], runs_of))
    return outcomes


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def reference_codes(tier: Tier, test: dict[str, Tensor], outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """Figures of what is not trained, of as many floats as the arms have."""
    training = pool(tier.pool, FRAMES, SIZE)[:200]
    codes: dict[str, tuple[tuple[str, int] | None, int, int]] = {
        HALVES: (("halves", 2), 6, 0),
        HAT: (("hat", 2), 6, 0),
        DOUBLED: (("uniform", 1), 6, 6),  # what the second plane adds to a sum is further components
        UNIFORM: (("uniform", 1), 8, 0),
        VOLUME: (None, 3, 0),
    }
    found = {
        f"linear, {name}": linear_code(training, test, FACTOR, channels, spread, extra)
        for name, (spread, channels, extra) in codes.items()
    }
    found["block mean 1 x 8 x 8"] = block_mean(test, 1, 8)
    found["block mean 4 x 4 x 4"] = block_mean(test, 4, 4)
    return {**found, "untrained": outcomes[0].runs[0].values[0]}


def print_quality(outcomes: list[Outcome], references: dict[str, dict[str, float]], real: bool) -> None:
    kinds = ("photos", "leaves", *(("real",) if real else ()))
    columns = [f"{metric}_{kind}" for metric in ("psnr", "ssim", "difference") for kind in kinds]
    rows: list[list[Any]] = [[name, None, *(v[c] for c in columns), None] for name, v in references.items()]
    for outcome in outcomes:
        seconds = sum(run.seconds[-1] for run in outcome.runs) / len(outcome.runs)
        rows.append([outcome.name, outcome.learning_rate, *(outcome.mean(c) for c in columns), seconds])
    names = [f"{metric} {kind}" for metric in ("PSNR", "SSIM", "diff. PSNR") for kind in kinds]
    print(format_table(["held-out clips, equal floats", "rate", *names, "seconds"], rows))


def draw(
    path: Path,
    outcomes: list[Outcome],
    references: dict[str, dict[str, float]],
    costs: list[dict[str, Any]],
    metric: str,
) -> None:
    """A PNG: the curves of the arms, and by clip how much less the transformer needs on planes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(17, 5), layout="constrained")
    names = [f"linear, {name}" for name in (HAT, UNIFORM, VOLUME)] + ["block mean 4 x 4 x 4"]
    where = "real clips" if metric == REAL else "synthetic clips"
    lines = {name: references[name][metric] for name in names}
    plot_curves(axes[:2], outcomes, metric, f"PSNR in dB, {where}", lines)
    axes[1].sharey(axes[0])
    said = {"tokens": "tokens", "giga_macs": "arithmetic", "seconds": "seconds", "peak_bytes": "memory"}
    for number, (name, label) in enumerate(said.items()):
        x = [i + 0.2 * (number - 1.5) for i in range(len(costs))]
        axes[2].bar(x, [row["ratios"].get(name, 0) for row in costs], 0.18, label=label)
    axes[2].axhline(1, color="0.4", linewidth=1)
    axes[2].set_yscale("log")
    axes[2].set_ylabel("volume over four planes")
    axes[2].set_xticks(range(len(costs)), [row["name"].replace(", ", "\n") for row in costs], fontsize=8)
    axes[2].legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
