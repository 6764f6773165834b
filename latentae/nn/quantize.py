"""Vector quantisation (VQ-VAE, arXiv 1711.00937) and finite scalar quantisation (FSQ, arXiv 2309.15505).

Both replace each latent vector by the nearest of finitely many codes and pass gradients straight through. They are
written here rather than taken from ``vector-quantize-pytorch``, because a checkpoint must open years from now and a
model must export as one file, while that library renames buffers and arguments between versions and brings five
packages along; it is what the tests compare with instead.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from latentae.errors import RequestError
from latentae.nn.precision import widen

DEAD = 0.1  # a code is dead that gets less than this part of an equal share of the latents
DECAY = 0.99  # of running counts: a hundred steps
SMOOTHING = 1e-5
LARGEST_TABLE = 2**26  # distances held at a time
MOST_CODES = 2**24


class Quantizer(nn.Module):
    """What both have in common: codes are counted while they train, and images of vectors become lists.

    Attributes:
        codes: how many there are.
        share: the running part of all latents that each code got, of all ranks; it moves in training steps in which
            latents have a gradient.
    """

    share: Tensor

    def __init__(self, codes: int, decay: float = DECAY):
        super().__init__()
        self.codes = codes
        self.decay = decay
        self.register_buffer("share", torch.zeros(codes))

    def usage(self) -> dict[str, Tensor]:
        """The part of the codes that is alive, and the perplexity: how many equally frequent codes say as much."""
        share = self.share / self.share.sum().clamp_min(1e-12)
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        return {"codes_used": (share >= DEAD / self.codes).float().mean(), "perplexity": entropy.exp()}

    def check_indices(self, indices: Tensor) -> None:
        """Refuse what is no image of indices: a token model may have tokens that are no codes.

        Raises:
            RequestError: another shape or type, or a number that is no code's.
        """
        if indices.ndim != 3 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise RequestError(
                f"latents_of got {indices.dtype} of shape {tuple(indices.shape)}; expected whole numbers (B, h, w)."
            )
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codes:
            raise RequestError(
                f"latents_of got indices from {int(indices.min())} to {int(indices.max())}; there are {self.codes} "
                "codes, counted from 0."
            )

    def count(self, indices: Tensor) -> Tensor:
        """How often each code occurs on all ranks; moves `share`."""
        counts = sum_of_ranks(torch.bincount(indices.flatten(), minlength=self.codes).to(self.share))
        self.share.lerp_(counts / counts.sum(), 1 - self.decay)
        return counts


class VectorQuantizer(Quantizer):
    """Each latent vector becomes the nearest entry of a learnt codebook.

    The first latents that it trains on are the first codes. A codebook that follows running means of the latents
    (``ema``) is a buffer and moves only where the encoder trains; averages of weights take it as it is, since it is
    an average already. Codes that get less than a tenth of an equal share of the latents are dead and become latents
    of the present batch.

    Args:
        channels: of the latents.
        codes: entries of the codebook.
        codebook: ``ema``, or ``loss``: a parameter, drawn to the latents by the mean squared distance;
            averages of weights lag behind its revived codes.
        decay: of the running means.
        commitment: weight of the loss that draws latents to their codes, relative to that of the codebook.
        revive: revive dead codes; otherwise only those that never had a latent are placed.
    """

    codebook: Tensor
    cluster_size: Tensor
    embedding_sum: Tensor

    def __init__(
        self,
        channels: int,
        codes: int,
        codebook: str = "ema",
        decay: float = DECAY,
        commitment: float = 0.25,
        revive: bool = True,
    ):
        if not 1 < codes <= MOST_CODES:
            raise RequestError(f"quantizer.codes must lie between 2 and {MOST_CODES}; got {codes}.")
        if codebook not in ("ema", "loss"):
            raise RequestError(f"quantizer.codebook {codebook!r} is unknown; expected ema or loss.")
        if not 0 <= decay < 1:
            raise RequestError(f"quantizer.decay must be at least 0 and below 1; got {decay}.")
        super().__init__(codes, decay)
        self.commitment = commitment
        self.revive = revive
        vectors = torch.randn(codes, channels)
        self.register_buffer("cluster_size", torch.zeros(codes))
        if codebook == "ema":
            self.register_buffer("codebook", vectors)
            self.register_buffer("embedding_sum", torch.zeros(codes, channels))
        else:
            self.codebook = nn.Parameter(vectors)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) to their codes, same shape, and the loss of commitment and codebook."""
        vectors = widen(z).movedim(1, -1).flatten(0, -2)  # (N, C)
        learns = self.training and z.requires_grad
        if learns:
            self.revive_dead_codes(vectors.detach())
        indices = self.nearest(vectors)
        chosen = widen(self.codebook)[indices]
        loss = self.commitment * F.mse_loss(vectors, chosen.detach())
        if chosen.requires_grad:
            loss = loss + F.mse_loss(chosen, vectors.detach())
        if learns:
            self.follow(vectors.detach(), indices)
        quantized = straight_through(vectors, chosen.detach())
        return quantized.unflatten(0, (len(z), *z.shape[2:])).movedim(-1, 1).to(z.dtype), loss

    def indices_of(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) to indices (B, h, w) of their codes."""
        return self.nearest(widen(z).movedim(1, -1).flatten(0, -2)).unflatten(0, (len(z), *z.shape[2:]))

    def latents_of(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) to codes (B, C, h, w), which are their own codes."""
        self.check_indices(indices)
        return self.codebook.detach()[indices].movedim(-1, 1)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Vectors (N, C) to indices (N) of the nearest codes."""
        codebook = widen(self.codebook)
        norms = codebook.square().sum(1)
        parts = vectors.split(max(1, LARGEST_TABLE // self.codes))
        device = vectors.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return torch.cat([torch.addmm(norms, part, codebook.T, alpha=-2).argmin(1) for part in parts])

    @torch.no_grad()
    def follow(self, vectors: Tensor, indices: Tensor) -> None:
        """Move the counts, and a codebook of running means with them, towards this step's latents (N, C)."""
        counts = self.count(indices)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        if not isinstance(self.codebook, nn.Parameter):
            sums = torch.zeros_like(self.embedding_sum).index_add_(0, indices, vectors.to(self.embedding_sum))
            self.embedding_sum.lerp_(sum_of_ranks(sums), 1 - self.decay)
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + SMOOTHING) / (total + self.codes * SMOOTHING) * total
            self.codebook.copy_(self.embedding_sum / smoothed.unsqueeze(1))

    @torch.no_grad()
    def revive_dead_codes(self, vectors: Tensor) -> None:
        """Put dead codes onto latents of this step (N, C), of whatever rank, no two onto the same one."""
        rank, ranks = rank_and_count()
        total = ranks * len(vectors)
        dead = self.cluster_size <= (DEAD if self.revive else 0.0) * self.cluster_size.mean()
        order = dead.cumsum(0) - 1  # of each dead code among them
        drawn = torch.randperm(total, device=vectors.device)
        if ranks > 1:
            distributed.broadcast(drawn, 0)
        own = drawn[order.clamp(0, total - 1)] - rank * len(vectors)
        here = (own >= 0) & (own < len(vectors))
        latents = vectors[own.clamp(0, len(vectors) - 1)].to(self.codebook)
        latents = sum_of_ranks(torch.where(here.unsqueeze(1), latents, 0.0))
        revived = dead & (order < total) & latents.isfinite().all(1)
        share = total / self.codes
        self.codebook.copy_(torch.where(revived.unsqueeze(1), latents, self.codebook))
        self.cluster_size.copy_(torch.where(revived, share, self.cluster_size))
        if not isinstance(self.codebook, nn.Parameter):
            self.embedding_sum.copy_(torch.where(revived.unsqueeze(1), latents * share, self.embedding_sum))


class FSQ(Quantizer):
    """Each channel of a latent is bounded by a tanh and rounded to one of a few levels; the codes are all combinations.

    There is no codebook to learn and none to collapse. Latents are what stands before the tanh. The shift for even
    numbers of levels is the inverse of tanh, so that 0 stays 0, where the code printed in the paper has a tangent, and
    the bound lies a thousandth outside of the outermost levels, not inside, so that each level has a latent.

    Args:
        channels: of the latents, as many as there are levels.
        levels: of each channel; the paper advises 5 or more.
    """

    levels: Tensor
    strides: Tensor

    def __init__(self, channels: int, levels: Sequence[int]):
        if len(levels) != channels:
            raise RequestError(
                f"quantizer.levels has {len(levels)} entries for {channels} latent channels: set latent_channels to "
                f"{len(levels)}, or give one number of levels for each channel."
            )
        codes = math.prod(levels)
        if min(levels) < 3 or codes > MOST_CODES:
            raise RequestError(
                f"quantizer.levels must be 3 or more each, with a product of at most {MOST_CODES}; got {list(levels)}."
            )
        super().__init__(codes)
        strides = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)

    def forward(self, z: Tensor) -> tuple[Tensor, None]:
        """Latents (B, C, h, w) to their codes in [-1, 1], same shape; there is no loss."""
        bounded = self.bound(widen(z).movedim(1, -1))
        levels = straight_through(bounded, bounded.detach().round())
        if self.training and z.requires_grad:
            with torch.no_grad():
                self.count(self.indices_of(z))
        return (levels / self.half_width).movedim(-1, 1).to(z.dtype), None

    def indices_of(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) to indices (B, h, w) of their codes."""
        levels = self.bound(widen(z).movedim(1, -1)).round().long() + self.half_width
        return (levels * self.strides).sum(-1)

    def latents_of(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) to latents (B, C, h, w) in the middle of what is rounded to these codes."""
        self.check_indices(indices)
        levels = indices.unsqueeze(-1) // self.strides % self.levels - self.half_width
        half_range, offset = self.half_range_and_offset(self.share.dtype)
        centred = ((levels + offset) / half_range).atanh() - (offset / half_range).atanh()
        return centred.movedim(-1, 1)

    def bound(self, z: Tensor) -> Tensor:
        """Latents (..., C) to the range of their levels: L of them round to -(L // 2) and up."""
        half_range, offset = self.half_range_and_offset(z.dtype)
        return (z + (offset / half_range).atanh()).tanh() * half_range - offset

    def half_range_and_offset(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.levels - 1).to(wide) * (1.001 / 2), (1 - self.levels % 2).to(wide) / 2

    @property
    def half_width(self) -> Tensor:
        return self.levels // 2


KINDS: dict[str, Any] = {"vq": VectorQuantizer, "fsq": FSQ}
OPTIONS = {"vq": ("codes", "codebook", "decay", "commitment", "revive"), "fsq": ("levels",)}


def _is_number(value: Any, kinds: Any = (int, float)) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


WANTED: dict[str, tuple[str, Any]] = {
    "codes": ("a whole number", lambda value: _is_number(value, int)),
    "codebook": ("a word", lambda value: isinstance(value, str)),
    "decay": ("a number", _is_number),
    "commitment": ("a number", _is_number),
    "revive": ("true or false", lambda value: isinstance(value, bool)),
    "levels": (
        "a list of whole numbers",
        lambda value: isinstance(value, (list, tuple)) and bool(value) and all(_is_number(v, int) for v in value),
    ),
}


def make_quantizer(config: dict[str, Any], channels: int) -> Quantizer:
    """The quantiser that ``{"kind": "vq" or "fsq", **arguments}`` describes.

    Raises:
        RequestError: another kind, or an argument that it does not have or needs.
    """
    if not isinstance(config, Mapping):
        raise RequestError(f"quantizer must be a mapping such as {{kind: fsq, levels: [8, 5, 5, 5]}}; got {config!r}.")
    options = dict(config)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise RequestError(f"quantizer.kind {kind!r} is unknown; expected {' or '.join(KINDS)}.")
    if unknown := set(options) - set(OPTIONS[kind]):
        raise RequestError(
            f"quantizer of kind {kind} has no {', '.join(sorted(unknown))}; it has {', '.join(OPTIONS[kind])}."
        )
    if OPTIONS[kind][0] not in options:
        raise RequestError(f"quantizer of kind {kind} needs {OPTIONS[kind][0]}.")
    for name, value in options.items():
        if not WANTED[name][1](value):
            raise RequestError(f"quantizer.{name} must be {WANTED[name][0]}; got {value!r}.")
    return KINDS[kind](channels, **options)


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """Exactly the quantised value, with the gradient of ``z``."""
    return quantized + (z - z.detach()) if z.requires_grad else quantized


def rank_and_count() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def sum_of_ranks(x: Tensor) -> Tensor:
    """The sum over the processes of a distributed run, in place."""
    if rank_and_count()[1] > 1:
        distributed.all_reduce(x)
    return x
