"""Opening an autoencoder from wherever it is: a folder, a hub id, a run of ``latentae fit``, one of its checkpoints, or
a DC-AE checkpoint in the format of its authors.
"""

import logging
import os
import pickle
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import is_accelerate_available

from latentae.errors import MissingWeights, RequestError
from latentae.families.presets import PRESETS, create, family_class, find_preset
from latentae.files import read_json
from latentae.loading.efficientvit import load_efficientvit
from latentae.loading.export import STOCK_CLASS
from latentae.nn.padding import PADDING_KEY, set_padding_mode
from latentae.weights import open_state_dict

CHECKPOINT_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".safetensors"}
LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
DIFFUSION_KEY = "latentae_diffusion"  # of checkpoints that hold a denoiser of latents: latentae/loading/diffusion.py


def load(source: str | Path) -> Any:
    """Open an autoencoder, in eval mode on the CPU.

    Args:
        source: a folder with ``config.json`` (ours or any diffusers autoencoder) or ``model_index.json`` (its
            ``vae``), a run folder or checkpoint of ``latentae fit`` (averaged weights if it has them), a DC-AE
            checkpoint of its authors, a hub id, or the name of a ``*-tiny`` preset.

    Returns:
        A diffusers model; ``AutoencoderDC`` folders open as our `DCAE`.

    Raises:
        MissingWeights: nothing there, or a published preset whose weights must be fetched first.
        RequestError: something there that is no autoencoder, or a pickle that could run code.
    """
    name, path = str(source), Path(source)
    if path.is_dir():
        return load_folder(path)
    if path.is_file():
        return load_file(path)
    if name in PRESETS:
        if PRESETS[name].is_tiny:
            return create(name)
        raise _preset_without_weights(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        return load_folder(_fetch_from_hub(name))
    if "/" not in name and "." not in path.suffix.lower():
        find_preset(name)  # explains what is near
    raise MissingWeights(f"There is no file, folder, preset or hub id {name!r}: check the spelling.")


def load_model(source: str | Path, *, random_weights: bool = False) -> Any:
    """What commands open with ``--model``: `load`, or any preset with random weights where the user says so."""
    if random_weights and str(source) in PRESETS:
        return create(str(source))
    return load(source)


def _preset_without_weights(name: str) -> MissingWeights:
    hub_id = find_preset(name).hub_id
    where = (
        f"load the published ones with the hub id {hub_id}"
        if hub_id
        else "train it with 'latentae fit' and load the run"
    )
    return MissingWeights(
        f"The preset {name} has no weights on its own: {where}, or ask for random weights (--random-weights, create())."
    )


def load_folder(folder: Path) -> Any:
    """Open a folder: a model, a pipeline's ``vae``, a run, or a hub folder of the DC-AE authors."""
    if (folder / "model_index.json").is_file() and (folder / "vae").is_dir():
        return load_folder(folder / "vae")
    if (folder / LAST_CHECKPOINT).is_file():
        return load_file(folder / LAST_CHECKPOINT)
    if not (folder / "config.json").is_file():
        raise MissingWeights(f"{folder} holds no autoencoder: no config.json, model_index.json or {LAST_CHECKPOINT}.")
    try:
        config = read_json(folder / "config.json")
    except ValueError as error:
        raise RequestError(f"{folder / 'config.json'} is not JSON ({error}): fetch or write it again.") from error
    if not isinstance(config, dict):
        raise RequestError(
            f"{folder / 'config.json'} is not the configuration of a model: it holds no names and values."
        )
    for pickled in folder.glob("diffusion_pytorch_model*.bin") if not list(folder.glob("*.safetensors")) else []:
        open_state_dict(pickled)  # says what is wrong with a pickle better than what follows
    if "model_name" in config and "_class_name" not in config:
        name = str(config["model_name"])
        return load_efficientvit(open_state_dict(folder / "model.safetensors"), name if name in PRESETS else None)
    cls = _model_class(config.get("_class_name"), folder)
    diffusers_log = logging.getLogger("diffusers.configuration_utils")
    level = diffusers_log.level
    try:
        if PADDING_KEY in config:
            diffusers_log.setLevel(logging.ERROR)  # it would say that it ignores the key
        return _padded(cls.from_pretrained(folder, low_cpu_mem_usage=is_accelerate_available()).eval(), config)
    except pickle.UnpicklingError as error:
        raise RequestError(f"The weights in {folder} are a pickle that could run code, so they are refused.") from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingWeights(f"{folder} has a configuration but no readable weights: {reason}") from error
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"{folder} cannot be opened as {cls.__name__}: {reason}") from error
    finally:
        diffusers_log.setLevel(level)


def _padded(autoencoder: Any, config: dict[str, Any]) -> Any:
    """The autoencoder with its convolutions padding as the configuration says."""
    if PADDING_KEY in config:
        set_padding_mode(autoencoder, config[PADDING_KEY])
    return autoencoder


def _model_class(name: str | None, where: Path) -> Any:
    """The class that opens a configuration: one of ours, our counterpart of a stock class, or the stock class."""
    for family, stock in STOCK_CLASS.items():
        if name == stock:
            return family_class(family)
    if name in [preset.family for preset in PRESETS.values()]:
        return family_class(str(name))
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin) and hasattr(cls, "decode")):
        raise RequestError(f"{where} says it is a {name}, which is no autoencoder of latentae or diffusers.")
    return cls


def load_file(path: Path) -> Any:
    """Open a checkpoint of ``latentae fit`` or one of the DC-AE authors."""
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise RequestError(f"{path} is not a checkpoint; expected one of {', '.join(sorted(CHECKPOINT_SUFFIXES))}.")
    state = open_state_dict(path)
    if not isinstance(state, dict):
        raise RequestError(f"{path} is not a checkpoint of an autoencoder: it holds no tensors by name.")
    if DIFFUSION_KEY in state:
        raise _denoiser_instead(path, state[DIFFUSION_KEY].get("autoencoder"))
    try:
        return _from_training_checkpoint(state, path) if "latentae" in state else load_efficientvit(state)
    except RequestError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"{path} cannot be rebuilt into an autoencoder ({type(error).__name__}: {reason})."
        ) from error


def _denoiser_instead(path: Path, autoencoder: str | None) -> RequestError:
    instead = f"open its autoencoder, {autoencoder}" if autoencoder else "open the autoencoder of its latents"
    return RequestError(
        f"{path} holds a denoiser of latents, not an autoencoder: {instead}, or make a pipeline of the run with "
        "'latentae export'."
    )


def _from_training_checkpoint(checkpoint: dict[str, Any], path: Path) -> Any:
    about = checkpoint["latentae"]
    config = {key: value for key, value in about["config"].items() if key != PADDING_KEY}
    autoencoder = _padded(_model_class(about["class_name"], path).from_config(config), about["config"])
    weights = checkpoint.get("latentae_ema") or {
        key.removeprefix("autoencoder."): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith("autoencoder.")
    }
    autoencoder.load_state_dict(weights)
    return autoencoder.eval()


def _fetch_from_hub(repo: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    offline = not _hub_is_reachable()  # then the cache alone: the hub client would retry for half a minute
    try:
        try:
            hf_hub_download(repo, "config.json", local_files_only=offline)
            patterns = ["config.json", "*.safetensors*"]
            return Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=offline))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return Path(snapshot_download(repo, allow_patterns=["vae/*"], local_files_only=offline)) / "vae"
    except Exception as error:  # the hub client raises its own, requests' and httpx's errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingWeights(
            f"{repo!r} is neither a folder here nor to be had from the hub ({reason}): check the name, or download it "
            "where there is a network and give the folder."
        ) from error


def _hub_is_reachable() -> bool:
    from huggingface_hub.constants import ENDPOINT

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # a proxy resolves names for us
    try:
        return bool(socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None))
    except OSError:
        return False
