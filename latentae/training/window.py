"""The batches of one optimizer step."""

from torch import Tensor


class Window:
    """Sums the values of the batches that make one step; a resumed run starts an unfinished window anew."""

    def __init__(self) -> None:
        self.batches = 0
        self.samples = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor], samples: int) -> None:
        """Take in the values of one batch, which saw ``samples`` images on all ranks."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self.batches += 1
        self.samples += samples

    def means(self) -> dict[str, Tensor]:
        """Each value averaged over the batches."""
        return {name: value / self.batches for name, value in self._sums.items()}
