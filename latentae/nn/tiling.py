"""Running a stack of convolutions tile by tile with a halo, so that the result equals the whole-image one."""

from collections.abc import Callable

from torch import Tensor


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
    for top in range(0, height, tile[0]):
        bottom = min(top + tile[0], height)
        y0, y1 = max(top - halo, 0), min(bottom + halo, height)
        for left in range(0, width, tile[1]):
            right = min(left + tile[1], width)
            x0, x1 = max(left - halo, 0), min(right + halo, width)
            piece = function(x[..., y0:y1, x0:x1])
            if result is None:
                result = piece.new_empty(*piece.shape[:2], height * up // down, width * up // down)
            piece = piece[..., (top - y0) * up // down : (bottom - y0) * up // down, :]
            piece = piece[..., (left - x0) * up // down : (right - x0) * up // down]
            result[..., top * up // down : bottom * up // down, left * up // down : right * up // down] = piece
    assert result is not None
    return result
