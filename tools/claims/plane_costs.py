"""What planes save a diffusion transformer: tokens, arithmetic, time and memory over clips of six shapes.

One transformer, planes-s, on the tokens of four planes and on those of the volume of latents, with as many channels:
the same blocks, of which the volume's have the positions of its tokens. Arithmetic is that of the whole transformer,
counted on tensors without values. Times and memory are of a training step with one clip (flow matching on random
latents, forward, backward and AdamW) where it is small enough for the machine; on a CPU with one of the twelve blocks,
all of which are alike. Runs alternate; a ratio is the median of pairwise ratios.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from compare_speed import alternate, pairwise
from torch.utils.flop_counter import FlopCounterMode

from claims.dcae_speed import flow_step, peak_memory
from latentae.console import format_table, say
from latentae.denoisers import Denoiser, create_denoiser
from latentae.denoisers.planes import rotation_of
from latentae.nn.planes import PlaneLayout

SPATIAL, CHANNELS, PRESET = 8, 8, "planes-s"
PLANES, VOLUME = "four planes", "volume"


@dataclass(frozen=True)
class Shape:
    """A clip, and by how much its latents are shorter."""

    frames: int
    height: int
    width: int
    temporal: int

    @property
    def name(self) -> str:
        return f"{self.frames} x {self.height} x {self.width}, t x {self.temporal}"

    @property
    def latent(self) -> tuple[int, int, int]:
        return (self.frames - 1) // self.temporal + 1, self.height // SPATIAL, self.width // SPATIAL

    @property
    def law(self) -> dict[str, int]:
        """Tokens by the growth laws: faces against volume."""
        t, h, w = self.latent
        return {PLANES: 2 * h * w + t * (h + w), VOLUME: t * h * w}


SHAPES = (
    Shape(17, 128, 128, 4),
    Shape(17, 256, 256, 4),
    Shape(16, 256, 256, 1),
    Shape(65, 256, 256, 4),
    Shape(81, 480, 832, 4),
    Shape(129, 512, 512, 4),
)


@dataclass(frozen=True)
class CostTier:
    """How much is measured, and where.

    Attributes:
        blocks: of the transformer that is measured; None for all.
        most: billions of multiplications of a forward pass up to which a step is measured.
    """

    device: str
    dtype: str
    blocks: int | None
    most: float
    rounds: int
    shapes: tuple[Shape, ...] = SHAPES


TIERS = {"cpu": CostTier("cpu", "float32", 1, 300.0, 3), "gpu": CostTier("cuda", "bfloat16", None, 5000.0, 10)}
QUICK = CostTier("cpu", "float32", 1, 10.0, 1, (Shape(17, 128, 128, 4), Shape(81, 480, 832, 4)))

# Written before the first run, from the multiplications of the whole transformer: 18.5 and 20.1 times fewer for the
# clips of 16 and 65 frames of 256 px, 2.3 times for 17 frames of 128 px. Half of that is wanted, and of the memory of
# training, which grows with the tokens (5.3 and 5.6 times as many), somewhat more than half.
LEAST = {
    ("seconds", SHAPES[2]): 9.0,
    ("seconds", SHAPES[3]): 10.0,
    ("seconds", SHAPES[0]): 1.3,
    ("peak_bytes", SHAPES[2]): 3.0,
    ("peak_bytes", SHAPES[3]): 3.0,
}


def denoiser_of(way: str, shape: Shape, blocks: int | None) -> Denoiser:
    """The transformer with random weights on the planes or on the volume of a clip."""
    t, h, w = shape.latent
    description: dict[str, Any] = {"preset": PRESET} | ({} if blocks is None else {"num_layers": blocks})
    if way == PLANES:
        return create_denoiser(description, PlaneLayout(t, h, w, channels=CHANNELS))
    # a volume is one plane of t * h rows, apart from where its tokens are
    denoiser = create_denoiser(description, PlaneLayout(1, t * h, w, channels=CHANNELS))
    place = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).float()
    denoiser.transformer.rotation = rotation_of(place, denoiser.transformer.config.attention_head_dim)
    return denoiser


def giga_macs(way: str, shape: Shape) -> float:
    """Billions of multiplications of the whole transformer, forward, one clip."""
    with torch.device("meta"):
        denoiser = denoiser_of(way, shape, None)
        noisy, t = torch.zeros(1, *denoiser.latent_shape), torch.zeros(1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            denoiser(noisy, t, torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() / 2e9


def training_step(way: str, shape: Shape, tier: CostTier) -> Callable[[], None]:
    denoiser = denoiser_of(way, shape, tier.blocks).to(tier.device).train()
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, *denoiser.latent_shape, generator=generator).to(tier.device)
    t, labels = torch.full((1,), 0.5, device=tier.device), torch.zeros(1, dtype=torch.long, device=tier.device)
    return flow_step(denoiser, clean, t, noise, labels, tier)


def measure(tier: CostTier) -> list[dict[str, Any]]:
    """A row for each shape: ``tokens``, ``giga_macs`` and, where they are measured, ``seconds`` and ``peak_bytes`` of
    both ways, and the ``ratios``, volume over planes."""
    rows = []
    for shape in tier.shapes:
        say(f"a transformer on {shape.name}")
        macs = {way: giga_macs(way, shape) for way in (PLANES, VOLUME)}
        tokens = {way: denoiser_of(way, shape, 0).latent_shape[0] for way in (PLANES, VOLUME)}
        share = 1.0 if tier.blocks is None else tier.blocks / 12
        fitting = [way for way in macs if macs[way] * share <= tier.most]
        steps = {way: training_step(way, shape, tier) for way in fitting}
        for step in steps.values():
            step()  # the warm-up
        row: dict[str, Any] = {"shape": asdict(shape), "name": shape.name, "latent": shape.latent}
        row |= {"tokens": tokens, "law": shape.law, "giga_macs": macs, "seconds": alternate(steps, tier.rounds)}
        steps.clear()
        row["peak_bytes"] = {way: peak_memory(partial(training_step, way, shape, tier), tier) for way in fitting}
        row["ratios"] = ratios_of(row)
        rows.append(row)
    return rows


def ratios_of(row: dict[str, Any]) -> dict[str, float]:
    ratios = {}
    for name in ("tokens", "giga_macs", "peak_bytes"):
        if VOLUME in row[name]:
            ratios[name] = row[name][VOLUME] / row[name][PLANES]
    if VOLUME in row["seconds"]:
        ratios["seconds"] = pairwise(row["seconds"][VOLUME], row["seconds"][PLANES])
    return ratios


def thresholds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_name = {row["name"]: row for row in rows}
    right = sum(row["tokens"] == row["law"] for row in rows)
    verdicts = [
        {
            "sentence": "a transformer sees as many tokens as the growth laws say",
            "found": f"{right} of {len(rows)} shapes",
            "shown": right == len(rows),
        }
    ]
    said = {"seconds": "a training step is faster on planes", "peak_bytes": "it takes less memory"}
    for (figure, shape), least in LEAST.items():
        value = by_name.get(shape.name, {}).get("ratios", {}).get(figure)
        found = "not measured" if value is None else f"{value:.1f}x, wanted {least:g}x"
        shown = value is not None and value >= least
        sentence = f"{said[figure]}, {shape.name}"
        verdicts.append({"sentence": sentence, "value": value, "found": found, "shown": shown})
    return verdicts


def print_table(rows: list[dict[str, Any]]) -> None:
    header = ["one clip", "latents", "transformer on", "tokens", "GMAC", "seconds", "GiB", "tokens x", "GMAC x"]
    header += ["seconds x", "memory x"]
    lines: list[list[Any]] = []
    for row in rows:
        for way in (PLANES, VOLUME):
            seconds, peak = row["seconds"].get(way), row["peak_bytes"].get(way)
            line = [row["name"], " x ".join(map(str, row["latent"])), way, row["tokens"][way], row["giga_macs"][way]]
            line += [seconds and sorted(seconds)[len(seconds) // 2], peak and peak / 2**30]
            names = ("tokens", "giga_macs", "seconds", "peak_bytes")
            line += [row["ratios"].get(name) if way == VOLUME else None for name in names]
            lines.append(line)
    print(format_table(header, lines))
    print(
        "Arithmetic is of a forward pass of the whole transformer; seconds and memory are of a training step with the"
    )
    print("blocks of the tier; what has none was too large to run.")
    print()
