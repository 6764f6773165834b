"""Which worker encodes which shard. Engines are interchangeable, because the files of a store are the truth."""

from latentae.store.engines.local import run_local
from latentae.store.engines.ray import run_ray

__all__ = ["run_local", "run_ray"]
