"""Networks of convolutions and group norms, run tile by tile with the result of the whole image.

Convolutions need a halo, group norms the mean and variance of the whole image. These are found one norm after the
other: all tiles run up to the first norm whose statistics are missing, each adds its own part of them, and the next
round gets one norm further, until a last one gives the result. What rounds share is not computed again as long as the
tensors between two steps of the network are small enough to be kept.

    state ─ step ─ … ─ step ─ state      rounds of tiles through these, one for every group norm inside and one more
          ─ step ─ … ─ step ─ state      and so on
"""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from latentae.nn.precision import widen
from latentae.nn.tiling import tiles_of

KEPT = 6 * 2**30  # bytes of the tensors between two steps, up to which they are kept
KEPT_ON_GPU = 2 * 2**30  # whose memory is scarce and whose arithmetic is not

State = tuple[Tensor, ...]


class Step(NamedTuple):
    """A part of a network: from tensors of one size to tensors of one size.

    A tensor that passes a step unchanged is the same object before and after, so that none is copied.

    Args:
        run: the part; called with the tensors (B, C, …, H, W), gives a tuple of such. It calls the same group norms,
            with weight and bias, in the same order whatever the values.
        radius: how far around a pixel of the input the output depends on it, in pixels of the input.
        scale: sides of the output over those of the input.
    """

    run: Callable[..., State]
    radius: int
    scale: Fraction = Fraction(1)


def steps_of(modules: Iterable[nn.Module]) -> list[Step]:
    """Modules of one tensor each, in a row: any of convolutions, and such as halve the size or double it.

    Modules of ours that double it say so by ``doubles``. Convolutions are square and without dilation.
    """
    return [step_of(module, partial(_run, module)) for module in modules]


def steps_of_block(block: nn.Module, parts: Iterable[nn.Module]) -> list[Step]:
    """A block by its parts in a row; or as one step if an offloading hook sits on it, which brings all its weights."""
    steps = steps_of(parts)
    if not hasattr(block, "_diffusers_hook"):
        return steps
    return [Step(partial(_run, block), math.ceil(_radius(steps)), _scales(steps)[-1])]


def _run(module: nn.Module, x: Tensor) -> State:
    return (module(x, None) if isinstance(module, ResnetBlock2D) else module(x),)  # it has no default for the time


def step_of(module: nn.Module, run: Callable[..., State]) -> Step:
    """The step that ``run`` makes, with the reach of the module's convolutions, one after the other."""
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]
    radius = sum(convolution.kernel_size[-1] // 2 for convolution in convolutions)
    if any(convolution.stride[-1] == 2 for convolution in convolutions):
        return Step(run, radius + 1, Fraction(1, 2))  # diffusers' own begins at the pixel, not at its neighbour
    if isinstance(module, Upsample2D | nn.Upsample | nn.PixelShuffle) or hasattr(module, "doubles"):
        return Step(run, -(-radius // 2), Fraction(2))
    return Step(run, radius)


@torch.compiler.disable  # a graph cannot end half way, and each norm that knows its statistics would be one more
def run_steps(steps: Sequence[Step], x: Tensor, tile: tuple[int, int], kept: int | None = None) -> Tensor:
    """The steps one after the other, in tiles; as without tiles but for rounding.

    Statistics are taken without gradient: results are for inference.

    Args:
        x: (B, C, …, H, W), with sides that every step that halves can halve.
        tile: height and width in pixels of ``x``; for later steps the same part of the image.
        kept: at most so many bytes are kept between two steps, so that while tiles run there are twice as many, before
            and after; by default `KEPT`, or `KEPT_ON_GPU`; 0 for steps without norms.
    """
    if kept is None:
        kept = KEPT if x.device.type in ("cpu", "meta") else KEPT_ON_GPU  # "meta" stands for a CPU, to count memory
    with _eagerly:
        state: State = (x,)
        sizes = _bytes_after(steps, x)
        scale, first = Fraction(1), 0
        while first < len(steps):
            last = next(i for i in range(first, len(steps)) if sizes[i] <= kept or i == len(steps) - 1)
            group = steps[first : last + 1]
            state = _run_group(group, state, (int(tile[0] * scale), int(tile[1] * scale)))
            scale *= math.prod(step.scale for step in group)
            first = last + 1
        (result,) = state
        return result


class _Eagerly:
    """What is compiled runs eagerly while any thread is inside: torch has one stance for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._stance = torch.compiler.set_stance("force_eager")  # from here on
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._stance.__exit__(None, None, None)  # back to the one before


_eagerly = _Eagerly()


def _bytes_after(steps: Sequence[Step], x: Tensor) -> list[int]:
    """Size of the tensors after each step, by what the steps make of a corner of the image."""
    smallest = _align(steps) * 2  # norms refuse a single pixel
    state: State = (x[..., :smallest, :smallest],)
    share = x.shape[-2] * x.shape[-1] / (state[0].shape[-2] * state[0].shape[-1])
    sizes = []
    for step in steps:
        state = step.run(*state)
        sizes.append(int(sum(tensor.nbytes for tensor in state) * share))
    return sizes


def _align(steps: Sequence[Step]) -> int:
    """Pixels of the input on which tiles must begin, for every step to begin on a pixel of its own."""
    return max(scale.denominator for scale in _scales(steps))


def _radius(steps: Sequence[Step]) -> Fraction:
    """How far around a pixel of the input all steps together reach."""
    return sum((step.radius / scale for step, scale in zip(steps, _scales(steps))), Fraction(0))


def _scales(steps: Sequence[Step]) -> list[Fraction]:
    """Pixels along a side before each step and after the last, for one of the input."""
    scales = [Fraction(1)]
    for step in steps:
        scales.append(scales[-1] * step.scale)
    return scales


def _run_group(steps: Sequence[Step], state: State, tile: tuple[int, int]) -> State:
    scale, align = _scales(steps)[-1], _align(steps)
    halo = math.ceil(_radius(steps) / align) * align
    rows, columns = (max(side // align, 1) * align for side in tile)
    norms = _WholeImageNorms()
    while True:
        results: dict[int, Tensor] = {}
        for place in tiles_of(state[0].shape, (rows, columns), halo):
            pieces = given = tuple(tensor[place.outer] for tensor in state)
            try:
                with norms.of_tile(pieces[0].shape, place.inner):
                    for step in steps:
                        pieces = step.run(*pieces)
            except _MissingStatistics:
                continue
            for i, piece in enumerate(pieces):
                kept = [whole for whole, part in zip(state, given) if part is piece]
                if kept:
                    results[i] = kept[0]
                else:
                    results[i] = place.put(piece, results.get(i), state[0].shape, scale.denominator, scale.numerator)
        if results:
            assert not norms.parts, "a step calls another number of group norms from tile to tile"
            return tuple(results[i] for i in range(len(results)))
        norms.end_round()


class _MissingStatistics(Exception):
    """Ends a tile at the first norm that does not know the statistics of the whole image yet."""


class _WholeImageNorms(TorchFunctionMode):
    """Group norms, in the order in which they are called, with the statistics of all tiles together."""

    def __init__(self) -> None:
        super().__init__()
        self._known: list[tuple[Tensor, Tensor]] = []  # mean and variance (B, groups), in float64 if there is
        self.parts: list[tuple[int, Tensor, Tensor]] = []  # of the next norm: pixels, mean and variance of each tile
        self._calls = 0
        self._shape: torch.Size
        self._inner: tuple[slice, slice]

    def of_tile(self, shape: torch.Size, inner: tuple[slice, slice]) -> "_WholeImageNorms":
        """What follows is a tile of this shape with its halo, and in it is the tile itself."""
        self._calls, self._shape, self._inner = 0, shape, inner
        return self

    def end_round(self) -> None:
        """All tiles have been at the first norm without statistics."""
        total = sum(pixels for pixels, _, _ in self.parts)
        mean: Any = sum(part * (pixels / total) for pixels, part, _ in self.parts)
        variance: Any = sum((within + (part - mean).square()) * (pixels / total) for pixels, part, within in self.parts)
        self._known.append((mean, variance))
        self.parts = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.group_norm or func is torch.group_norm:
            return self._norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _norm(
        self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, cudnn_enabled: bool = True
    ) -> Tensor:
        call = self._calls
        self._calls += 1
        if call == len(self._known):
            self.parts.append(self._statistics(x.detach(), groups))
            raise _MissingStatistics
        mean, variance = (each.repeat_interleave(x.shape[1] // groups, dim=1) for each in self._known[call])  # (B, C)
        scale = weight * torch.rsqrt(variance + eps)
        shift = bias - mean * scale
        scale, shift = (each.to(widen(x[:0]).dtype)[:, :, None, None] for each in (scale, shift))
        return torch.addcmul(shift, widen(x), scale).to(x.dtype)

    def _statistics(self, x: Tensor, groups: int) -> tuple[int, Tensor, Tensor]:
        """Number of pixels, and over them mean and variance of each group, of the tile without its halo."""
        inner: list[Any] = [
            slice(part.start * size // whole, part.stop * size // whole)
            for part, size, whole in zip(self._inner, x.shape[-2:], self._shape[-2:])
        ]
        x = widen(x[..., inner[0], inner[1]])
        variance, mean = torch.var_mean(x.unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0)  # (B, groups)
        exact = mean.dtype if x.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
        return x.shape[-2] * x.shape[-1], mean.to(exact), variance.to(exact)
