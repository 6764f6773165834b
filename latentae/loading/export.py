"""Writing an autoencoder where stock diffusers opens it, and the hash that names its weights."""

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from latentae.errors import RequestError
from latentae.families.base import Autoencoder
from latentae.files import read_json, write_json
from latentae.loading.card import write_card
from latentae.loading.flattening import with_saving
from latentae.nn.padding import padding_mode, set_padding_mode

STOCK_CLASS = {"DCAE": "AutoencoderDC"}  # what stock diffusers calls a family of ours


def export(autoencoder: nn.Module, folder: str | Path, *, with_code: bool = False) -> str:
    """Save an autoencoder so that stock diffusers opens it where that is possible; returns the class it opens as.

    DC-AE becomes ``AutoencoderDC``; stock classes stay what they are. A family that diffusers does not have, and a
    DC-AE with a quantiser or statistics of each channel, is saved under its own name, which ``latentae.load`` opens.
    Weights are safetensors; a model card says how to open them. What pads by reflection keeps its class, but only
    ``latentae.load`` restores the padding; stock diffusers warns that it does not know the key of the configuration.

    Args:
        with_code: put the code of such a family beside its weights, so that ``diffusers.AutoModel`` opens the folder
            with ``trust_remote_code=True`` where latentae is not installed.
    """
    cls = type(autoencoder).__name__
    if isinstance(autoencoder, Autoencoder) and cls in STOCK_CLASS and _is_stock(autoencoder):
        _save(autoencoder, Path(folder), {"_class_name": STOCK_CLASS[cls]})
        write_card(autoencoder, Path(folder), STOCK_CLASS[cls], code=None)
        return STOCK_CLASS[cls]
    if isinstance(autoencoder, Autoencoder) and with_code:
        export_with_code(autoencoder, folder)
        return cls
    _save(autoencoder, Path(folder), {})
    write_card(autoencoder, Path(folder), cls, code=None)
    return cls


def _is_stock(autoencoder: Autoencoder) -> bool:
    """Whether diffusers' class of the same architecture computes the same."""
    plain = autoencoder.quantize is None and autoencoder.config["latents_mean"] is None
    return plain and padding_mode(autoencoder) == "zeros"


def export_with_code(autoencoder: Autoencoder, folder: str | Path) -> Path:
    """Save one of our families with its code in one file, which ``config.json`` names; returns that file.

    ``diffusers.AutoModel.from_pretrained(folder, trust_remote_code=True)`` opens the folder without latentae, which
    opens it too and then uses its own code. The file is never called ``latentae.py``: pipelines would take it for the
    package.
    """
    cls = type(autoencoder)
    if padding_mode(autoencoder) != "zeros":
        raise RequestError(
            f"Reflect padding is no part of the code of {cls.__name__}: export it without code; latentae.load opens it."
        )
    code = Path(folder, f"modeling_{cls.__name__.lower()}.py")
    _save(autoencoder, Path(folder), {"auto_map": {"AutoModel": f"{code.stem}.{cls.__name__}"}})
    code.write_text(with_saving(cls), encoding="utf-8")
    write_card(autoencoder, Path(folder), cls.__name__, code.name)
    return code


def _save(autoencoder: nn.Module, folder: Path, changes: dict[str, Any]) -> None:
    """Write weights, in the form for use after training, and configuration, with entries of the latter changed."""
    model: Any = autoencoder.folded() if isinstance(autoencoder, Autoencoder) else autoencoder
    if model is not autoencoder and padding_mode(autoencoder) != "zeros":
        set_padding_mode(model, padding_mode(autoencoder))
    with full_disks(folder):
        model.save_pretrained(folder)
    if changes:
        write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})


@contextmanager
def full_disks(folder: Path) -> Iterator[None]:
    """Within it, a full disk is the OSError that it is, which safetensors hides in the text of an error of its own."""
    try:
        yield
    except SafetensorError as error:
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error
        raise


def weights_hash(autoencoder: nn.Module) -> str:
    """sha256 over the names, types, shapes and values of all weights and buffers, whatever file they came from."""
    digest = hashlib.sha256()
    for key, value in sorted(autoencoder.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
