"""Opening autoencoders from wherever they are, and writing them where stock diffusers opens them.

``load`` takes a folder, a hub id, a run of ``latentae fit``, one of its checkpoints, or a DC-AE checkpoint in the
format of its authors. ``export`` writes DC-AE and stock classes as stock folders that need no latentae.
"""

import hashlib
import os
import pickle
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import is_accelerate_available
from torch import Tensor, nn

from latentae.errors import MissingWeights, RequestError
from latentae.families.base import Autoencoder
from latentae.families.dcae import DCAE
from latentae.families.presets import PRESETS, create, family_class, find_preset
from latentae.files import read_json, write_json
from latentae.weights import open_state_dict

CHECKPOINT_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".safetensors"}
LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
STOCK_CLASS = {"DCAE": "AutoencoderDC"}  # what stock diffusers calls a family of ours


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
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.suffix.lower() in CHECKPOINT_SUFFIXES:
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
        f"load the published ones with the hub id {hub_id}" if hub_id else "train it with 'latentae fit' and load the run"
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
    if "model_name" in config and "_class_name" not in config:
        return _load_efficientvit(folder / "model.safetensors", config=find_preset(config["model_name"]).config)
    cls = _model_class(config.get("_class_name"), folder)
    try:
        return cls.from_pretrained(folder, low_cpu_mem_usage=is_accelerate_available()).eval()
    except pickle.UnpicklingError as error:
        raise RequestError(f"The weights in {folder} are a pickle that could run code, so they are refused.") from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingWeights(f"{folder} has a configuration but no readable weights: {reason}") from error
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"{folder} cannot be opened as {cls.__name__}: {reason}") from error


def _model_class(name: str | None, where: Path) -> Any:
    """The class that opens a configuration: one of ours, our counterpart of a stock class, or the stock class."""
    for family, stock in STOCK_CLASS.items():
        if name == stock:
            return family_class(family)
    if name in {preset.family for preset in PRESETS.values()}:
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
    if "latentae" in state:
        return _from_training_checkpoint(state, path)
    return _load_efficientvit(path, state=state)


def _from_training_checkpoint(checkpoint: dict[str, Any], path: Path) -> Any:
    about = checkpoint["latentae"]
    autoencoder = _model_class(about["class_name"], path).from_config(about["config"])
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


# --- checkpoints of the DC-AE authors (efficientvit, DC-Gen) -----------------------------------------------------

# Substrings of their keys and ours, applied in this order.
EFFICIENTVIT_KEYS = [
    ("main.", ""),
    ("op_list.", ""),
    ("context_module", "attn"),
    ("local_module", "conv_out"),
    ("aggreg.0.0", "to_qkv_multiscale.0.proj_in"),
    ("aggreg.0.1", "to_qkv_multiscale.0.proj_out"),
    ("depth_conv.conv", "conv_depth"),
    ("inverted_conv.conv", "conv_inverted"),
    ("point_conv.conv", "conv_point"),
    ("point_conv.norm", "norm"),
    ("conv.conv.", "conv."),
    ("conv1.conv", "conv1"),
    ("conv2.conv", "conv2"),
    ("conv2.norm", "norm"),
    ("proj.norm", "norm_out"),
    ("encoder.project_in.", "encoder.conv_in."),
    ("encoder.project_out.0.conv", "encoder.conv_out"),
    ("encoder.project_out.conv", "encoder.conv_out"),
    ("encoder.stages", "encoder.down_blocks"),
    ("decoder.project_in.conv", "decoder.conv_in"),
    ("decoder.project_in.0.conv", "decoder.conv_in"),
    ("decoder.project_out.0", "decoder.norm_out"),
    ("decoder.project_out.2.", "decoder.conv_out."),
    ("decoder.stages", "decoder.up_blocks"),
]


def convert_efficientvit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an efficientvit or DC-Gen DC-AE under the names of our `DCAE` (and ``AutoencoderDC``).

    Raises:
        RequestError: the keys are not those of such a checkpoint.
    """
    if not any(key.startswith("encoder.stages.") for key in state):
        raise RequestError("This checkpoint is neither one of 'latentae fit' nor a DC-AE of its authors.")
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        for theirs, ours in EFFICIENTVIT_KEYS:
            key = key.replace(theirs, ours)
        # a plain convolution at full resolution carries one level less than a resampling block
        key = re.sub(r"(encoder\.conv_in|decoder\.conv_out)\.conv\.(?=weight|bias)", r"\1.conv.", key)
        if key.endswith(".qkv.conv.weight"):
            for name, third in zip(("to_q", "to_k", "to_v"), value[:, :, 0, 0].chunk(3)):
                converted[key.replace("qkv.conv", name)] = third.clone()
        elif key.endswith(".proj.conv.weight"):
            converted[key.replace("proj.conv", "to_out")] = value[:, :, 0, 0].clone()
        else:
            converted[key] = value
    return converted


def _load_efficientvit(
    path: Path, *, state: dict[str, Tensor] | None = None, config: dict[str, Any] | None = None
) -> DCAE:
    state = open_state_dict(path) if state is None else state
    state = state.get("state_dict", state)  # type: ignore[assignment]
    weights = convert_efficientvit(state)
    return dcae_from_weights(weights, config).eval()


def dcae_from_weights(weights: dict[str, Tensor], config: dict[str, Any] | None = None) -> DCAE:
    """A `DCAE` around weights that come without a configuration."""
    weights = _name_outer_convolutions(weights)
    autoencoder = DCAE(**(config or infer_dcae_config(weights)))
    missing, unexpected = autoencoder.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise RequestError(f"This DC-AE checkpoint does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}.")
    return autoencoder


def _name_outer_convolutions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``conv_in`` and ``conv_out`` are plain convolutions where a stage at full resolution exists, else blocks."""
    renamed = {}
    for key, value in weights.items():
        half, name = key.split(".")[:2]
        stages = "down_blocks.0." if half == "encoder" else "up_blocks.0."
        outer = (half, name) in {("encoder", "conv_in"), ("decoder", "conv_out")}
        if outer and any(k.startswith(f"{half}.{stages}") for k in weights):
            key = key.replace(".conv.", ".")
        renamed[key] = value
    return renamed


def infer_dcae_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Read a DC-AE configuration off its weights.

    Shapes give widths, depths, block types, norms, resampling and attention scales. What leaves no trace follows the
    published families: BatchNorm goes with ReLU; nets of residual blocks alone end in SiLU; and if even their deepest
    encoder stages are residual blocks they have no shortcut around the latent. ``scaling_factor`` is that of the first
    preset with this architecture, or 1.
    """

    def half(name: str, blocks: str) -> dict[str, Any]:
        stages: dict[int, dict[int, set[str]]] = {}
        for key in weights:
            if match := re.match(rf"{name}\.{blocks}\.(\d+)\.(\d+)\.(.+)", key):
                stages.setdefault(int(match[1]), {}).setdefault(int(match[2]), set()).add(match[3])
        count = max(stages) + 1
        kinds, depths, norms, scales, widths = [], [], [], [], []
        for i in range(count):
            inner = stages.get(i, {})
            residual = [j for j, keys in inner.items() if "conv1.weight" in keys]
            attention = [j for j, keys in inner.items() if "attn.to_q.weight" in keys]
            kinds.append("EfficientViTBlock" if attention else "ResBlock")
            depths.append(len(residual) + len(attention))
            prefix = f"{name}.{blocks}.{i}.{(residual + attention or [0])[0]}"
            norms.append("batch_norm" if f"{prefix}.norm.running_mean" in weights else "rms_norm")
            kernel = weights.get(f"{prefix}.attn.to_qkv_multiscale.0.proj_in.weight")
            scales.append(() if kernel is None else (kernel.shape[-1],))
            width = weights.get(f"{prefix}.conv1.weight", weights.get(f"{prefix}.attn.to_out.weight"))
            widths.append(None if width is None else width.shape[0])
        widths[0] = widths[0] or widths[1] // 2  # type: ignore[operator]  # unused where the depth is zero
        return dict(kinds=kinds, depths=depths, norms=norms, scales=scales, widths=widths)

    encoder, decoder = half("encoder", "down_blocks"), half("decoder", "up_blocks")
    latent_channels = weights["encoder.conv_out.weight"].shape[0]
    first_down = next(v for k, v in weights.items() if re.fullmatch(r"encoder\.down_blocks\.\d+\.\d+\.conv\.weight", k))
    first_up = next(v for k, v in weights.items() if re.fullmatch(r"decoder\.up_blocks\.\d+\.0\.conv\.weight", k))
    down_stage = next(i for i, d in enumerate(encoder["depths"]) if d)
    up_stage = next(i for i, d in enumerate(decoder["depths"]) if d)
    head = next((v for k, v in weights.items() if k.endswith("to_qkv_multiscale.0.proj_out.weight")), None)
    attention = "EfficientViTBlock" in encoder["kinds"]
    config = dict(
        latent_channels=latent_channels,
        attention_head_dim=32 if head is None else head.shape[1],
        encoder_block_types=tuple(encoder["kinds"]),
        decoder_block_types=tuple(decoder["kinds"]),
        encoder_block_out_channels=tuple(encoder["widths"]),
        decoder_block_out_channels=tuple(decoder["widths"]),
        encoder_layers_per_block=tuple(encoder["depths"]),
        decoder_layers_per_block=tuple(decoder["depths"]),
        encoder_qkv_multiscales=tuple(encoder["scales"]),
        decoder_qkv_multiscales=tuple(decoder["scales"]),
        downsample_block_type="conv" if first_down.shape[0] == encoder["widths"][down_stage + 1] else "pixel_unshuffle",
        upsample_block_type="interpolate" if first_up.shape[0] == decoder["widths"][up_stage] else "pixel_shuffle",
        decoder_norm_types=tuple(decoder["norms"]),
        decoder_act_fns=tuple("relu" if norm == "batch_norm" else "silu" for norm in decoder["norms"]),
        encoder_out_shortcut=attention,
        decoder_in_shortcut=attention,
        decoder_conv_act_fn="relu" if "EfficientViTBlock" in decoder["kinds"] else "silu",
    )
    return {**config, "scaling_factor": _published_scaling_factor(weights)}


def _published_scaling_factor(weights: dict[str, Tensor]) -> float:
    shapes = {key: value.shape for key, value in weights.items()}
    for name, preset in PRESETS.items():
        if preset.family == "DCAE" and preset.hub_id:
            with torch.device("meta"):
                candidate = create(name).state_dict()
            if {key: value.shape for key, value in candidate.items()} == shapes:
                return preset.config["scaling_factor"]
    return 1.0


# --- writing -----------------------------------------------------------------------------------------------------


def export(autoencoder: nn.Module, folder: str | Path) -> str:
    """Save an autoencoder so that stock diffusers opens it where that is possible; returns the class it opens as.

    DC-AE becomes ``AutoencoderDC``; stock classes stay what they are. Weights are safetensors.
    """
    model: Any = autoencoder
    folder = Path(folder)
    model.save_pretrained(folder)
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
