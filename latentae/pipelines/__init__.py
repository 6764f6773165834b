"""diffusers pipelines of latent diffusions that were trained here, and their folders."""

from latentae.pipelines.export import dit_pipeline, export_pipeline, flow_pipeline
from latentae.pipelines.flow import ClassConditionalFlowPipeline
from latentae.pipelines.planes import PlaneFlowPipeline

__all__ = ["ClassConditionalFlowPipeline", "PlaneFlowPipeline", "dit_pipeline", "export_pipeline", "flow_pipeline"]
