"""The exponential moving average of a model's weights, for validation and for use after training."""

import torch
from torch import Tensor, nn


class ModelEMA:
    """Averages the trained parameters of a model; frozen ones and buffers stay those of the model.

    Update n (from 0) moves the average by ``1 - min(decay, (1 + n) / (10 + n))`` of its distance to the weights, so
    that short runs are not dominated by the initial weights. Lightning's own averaging copies discriminator and
    perceptual networks too and miscounts steps with two optimizers, hence this one.

    Args:
        model: already on its device; its parameters are averaged in their own dtype.
        decay: what remains of the average at each update once it has warmed up, such as 0.999.
        updates: how many the model's present weights have seen, if they are an earlier run's average, which then goes
            on where it was instead of warming up again.
    """

    def __init__(self, model: nn.Module, decay: float, updates: int = 0):
        self.model = model
        self.decay = decay
        self.updates = updates
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        self.updates += 1

    def use_average(self) -> None:
        """Put the average into the model; the weights wait until `use_weights`."""
        if not self.swapped:
            self._exchange()

    def use_weights(self) -> None:
        """Put the weights back into the model."""
        if self.swapped:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data
        self.swapped = not self.swapped

    def state_dict(self) -> dict[str, Tensor]:
        """A whole state dict of the model with the average in place of the trained parameters."""
        return {**self.model.state_dict(), **self.average}

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        for name, average in self.average.items():
            average.copy_(state[name])
        self.updates = updates
