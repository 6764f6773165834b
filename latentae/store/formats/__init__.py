"""Stores of latents in the layouts that other people's loaders open: one small file for each family of layouts."""

from latentae.store.formats.export import FORMATS, ExportSummary, export_store

__all__ = ["FORMATS", "ExportSummary", "export_store"]
