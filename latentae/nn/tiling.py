"""Running a network tile by tile: exactly, with a halo, or by blending overlaps where no halo is wide enough."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from latentae.nn.precision import widen


def run_in_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: tuple[int, int], halo: int, *, down: int = 1, up: int = 1
) -> Tensor:
    """Apply ``function`` to overlapping tiles of ``x`` and keep of each result the part that no tile border reaches.

    Exact for any function whose output at a pixel depends on inputs at most ``halo`` away and that pads with zeros,
    as stacks of "same" convolutions and per-pixel norms do: at the image's border a tile ends where the image ends.

    Args:
        x: (B, C, H, W).
        tile: height and width of a tile in pixels of ``x``, without its halo; multiples of ``down``.
        halo: receptive radius in pixels of ``x``; a multiple of ``down``.
        down, up: the function maps H to ``H * up / down``.
    """
    height, width = x.shape[-2:]
    result = None
    for rows, inner_rows in spans(height, tile[0], halo):
        for columns, inner_columns in spans(width, tile[1], halo):
            piece = function(x[..., rows, columns])
            if result is None:
                result = piece.new_empty(*piece.shape[:2], height * up // down, width * up // down)
            place = [
                slice((outer.start + inner.start) * up // down, (outer.start + inner.stop) * up // down)
                for outer, inner in ((rows, inner_rows), (columns, inner_columns))
            ]
            kept = [slice(i.start * up // down, i.stop * up // down) for i in (inner_rows, inner_columns)]
            result[..., place[0], place[1]] = piece[..., kept[0], kept[1]]
    assert result is not None
    return result


def spans(size: int, tile: int, halo: int) -> Iterator[tuple[slice, slice]]:
    """Tiles along a side: each with its halo, as far as there is one, and where in it the tile itself is."""
    for start in range(0, size, tile):
        stop = min(start + tile, size)
        first = max(start - halo, 0)
        yield slice(first, min(stop + halo, size)), slice(start - first, stop - first)


def blend_tiles(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: tuple[int, int],
    stride: tuple[int, int],
    *,
    down: int = 1,
    up: int = 1,
) -> Tensor:
    """Apply ``function`` to overlapping tiles of ``x`` and average the results, each weighing less towards its border.

    For functions whose output depends on the whole input, through norms or attention: the result differs from
    ``function(x)`` but has no seams, since weights fall linearly to zero over the overlap. One tile that covers all
    gives ``function(x)`` itself. Every tile has the same size: the last of a row or column is moved back to fit.

    Args:
        x: (B, C, H, W).
        tile: height and width of a tile in pixels of ``x``, multiples of ``down``.
        stride: from one tile to the next, at most ``tile``; multiples of ``down``.
        down, up: the function maps H to ``H * up / down``.
    """
    height, width = x.shape[-2:]
    rows, columns = min(tile[0], height), min(tile[1], width)
    if (rows, columns) == (height, width):
        return function(x)
    result = total = weight = None
    for top in _starts(height, rows, stride[0]):
        for left in _starts(width, columns, stride[1]):
            piece = function(x[..., top : top + rows, left : left + columns])
            if result is None or total is None or weight is None:
                overlap = [(size - step) * up // down for size, step in zip((rows, columns), stride)]
                weight = _ramp(piece.shape[-2], overlap[0], piece)[:, None] * _ramp(piece.shape[-1], overlap[1], piece)
                total = weight.new_zeros(height * up // down, width * up // down)
                result = weight.new_zeros(*piece.shape[:-2], *total.shape)
            vertical = slice(top * up // down, (top + rows) * up // down)
            horizontal = slice(left * up // down, (left + columns) * up // down)
            result[..., vertical, horizontal] += piece * weight
            total[vertical, horizontal] += weight
    assert result is not None
    assert total is not None
    return result.div_(total).to(piece.dtype)


def _starts(size: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin along a side, so that they cover it and all lie inside."""
    return sorted({min(start, size - tile) for start in range(0, size - tile + stride, stride)})


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """Weights along a side of a tile: one inside, falling linearly to almost zero over ``overlap`` at both ends."""
    position = torch.arange(length, device=like.device, dtype=widen(like[:0]).dtype) + 0.5
    return (torch.minimum(position, length - position) / max(overlap, 1)).clamp(max=1.0)
