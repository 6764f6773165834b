"""Opening, converting and writing autoencoders."""

from latentae.loading.efficientvit import convert_efficientvit, dcae_from_weights, infer_dcae_config
from latentae.loading.export import export, export_with_code, weights_hash
from latentae.loading.opening import load, load_model

__all__ = [
    "convert_efficientvit",
    "dcae_from_weights",
    "export",
    "export_with_code",
    "infer_dcae_config",
    "load",
    "load_model",
    "weights_hash",
]
