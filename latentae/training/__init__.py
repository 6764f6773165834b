"""Training with Lightning: one module for every family, its data, callbacks and command line."""
