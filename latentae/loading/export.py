"""Writing an autoencoder where stock diffusers opens it, and the hash that names its weights."""

import errno
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from latentae.families.base import Autoencoder
from latentae.files import read_json, write_json

STOCK_CLASS = {"DCAE": "AutoencoderDC"}  # what stock diffusers calls a family of ours


def export(autoencoder: nn.Module, folder: str | Path) -> str:
    """Save an autoencoder so that stock diffusers opens it where that is possible; returns the class it opens as.

    DC-AE becomes ``AutoencoderDC``; stock classes stay what they are. Weights are safetensors.
    """
    model: Any = autoencoder
    folder = Path(folder)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # hides the operating system's error in its text
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error
        raise
    name = type(model).__name__
    if isinstance(model, Autoencoder) and name in STOCK_CLASS:
        config = read_json(folder / "config.json")
        config["_class_name"] = STOCK_CLASS[name]
        write_json(folder / "config.json", config)
        return STOCK_CLASS[name]
    return name


def weights_hash(autoencoder: nn.Module) -> str:
    """sha256 over the names, types, shapes and values of all weights and buffers, whatever file they came from."""
    digest = hashlib.sha256()
    for key, value in sorted(autoencoder.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
