"""What a validation measures beside the terms, where the weights for it are at hand."""

from latentae.console import say
from latentae.errors import MissingExtra, MissingWeights
from latentae.metrics.image import LPIPSMetric


def find_lpips() -> dict[str, LPIPSMetric]:
    """LPIPS with AlexNet, as benchmarks report it, by name; nothing, and a line that says so, without its weights."""
    try:
        return {"lpips_alex": LPIPSMetric("alex")}
    except (MissingWeights, MissingExtra) as error:
        say(f"Validation goes without lpips_alex. {error}")
        return {}
