"""diffusers pipelines of latent diffusions that were trained here, and their folders."""

from latentae.pipelines.export import dit_pipeline, export_pipeline, flow_pipeline
from latentae.pipelines.flow import ClassConditionalFlowPipeline

__all__ = ["ClassConditionalFlowPipeline", "dit_pipeline", "export_pipeline", "flow_pipeline"]
