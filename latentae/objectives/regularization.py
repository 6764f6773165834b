"""Terms on the latents themselves."""

from torch import Tensor

from latentae.errors import RequestError
from latentae.nn.precision import widen
from latentae.objectives.terms import Step, Term


class KL(Term):
    """KL divergence of the posterior from N(0, I), in nats per latent element.

    The mean over all elements makes the weight independent of image size and channels. Weights published for LDM's
    reduction (sum over pixels and latents, divided by the batch) become ``weight * latent elements / pixel elements``:
    LDM's 1e-6 at f8c4 is 2.1e-8 here.

    Raises:
        RequestError: the autoencoder is deterministic, its posterior has no variance.
    """

    def measure(self, step: Step) -> Tensor:
        posterior = step.posterior
        if not hasattr(posterior, "logvar"):
            raise RequestError(
                f"KL needs a Gaussian posterior, this autoencoder gives {type(posterior).__name__}: "
                "leave the kl term out of model.objective."
            )
        mean, logvar = widen(posterior.mean), widen(posterior.logvar)
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
