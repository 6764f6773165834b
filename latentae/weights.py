"""Weight files: where they are looked for, how they are checked, and how they are opened without running code.

A perceptual or feature network is found by its official file name in a folder given by hand (`weights_from`), then in
``$LATENTAE_WEIGHTS``, then in ``$TORCH_HOME/hub/checkpoints``. Nothing is ever downloaded behind the user's back: see
`latentae.bench.fetching` for those who ask.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentae.errors import MissingWeights, RequestError
from latentae.files import sha256_file


@dataclass(frozen=True)
class WeightFile:
    """One published weight file; ``sha256_prefix`` is what is known of its hash, such as its name carries."""

    name: str
    url: str
    sha256_prefix: str
    used_by: str


WEIGHT_FILES = {
    "vgg16": WeightFile(
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af",
        "LPIPS (vgg) and DISTS",
    ),
    "alexnet": WeightFile(
        "alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be79",
        "LPIPS (alex)",
    ),
    "inception": WeightFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
        "rFID, KID, precision and recall",
    ),
    "i3d": WeightFile(
        "i3d_torchscript.pt",
        "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
        # All of it: this file is a program.
        "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
        "rFVD",
    ),
}


_GIVEN: ContextVar[Path | None] = ContextVar("weights_from", default=None)


@contextmanager
def weights_from(folder: str | Path | None) -> Iterator[None]:
    """Within it, look in ``folder`` first; None changes nothing."""
    token = _GIVEN.set(Path(folder).expanduser() if folder else _GIVEN.get())
    try:
        yield
    finally:
        _GIVEN.reset(token)


def search_folders() -> list[Path]:
    """The folders in which weight files are looked for, first match wins."""
    torch_home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    folders = [Path(torch_home).expanduser() / "hub" / "checkpoints"]
    if own := os.environ.get("LATENTAE_WEIGHTS"):
        folders.insert(0, Path(own).expanduser())
    if given := _GIVEN.get():
        folders.insert(0, given)
    return folders


def find_weight_file(name: str, path: str | Path | None = None, *, verify: bool = True) -> Path:
    """The path of a file of `WEIGHT_FILES`, checked against the hash in its name.

    ``path`` skips the search and the check (for weights that are not the published ones; say so in results).

    Raises:
        MissingWeights: it is nowhere, with the file name, the folders and the command that fetches it.
        RequestError: a file of that name is there but is not the published one (truncated, or a web page).
    """
    if path is not None:
        if not Path(path).is_file():
            raise MissingWeights(f"The weight file {path} does not exist.")
        return Path(path)
    wanted = WEIGHT_FILES[name]
    folders = search_folders()
    for folder in folders:
        candidate = folder / wanted.name
        if candidate.is_file():
            if verify and not sha256_file(candidate).startswith(wanted.sha256_prefix):
                raise RequestError(
                    f"{candidate} is not the published file (its sha256 does not start with {wanted.sha256_prefix}): "
                    "delete it and fetch it again."
                )
            return candidate
    raise MissingWeights(
        f"{wanted.name}, of {wanted.used_by}, is not found in {' or '.join(map(str, folders))}: fetch it with "
        f"'curl -L --create-dirs -o {folders[0] / wanted.name} {wanted.url}' or by bench --fetch-weights."
    )


def open_state_dict(path: str | Path) -> dict[str, Any]:
    """Load tensors from safetensors, or from a PyTorch file with ``weights_only=True``: code in it never runs.

    Raises:
        MissingWeights: there is no such file.
        RequestError: the file is a pickle that holds more than tensors, or is damaged.
    """
    import pickle
    import warnings

    import torch

    path = Path(path)
    if not path.is_file():
        raise MissingWeights(f"The weight file {path} does not exist.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise RequestError(f"{path} is not a whole safetensors file ({error}): copy or fetch it again.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols, before the file is refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{path} is a pickle that holds more than tensors and opening it could run code, so it is refused: "
            "convert it to safetensors where you trust it."
        ) from error
    except PermissionError:
        raise
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise RequestError(f"{path} cannot be read as a checkpoint ({error}): copy or fetch it again.") from error
