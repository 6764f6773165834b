"""Where the weights of a run come from: a preset, a stock class, a published model, or an earlier stage."""

import inspect
from collections import Counter
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from latentae.console import say
from latentae.errors import RequestError
from latentae.families.presets import create, family_class, find_preset
from latentae.loading import load
from latentae.loading.inflation import inflate
from latentae.loading.opening import LAST_CHECKPOINT
from latentae.nn.padding import padding_mode, set_padding_mode
from latentae.training.distillation import take_decoder, take_encoder, with_decoder_arguments, with_encoder_arguments
from latentae.weights import open_state_dict

OPTIONS = ("init_from", "decoder_of", "encoder_of", "inflate", "padding_mode")
HALVES = {
    "decoder_of": ("LiteVAE", with_decoder_arguments, take_decoder),
    "encoder_of": ("DiTo", with_encoder_arguments, take_encoder),
}
SOURCES = {"preset": "name of a preset", "pretrained": "folder or hub id to start from", "diffusers": "class"}


def build_autoencoder(description: dict[str, Any], seed: int = 0) -> nn.Module:
    """The autoencoder that ``model.autoencoder`` describes.

    Args:
        description: ``{preset: NAME, **changed arguments}`` or ``{diffusers: CLASS, **arguments}`` for random weights,
            or ``{pretrained: FOLDER or hub id}``; each with ``init_from``: anything that `latentae.load` opens, of
            runs the averaged weights. A preset of LiteVAE also with ``decoder_of``: an AutoencoderKL, AutoencoderTiny
            or LiteVAE, whose decoder and whose latents' shape and scale it then has; a preset of DiTo with
            ``encoder_of``: an AutoencoderKL; a preset of FourPlane with ``inflate``: an AutoencoderKL, whose weights it
            begins with and whose widths, layers and channels it has. ``padding_mode: reflect`` lets every convolution
            reflect its borders; left out, it is that of the weights that are taken.
        seed: of random weights.

    Raises:
        RequestError: none or several of the three, a key that the class does not have, a decoder that it cannot have.
    """
    arguments = dict(description)
    given = {key: arguments.pop(key, None) for key in OPTIONS}
    init_from, padding = given["init_from"], given["padding_mode"]
    named = [source for source in SOURCES if source in arguments]
    if len(named) != 1:
        near = [key for key in arguments if get_close_matches(key, SOURCES, n=1)]
        got = f"{near[0]!r}, which is neither" if near and not named else ", ".join(sorted(arguments)) or "nothing"
        raise RequestError(f"model.autoencoder needs one of {', '.join(SOURCES)}; it has {got}.")
    kind, source = named[0], arguments.pop(named[0])
    if source is None:
        raise RequestError(f"model.autoencoder.{kind} is not set: give the {SOURCES[kind]}.")
    make = _maker(kind, source)
    known = [] if make is None else [name for name in inspect.signature(make.__init__).parameters if name != "self"]
    for key in arguments:
        if key not in known:
            near = get_close_matches(key, [*known, *SOURCES, *OPTIONS], n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise RequestError(f"model.autoencoder has no key {key!r} for {kind} {source}{hint}")
    teacher, take = None, take_decoder
    for option, (family, with_arguments, take_half) in HALVES.items():
        if given[option] is None:
            continue
        if getattr(make, "__name__", None) != family:
            raise RequestError(f"model.autoencoder.{option} needs a preset of {family} beside it, not {kind} {source}.")
        teacher, take = load(given[option]), take_half
        arguments = with_arguments(arguments, teacher, str(given[option]))
    image: Any = None
    if given["inflate"] is not None:
        if getattr(make, "__name__", None) != "FourPlane":
            raise RequestError(f"model.autoencoder.inflate needs a preset of FourPlane beside it, not {kind} {source}.")
        image = load(given["inflate"])
        arguments = {**_nets_of(image), **arguments}
    if make is None:
        autoencoder = load(source)
    elif kind == "preset":
        autoencoder = create(source, seed=seed, **arguments)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            autoencoder = make(**arguments).eval()
    if image is not None:
        taken, names = inflate(autoencoder, image), len(autoencoder.state_dict())
        say(f"inflate {given['inflate']}: took {len(taken)} of {names} tensors, as much as there is to take.")
    earlier = load(init_from) if init_from is not None else None
    if earlier is not None:
        take_weights(autoencoder, earlier, str(init_from))
    if teacher is not None:
        take(autoencoder, teacher)
    if padding is None and any(padding_mode(model) == "reflect" for model in (earlier, teacher) if model is not None):
        padding = "reflect"
    if padding is not None:
        set_padding_mode(autoencoder, padding)
    return autoencoder


def _nets_of(image: Any) -> dict[str, Any]:
    """Arguments of a FourPlane with the networks of an AutoencoderKL; of another class none, which is then refused."""
    if type(image).__name__ != "AutoencoderKL":
        return {}
    same = ("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention")
    return {"plane_channels": image.config["latent_channels"], **{name: image.config[name] for name in same}}


def _maker(kind: str, source: str) -> Any:
    """The class that random weights are made for; None where weights are read."""
    if kind == "preset":
        return family_class(find_preset(source).family)
    if kind == "diffusers":
        classes = [name for name in dir(diffusers) if name.startswith("Autoencoder") or name == "VQModel"]
        if source not in classes:
            near = get_close_matches(source, classes, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; AutoencoderKL is one."
            raise RequestError(f"model.autoencoder.diffusers: {source!r} is no autoencoder of diffusers{hint}")
        return getattr(diffusers, source)
    return None


def ema_updates_of(description: dict[str, Any]) -> int:
    """How many updates the averaged weights have seen that a run starts from; 0 if it starts from no average."""
    source = Path(str(description.get("init_from") or description.get("pretrained")))
    checkpoint = source / LAST_CHECKPOINT if source.is_dir() else source
    if checkpoint.suffix != ".ckpt" or not checkpoint.is_file():
        return 0
    progress = open_state_dict(checkpoint).get("latentae_progress", {})
    return int(progress.get("ema_updates", 0))


def take_weights(autoencoder: nn.Module, earlier: nn.Module, name: str) -> None:
    """Copy every tensor of ``earlier`` that fits by name and shape, and say how many of each part, and which not.

    Raises:
        RequestError: none fits.
    """
    own, given = autoencoder.state_dict(), earlier.state_dict()
    fitting = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise RequestError(f"init_from {name} shares no tensor with this autoencoder: it is of another architecture.")
    autoencoder.load_state_dict(fitting, strict=False)
    parts = Counter(key.split(".")[0] for key in own)
    taken = Counter(key.split(".")[0] for key in fitting)
    left = [key for key in own if key not in fitting]
    say(
        f"init_from {name}: took {len(fitting)} of {len(own)} tensors ("
        + ", ".join(f"{part} {taken[part]} of {count}" for part, count in parts.items())
        + (f"); left as they were: {', '.join(left[:5])}{' …' if len(left) > 5 else ''}" if left else ")")
    )
