"""Terms on the latents themselves."""

from typing import Literal

from torch import Tensor

from latentae.errors import RequestError
from latentae.nn.precision import widen
from latentae.objectives.terms import Step, Term


class KL(Term):
    """KL divergence of the posterior from N(0, I), in nats per latent element.

    The mean over all elements makes the weight independent of image size and channels. Other codebases sum over pixels
    and over latents and divide by the batch. A step of LDM (also EQ-VAE, VA-VAE, WF-VAE, VidTok) minimises

        sum((L1 + p LPIPS) / exp(logvar) + logvar) / B + k sum(KL) / B + a λ adversarial

    with p = 1, k = 1e-6, a = 0.5, logvar = 0 and never trained, and LDM's adaptive λ. Divided by the pixel elements of
    an image, its gradients are those of this recipe:

        l1:    {class_path: L1, init_args: {weight: 1.0}}                        # 1 / exp(logvar)
        lpips: {class_path: LPIPS, init_args: {weight: 1.0}}                     # p / exp(logvar)
        kl:    {class_path: KL, init_args: {weight: 1.0e-6, reduction: ldm}}     # k
        adversary: {weight: 0.5, adaptive: true}                                 # a; a constant weight w there is
                                                                                 # w / pixel elements here

    Adam ignores the common factor; clipping and a constant adversarial weight do not.

    Args:
        reduction: ``mean``, or ``ldm`` for a weight published for LDM's sums: it counts ``latent elements / pixel
            elements`` times, so that 1e-6 at f8c4 becomes 2.1e-8. The logged value is in nats per element either way.

    Raises:
        RequestError: the autoencoder is deterministic, its posterior has no variance.
    """

    needs_reconstruction = False

    def __init__(self, weight: float = 1.0, reduction: Literal["mean", "ldm"] = "mean"):
        super().__init__(weight)
        self.reduction = reduction

    def weight_in(self, step: Step) -> float:
        if self.reduction == "mean":
            return self.weight
        return self.weight * step.posterior.mean.numel() / step.target.numel()

    def measure(self, step: Step) -> Tensor:
        posterior = step.posterior
        if not hasattr(posterior, "logvar"):
            raise RequestError(
                f"KL needs a Gaussian posterior, this autoencoder gives {type(posterior).__name__}: "
                "leave the kl term out of model.objective."
            )
        mean, logvar = widen(posterior.mean), widen(posterior.logvar)
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
