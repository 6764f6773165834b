"""Running a network tile by tile: with a halo, or by blending overlaps where no halo is wide enough."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentae.nn.precision import widen


class Tile(NamedTuple):
    """Where a tile lies: ``outer`` with its halo in the image, and ``inner`` of that is the tile itself."""

    outer: tuple[Any, slice, slice]
    inner: tuple[slice, slice]

    def put(self, piece: Tensor, result: Tensor | None, shape: Sequence[int], down: int, up: int) -> Tensor:
        """Put what a function made of the tile, without its halo, into the result for the whole image.

        Args:
            piece: (B, C, …, h, w), of the size of ``outer * up / down``.
            result: of the tiles before, or None if this is the first.
            shape: of the whole image before the function.
        """
        if result is None:
            height, width = (side * up // down for side in shape[-2:])
            result = piece.new_empty(*piece.shape[:-2], height, width)
        whole, part = [], []
        for outer, inner in zip(self.outer[1:], self.inner):
            part.append(slice(inner.start * up // down, inner.stop * up // down))
            start = outer.start * up // down
            whole.append(slice(start + part[-1].start, start + part[-1].stop))
        result[..., whole[0], whole[1]] = piece[..., part[0], part[1]]
        return result


def tiles_of(shape: Sequence[int], tile: tuple[int, int], halo: int) -> Iterator[Tile]:
    """Tiles that cover an image of this shape row by row, each with a halo as far as there is an image."""
    for rows, inner_rows in spans(shape[-2], tile[0], halo):
        for columns, inner_columns in spans(shape[-1], tile[1], halo):
            yield Tile((..., rows, columns), (inner_rows, inner_columns))


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
    result = None
    for place in tiles_of(x.shape, tile, halo):
        result = place.put(function(x[place.outer]), result, x.shape, down, up)
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
    up: int = 1,
) -> Tensor:
    """Apply ``function`` to overlapping tiles of ``x`` and average the results, each weighing less towards its border.

    For functions whose output depends on the whole input, through norms or attention: the result differs from
    ``function(x)`` but has no seams, since weights fall linearly to zero over the overlap. One tile that covers all
    gives ``function(x)`` itself. Every tile has the same size: the last of a row or column is moved back to fit.

    Args:
        x: (B, C, H, W).
        tile: height and width of a tile in pixels of ``x``.
        stride: from one tile to the next, at most ``tile``.
        up: the function maps H to ``H * up``.
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
                overlap = [(size - step) * up for size, step in zip((rows, columns), stride)]
                weight = _ramp(piece.shape[-2], overlap[0], piece)[:, None] * _ramp(piece.shape[-1], overlap[1], piece)
                total = weight.new_zeros(height * up, width * up)
                result = weight.new_zeros(*piece.shape[:-2], *total.shape)
            vertical = slice(top * up, (top + rows) * up)
            horizontal = slice(left * up, (left + columns) * up)
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
