"""latentae: train, benchmark, run and export the autoencoders of latent diffusion.

The face of the package. Everything is imported on first use, so that ``import latentae`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from latentae.version import __version__

if TYPE_CHECKING:
    from latentae.bench.run import bench
    from latentae.codec import LatentCodec
    from latentae.denoisers.denoiser import ClassEmbedder
    from latentae.denoisers.planes import PlaneTransformer
    from latentae.families.base import Autoencoder
    from latentae.families.dcae import DCAE
    from latentae.families.dito import DiTo
    from latentae.families.fourplane import FourPlane
    from latentae.families.litevae import LiteVAE
    from latentae.families.presets import create, presets
    from latentae.families.swycc import SWYCC
    from latentae.loading import load
    from latentae.pipelines.flow import ClassConditionalFlowPipeline
    from latentae.pipelines.planes import PlaneFlowPipeline
    from latentae.store.encode import encode_dataset
    from latentae.store.reader import LatentStore
    from latentae.store.streaming import ShardShuffle, StreamedLatents

# public name -> module that defines it. ModelMixin is here for diffusers, whose pipeline loader asks a component's
# library for it before it believes that the library's classes can be loaded.
_HOME = {
    "Autoencoder": "latentae.families.base",
    "ClassConditionalFlowPipeline": "latentae.pipelines.flow",
    "ClassEmbedder": "latentae.denoisers.denoiser",
    "DCAE": "latentae.families.dcae",
    "DiTo": "latentae.families.dito",
    "FourPlane": "latentae.families.fourplane",
    "LatentCodec": "latentae.codec",
    "LatentStore": "latentae.store.reader",
    "LiteVAE": "latentae.families.litevae",
    "ModelMixin": "diffusers",
    "PlaneFlowPipeline": "latentae.pipelines.planes",
    "PlaneTransformer": "latentae.denoisers.planes",
    "SWYCC": "latentae.families.swycc",
    "ShardShuffle": "latentae.store.streaming",
    "StreamedLatents": "latentae.store.streaming",
    "bench": "latentae.bench.run",
    "create": "latentae.families.presets",
    "encode_dataset": "latentae.store.encode",
    "load": "latentae.loading",
    "presets": "latentae.families.presets",
}

__all__ = [
    "DCAE",
    "SWYCC",
    "Autoencoder",
    "ClassConditionalFlowPipeline",
    "ClassEmbedder",
    "DiTo",
    "FourPlane",
    "LatentCodec",
    "LatentStore",
    "LiteVAE",
    "PlaneFlowPipeline",
    "PlaneTransformer",
    "ShardShuffle",
    "StreamedLatents",
    "__version__",
    "bench",
    "create",
    "encode_dataset",
    "load",
    "presets",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
