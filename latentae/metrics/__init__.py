"""Metrics of reconstructions: every one takes the same pair of uint8 images and runs in full precision."""
