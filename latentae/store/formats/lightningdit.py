"""LightningDiT (Yao et al. 2025, arXiv 2501.01423): shards of draws, unscaled, and of draws of the mirrored images."""

from typing import Any

import safetensors.torch
import torch

from latentae.store.formats.entries import Entries
from latentae.store.formats.output import OutputFolder, key_table

MOST_ENTRIES = 10_000


def write_lightningdit(entries: Entries, folder: OutputFolder) -> dict[str, Any]:
    """Write ``latents_rank00_shard000.safetensors`` and on, and ``latents_stats.pt``, which its loader would else have
    to compute: mean and standard deviation of each channel, measured on all that is written but the mirrored ones."""
    channels = entries.store.latent_shape[0]
    count, total, squares = 0, torch.zeros(channels).double(), torch.zeros(channels).double()
    with key_table(folder) as keys:
        for number, block in enumerate(entries.blocks(entries.per_file(MOST_ENTRIES))):
            name = f"latents_rank00_shard{number:03d}.safetensors"
            latents = torch.stack([entries.latents(item) for item in block])
            values = latents.transpose(0, 1).flatten(1).double()  # (C, positions)
            count, total, squares = count + values.shape[1], total + values.sum(1), squares + (values**2).sum(1)
            if not folder.has(name):
                tensors = {
                    "latents": latents,
                    "latents_flip": torch.stack([entries.latents(item, flip=True) for item in block]),
                    "labels": torch.tensor([item["label"] for item in block]),
                }
                about = {"total_size": str(len(block)), "dtype": str(latents.dtype), "device": "cpu"}
                with folder.open(name) as stream:
                    stream.write(safetensors.torch.save(tensors, about))
            for row, item in enumerate(block):
                keys.add(item, name, row)
    mean = total / count
    std = ((squares - count * mean**2).clamp(min=0) / (count - 1)).sqrt()
    statistics = {"mean": mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}
    with folder.open("latents_stats.pt") as stream:
        torch.save(statistics, stream)
    return {"statistics": {name: value.flatten().tolist() for name, value in statistics.items()}}
