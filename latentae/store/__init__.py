"""Data sets of latents on disk: plan, shards, rows, commit markers; encoding into them and reading them back."""
