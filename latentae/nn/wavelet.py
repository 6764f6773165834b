"""The discrete wavelet transform of images and its inverse, in PyWavelets' conventions, differentiable.

Along one axis and with filters of L taps, low[k] = Σ_j dec_lo[j] · x[2k + 1 − j], and high the same with dec_hi, where
x goes on beyond its border as the mode says ("periodization" has L / 2 for 1). Two axes give four bands: cA is low in
both, cH high between rows, cV high between columns, cD high in both. Haar has a path of its own: it never looks beyond
a pair, and being orthonormal it has its inverse as its gradient.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import RequestError
from latentae.nn.precision import widen

MODES = ("zero", "constant", "symmetric", "reflect", "periodization")
HAAR = ("haar", "db1")

Bands = tuple[Tensor, Tensor, Tensor, Tensor]


def dwt2(x: Tensor, wavelet: str = "haar", mode: str = "periodization") -> Bands:
    """One level of the transform, as `pywt.dwt2`.

    Args:
        x: (B, C, H, W), of any size.
        wavelet: name of a discrete wavelet of PyWavelets.
        mode: how the image goes on beyond its border, one of `MODES`.

    Returns:
        cA, cH, cV, cD, each (B, C, h, w) with h = ceil(H / 2) for "periodization" and (H + L - 1) // 2 for the others.

    Raises:
        RequestError: no such wavelet or mode, or what is no image of floats.
    """
    _check(x, mode, 4)
    if wavelet in HAAR:
        return _HaarSplit.apply(_pad_to_even(_pad_to_even(x, mode, -2), mode, -1))
    filters = find_filters(wavelet)
    low, high = _split(widen(x), filters, mode, -2)
    (cA, cV), (cH, cD) = _split(low, filters, mode, -1), _split(high, filters, mode, -1)
    return cA.to(x.dtype), cH.to(x.dtype), cV.to(x.dtype), cD.to(x.dtype)


def idwt2(cA: Tensor, cH: Tensor, cV: Tensor, cD: Tensor, wavelet: str = "haar", mode: str = "periodization") -> Tensor:
    """The inverse of `dwt2`, as `pywt.idwt2`. An odd side comes back one larger, the last line being no part of it.

    Args:
        cA, cH, cV, cD: bands of one shape (B, C, h, w).

    Returns:
        (B, C, 2h, 2w) for "periodization", (B, C, 2h - L + 2, 2w - L + 2) for the other modes.

    Raises:
        RequestError: no such wavelet or mode, or bands that differ in shape or are too small for the wavelet.
    """
    for band in (cA, cH, cV, cD):
        _check(band, mode, 4)
    if not cA.shape == cH.shape == cV.shape == cD.shape:
        shapes = ", ".join(str(tuple(band.shape)) for band in (cA, cH, cV, cD))
        raise RequestError(f"The four bands must have one shape, not {shapes}.")
    if wavelet in HAAR:
        return _HaarMerge.apply(cA, cH, cV, cD)
    filters = find_filters(wavelet)
    least = 1 if mode == "periodization" else len(filters.rec_lo) // 2
    if min(cA.shape[-2:]) < least:
        size = " x ".join(map(str, cA.shape[-2:]))
        raise RequestError(f"Bands of {size} are too small for {wavelet}, mode {mode}: it needs {least} x {least}.")
    low = _merge(widen(cA), widen(cV), filters, mode, -1)
    high = _merge(widen(cH), widen(cD), filters, mode, -1)
    return _merge(low, high, filters, mode, -2).to(cA.dtype)


def wavedec2(x: Tensor, wavelet: str = "haar", mode: str = "periodization", levels: int = 1) -> list[Any]:
    """Several levels, as `pywt.wavedec2`: [cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1)], coarsest first.

    Raises:
        RequestError: as `dwt2`; ``levels`` below 1 or a side below 2^levels.
    """
    _check(x, mode, 4)
    if not isinstance(levels, int) or levels < 1:
        raise RequestError(f"levels must be a whole number of at least 1, not {levels!r}.")
    if min(x.shape[-2:]) < 2**levels:
        size = " x ".join(map(str, x.shape[-2:]))
        raise RequestError(f"A wavelet transform of {levels} levels needs sides of at least {2**levels}, not {size}.")
    details = []
    for _ in range(levels):
        x, *bands = dwt2(x, wavelet, mode)
        details.append(tuple(bands))
    return [x, *reversed(details)]


def waverec2(coefficients: Sequence[Any], wavelet: str = "haar", mode: str = "periodization") -> Tensor:
    """The inverse of `wavedec2`, as `pywt.waverec2`. An odd side comes back one larger.

    Raises:
        RequestError: as `idwt2`.
    """
    x, *details = coefficients
    for cH, cV, cD in details:
        height, width = cH.shape[-2:]
        if x.shape[-2] == height + 1:  # the finer level had an odd side
            x = x[..., :height, :]
        if x.shape[-1] == width + 1:
            x = x[..., :width]
        x = idwt2(x, cH, cV, cD, wavelet, mode)
    return x


def dwt3(x: Tensor, mode: str = "periodization") -> tuple[Tensor, ...]:
    """One level of the Haar transform of a video, as `pywt.dwtn` over its last three axes.

    Args:
        x: (B, C, T, H, W), of any size.
        mode: one of `MODES`; it matters for odd sizes only.

    Returns:
        Eight bands (B, C, ceil(T / 2), ceil(H / 2), ceil(W / 2)): aaa, aad, ada, add, daa, dad, dda, ddd, where the
        letters say approximation or detail along T, H and W.

    Raises:
        RequestError: no such mode, or a video without pixels.
    """
    _check(x, mode, 5)
    for dim in (-3, -2, -1):
        x = _pad_to_even(x, mode, dim)
    first, second = x[..., 0::2, :, :], x[..., 1::2, :, :]
    bands: list[Tensor] = []
    for half in (first + second, first - second):
        aa, da, ad, dd = _HaarSplit.apply(half * 0.5**0.5)
        bands += [aa, ad, da, dd]
    return tuple(bands)


def idwt3(bands: Sequence[Tensor]) -> Tensor:
    """The inverse of `dwt3`: eight bands (B, C, t, h, w) to (B, C, 2t, 2h, 2w).

    Raises:
        RequestError: not eight bands of one shape.
    """
    if len(bands) != 8 or len({tuple(band.shape) for band in bands}) != 1:
        shapes = ", ".join(str(tuple(band.shape)) for band in bands)
        raise RequestError(f"A video has eight bands of one shape, not {shapes}.")
    low, high = (_HaarMerge.apply(aa, da, ad, dd) for aa, ad, da, dd in (bands[:4], bands[4:]))
    return _interleave(low + high, low - high, -3) * 0.5**0.5


class _HaarSplit(torch.autograd.Function):
    """Blocks a b / c d of (..., 2h, 2w) to (a+b+c+d)/2, (a+b-c-d)/2, (a-b+c-d)/2 and (a-b-c+d)/2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Bands:
        top, bottom = x[..., 0::2, :], x[..., 1::2, :]
        low, high = (top + bottom).mul_(0.5), (top - bottom).mul_(0.5)
        l_left, l_right, h_left, h_right = low[..., 0::2], low[..., 1::2], high[..., 0::2], high[..., 1::2]
        return l_left + l_right, h_left + h_right, l_left - l_right, h_left - h_right

    @staticmethod
    def backward(ctx: Any, *bands: Tensor) -> Tensor:
        return _HaarMerge.apply(*bands)


class _HaarMerge(torch.autograd.Function):
    """The inverse of `_HaarSplit`, which is also its transpose."""

    @staticmethod
    def forward(ctx: Any, cA: Tensor, cH: Tensor, cV: Tensor, cD: Tensor) -> Tensor:
        low = _interleave(cA + cV, cA - cV, -1).mul_(0.5)
        high = _interleave(cH + cD, cH - cD, -1).mul_(0.5)
        return _interleave(low + high, low - high, -2)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Bands:
        return _HaarSplit.apply(x)


def _interleave(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    """``even`` at 0, 2, 4, ... and ``odd`` at 1, 3, 5, ... of the axis ``dim``, which is negative."""
    if dim < -1:
        return torch.stack((even, odd), dim).flatten(dim - 1, dim)
    x = even.new_empty(*even.shape[:-1], 2 * even.shape[-1])
    x[..., 0::2], x[..., 1::2] = even, odd  # stacking single numbers takes twice the time
    return x


def _pad_to_even(x: Tensor, mode: str, dim: int) -> Tensor:
    return _extend(x, mode, dim, 0, 1) if x.shape[dim] % 2 else x


def _split(x: Tensor, filters: "Filters", mode: str, dim: int) -> tuple[Tensor, Tensor]:
    """Low and high band along the axis ``dim``."""
    size, taps = x.shape[dim], len(filters.dec_lo)
    if mode == "periodization":  # centred, and no more coefficients than pairs
        count, before = (size + 1) // 2, taps // 2 - 1
    else:
        count, before = (size + taps - 1) // 2, taps - 2
    x = _extend(x, mode, dim, before, 2 * (count - 1) + taps - before - size)
    windows = x.unfold(dim, taps, 2).unbind(-1)  # one for each tap: what it meets at every coefficient
    return _weighted_sum(windows, filters.dec_lo[::-1]), _weighted_sum(windows, filters.dec_hi[::-1])


def _merge(low: Tensor, high: Tensor, filters: "Filters", mode: str, dim: int) -> Tensor:
    """x[i] = Σ_k rec_lo[i + L - 2 - 2k] · low[k] + rec_hi[i + L - 2 - 2k] · high[k] along the axis ``dim``.

    An even i meets the even taps only and an odd one the odd.
    """
    size, half = low.shape[dim], len(filters.rec_lo) // 2
    around = half // 2
    if mode == "periodization":
        low, high = (_extend(band, "periodic", dim, around, around) for band in (low, high))
    windows = [*low.unfold(dim, half, 1).unbind(-1), *high.unfold(dim, half, 1).unbind(-1)]
    even, odd = (
        _weighted_sum(windows, [*filters.rec_lo[parity::2][::-1], *filters.rec_hi[parity::2][::-1]])
        for parity in (0, 1)
    )
    x = _interleave(even, odd, dim)
    return x.narrow(dim, 2 * around - half + 1, 2 * size) if mode == "periodization" else x


def _weighted_sum(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = terms[0] * weights[0]
    for term, weight in zip(terms[1:], weights[1:]):
        total = total.add_(term, alpha=weight)
    return total


def _extend(x: Tensor, mode: str, dim: int, before: int, after: int) -> Tensor:
    """``x`` with that many samples more at either end of the axis ``dim``, which may be more than it has."""
    if mode == "zero":
        return F.pad(x, [0, 0] * (-1 - dim) + [before, after])
    size = x.shape[dim]
    if mode == "reflect" and size == 1:
        raise RequestError("mode 'reflect' needs sides of at least 2, not 1: choose 'symmetric'.")
    position = torch.arange(-before, size + after, device=x.device)
    if mode == "symmetric":  # c b a | a b c | c b a
        position = position % (2 * size)
        position = torch.minimum(position, 2 * size - 1 - position)
    elif mode == "reflect":  # d c b | a b c d | c b a
        position = position % (2 * size - 2)
        position = torch.minimum(position, 2 * size - 2 - position)
    elif mode == "periodic":  # a b c | a b c | a b c
        position = position % size
    elif mode == "periodization":  # a b c c | a b c c | a b c c
        position = position % (size + size % 2)
    return x.index_select(dim, position.clamp(0, size - 1))


class Filters(NamedTuple):
    """The taps of a wavelet, from the first to the last."""

    dec_lo: tuple[float, ...]
    dec_hi: tuple[float, ...]
    rec_lo: tuple[float, ...]
    rec_hi: tuple[float, ...]


@torch.compiler.assume_constant_result
def find_filters(wavelet: str) -> Filters:
    """The filters of a discrete wavelet of PyWavelets.

    Raises:
        RequestError: there is none of this name; the message has the nearest one.
    """
    import pywt

    if not isinstance(wavelet, str):
        raise RequestError(f"A wavelet is given by its name, such as 'db2', not as {type(wavelet).__name__}.")
    if wavelet in (names := pywt.wavelist(kind="discrete")):
        return Filters(*map(tuple, pywt.Wavelet(wavelet).filter_bank))
    if any(wavelet.startswith(name) for name in pywt.wavelist(kind="continuous")):
        raise RequestError(f"The wavelet {wavelet!r} is continuous: choose a discrete one, such as haar or db2.")
    near = get_close_matches(wavelet, names, n=1)
    hint = f"did you mean {near[0]}?" if near else "'pywt.wavelist(kind=\"discrete\")' lists all."
    raise RequestError(f"There is no wavelet {wavelet!r}; {hint}")


def _check(x: Tensor, mode: str, dims: int) -> None:
    shape = "(B, C, H, W)" if dims == 4 else "(B, C, T, H, W)"
    if not isinstance(x, Tensor):
        raise RequestError(f"A wavelet transform needs a torch tensor of floats {shape}, not {type(x).__name__}.")
    if x.ndim != dims or not x.is_floating_point() or 0 in x.shape[2:]:
        raise RequestError(f"A wavelet transform needs floats {shape}, not {tuple(x.shape)} of {x.dtype}.")
    if mode not in MODES:
        import pywt

        known = "PyWavelets has it, this transform does not" if mode in pywt.Modes.modes else "no such mode"
        raise RequestError(f"mode {mode!r}: {known}; choose {', '.join(MODES[:-1])} or {MODES[-1]}.")
