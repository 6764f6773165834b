"""Planes of a video's latents and the forms they are packed into: tokens, a mosaic, or a volume.

A clip whose latents would be a volume (T, H, W) is held as K spatial planes xy1 … xyK (H, W) and two spatio-temporal
ones, xt (T, W) and yt (T, H): K·H·W + T·(H + W) positions instead of T·H·W. An image is xy1 alone.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from latentae.errors import RequestError

Kind = Literal["tokens", "mosaic", "volume"]


@dataclass(frozen=True)
class PlaneLayout:
    """Where the planes of a clip stand in each packed form; nothing about their statistics.

    The canonical form is ``tokens``, (B, N, C): the positions of xy1, …, xyK, xt, yt one after the other, row by row.

    ========== ============================== ======================================================================
    form       shape                          planes
    ========== ============================== ======================================================================
    ``tokens`` (B, N, C)                      in order
    ``mosaic`` (B, C, K·H + 2·T, max(H, W))   one below the other; what is narrower than the mosaic ends in zeros
    ``volume`` (B, (K + 2)·C, T, H, W)        each constant along the axis that it lacks; of an image all but xy1 zero
    ========== ============================== ======================================================================

    Args:
        t, h, w: of the volume of latents; ``t`` of 1 is an image.
        planes: K, the number of spatial planes.
        channels: C, of each plane.
    """

    t: int
    h: int
    w: int
    planes: int = 2
    channels: int = 8

    def __post_init__(self) -> None:
        if min(self.t, self.h, self.w, self.planes, self.channels) < 1:
            raise RequestError(f"A PlaneLayout needs sides, planes and channels of at least 1, not {self}.")

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each plane, by name, in order."""
        if self.t == 1:
            return {"xy1": (self.h, self.w)}
        spatial = {f"xy{k + 1}": (self.h, self.w) for k in range(self.planes)}
        return {**spatial, "xt": (self.t, self.w), "yt": (self.t, self.h)}

    @property
    def num_tokens(self) -> int:
        """K·H·W + T·(H + W); H·W of an image."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def mosaic_shape(self) -> tuple[int, int]:
        return sum(rows for rows, _ in self.shapes.values()), max(columns for _, columns in self.shapes.values())

    @property
    def volume_channels(self) -> int:
        return (self.planes + 2) * self.channels

    @cached_property
    def types(self) -> Tensor:
        """The plane of each token, (N,): 0 for xy1 … K - 1 for xyK, K for xt, K + 1 for yt."""
        of_plane = [*range(self.planes), self.planes, self.planes + 1][: len(self.shapes)]
        return torch.cat([torch.full((rows * cols,), k) for k, (rows, cols) in zip(of_plane, self.shapes.values())])

    @cached_property
    def ids(self) -> Tensor:
        """The position (t, y, x) of each token, (N, 3), float.

        What a plane has no position along is in the middle; the spatial planes are spread evenly over the time.
        """
        found = []
        for name, (rows, columns) in self.shapes.items():
            row, column = torch.meshgrid(torch.arange(float(rows)), torch.arange(float(columns)), indexing="ij")
            middle_y, middle_x = ((torch.full_like(row, (side - 1) / 2)) for side in (self.h, self.w))
            if name == "xt":
                position = (row, middle_y, column)
            elif name == "yt":
                position = (row, column, middle_x)
            else:
                share = (int(name[2:]) - 1) / (self.planes - 1) if self.planes > 1 and self.t > 1 else 0.5
                position = (torch.full_like(row, share * (self.t - 1)), row, column)
            found.append(torch.stack(position, dim=-1).flatten(0, 1))  # (rows * columns, 3)
        return torch.cat(found)

    def split(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens (B, N, C) to planes by name, each (B, C, rows, columns)."""
        self._check(tokens, (self.num_tokens, self.channels), "tokens")
        parts = tokens.transpose(1, 2).split([rows * columns for rows, columns in self.shapes.values()], dim=2)
        return {name: part.unflatten(2, shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def join(self, planes: dict[str, Tensor]) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([planes[name].flatten(2) for name in self.shapes], dim=2).transpose(1, 2)  # (B, N, C)

    def pack(self, x: Tensor, kind: Kind) -> Tensor:
        """Tokens (B, N, C) to another form.

        Raises:
            RequestError: ``x`` has another shape, or there is no such form.
        """
        planes = self.split(x)
        if kind == "tokens":
            return x
        if kind == "mosaic":
            width = self.mosaic_shape[1]
            padded = [torch.nn.functional.pad(plane, (0, width - plane.shape[-1])) for plane in planes.values()]
            return torch.cat(padded, dim=2)  # (B, C, K·H + 2·T, max(H, W))
        self._check_kind(kind)
        volumes = [self.spread(name, plane) for name, plane in planes.items()]
        if self.t == 1:
            volumes.append(volumes[0].new_zeros(len(x), self.volume_channels - self.channels, 1, self.h, self.w))
        return torch.cat(volumes, dim=1)  # (B, (K + 2)·C, T, H, W)

    def unpack(self, x: Tensor, kind: Kind) -> Tensor:
        """What `pack` gave to tokens (B, N, C); of any other volume the mean along the axis that a plane lacks.

        Raises:
            RequestError: ``x`` is packed for another layout, or there is no such form.
        """
        if kind == "tokens":
            self._check(x, (self.num_tokens, self.channels), kind)
            return x
        if kind == "mosaic":
            self._check(x, (self.channels, *self.mosaic_shape), kind)
            rows = x.split([rows for rows, _ in self.shapes.values()], dim=2)
            return self.join(
                {name: part[..., :columns] for (name, (_, columns)), part in zip(self.shapes.items(), rows)}
            )
        self._check_kind(kind)
        self._check(x, (self.volume_channels, self.t, self.h, self.w), kind)
        axis = {"xt": 3, "yt": 4}
        parts = x.split(self.channels, dim=1)
        return self.join({name: part.mean(axis.get(name, 2)) for name, part in zip(self.shapes, parts)})

    def spread(self, name: str, plane: Tensor) -> Tensor:
        """A view of a plane (B, D, rows, columns), of any channels, along the axis that it lacks: (B, D, T, H, W)."""
        axis = {"xt": 3, "yt": 4}.get(name, 2)
        return plane.unsqueeze(axis).expand(-1, -1, self.t, self.h, self.w)

    def of_tokens(self, values: Tensor) -> Tensor:
        """Values for each channel of a volume, ((K + 2)·C,), as values for each token, (N, C)."""
        return values.view(-1, self.channels)[self.types.to(values.device)]

    def _check(self, x: Tensor, shape: tuple[int, ...], kind: str) -> None:
        if tuple(x.shape[1:]) != shape:
            expected = ", ".join(["B", *map(str, shape)])
            raise RequestError(
                f"{kind} of shape {tuple(x.shape)} are packed for another layout: latents of {self.t} x {self.h} x "
                f"{self.w} with {self.planes} spatial planes of {self.channels} channels are ({expected})."
            )

    def _check_kind(self, kind: str) -> None:
        if kind != "volume":
            raise RequestError(f"There is no packed form {kind!r}; choose tokens, mosaic or volume.")
