"""Where the weights of a run come from: a preset, a published model, or an earlier stage."""

import inspect
from difflib import get_close_matches
from typing import Any

from torch import nn

from latentae.console import say
from latentae.errors import RequestError
from latentae.families.presets import create, family_class, find_preset
from latentae.loading import load

SOURCES = ("preset", "pretrained")


def build_autoencoder(description: dict[str, Any], seed: int = 0) -> nn.Module:
    """The autoencoder that ``model.autoencoder`` describes.

    Args:
        description: ``{preset: NAME, **changed arguments}`` or ``{pretrained: FOLDER or hub id}``, either with
            ``init_from``: anything that `latentae.load` opens.
        seed: of a preset's random weights.

    Raises:
        RequestError: neither or both of the two, or a key that the family does not have.
    """
    arguments = dict(description)
    init_from = arguments.pop("init_from", None)
    named = [source for source in SOURCES if source in arguments]
    if len(named) != 1:
        near = [key for key in arguments if get_close_matches(key, SOURCES, n=1)]
        got = f"{near[0]!r}, which is neither" if near and not named else ", ".join(sorted(arguments)) or "nothing"
        raise RequestError(f"model.autoencoder needs either preset or pretrained; it has {got}.")
    source = arguments.pop(named[0])
    known = _arguments_of(source) if named == ["preset"] else []
    for key in arguments:
        if key not in known:
            near = get_close_matches(key, [*known, *SOURCES, "init_from"], n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise RequestError(f"model.autoencoder has no key {key!r} for {named[0]} {source}{hint}")
    autoencoder = create(source, seed=seed, **arguments) if named == ["preset"] else load(source)
    if init_from is not None:
        take_weights(autoencoder, load(init_from), str(init_from))
    return autoencoder


def _arguments_of(preset: str) -> list[str]:
    family = family_class(find_preset(preset).family)
    return [name for name in inspect.signature(family.__init__).parameters if name != "self"]


def take_weights(autoencoder: nn.Module, earlier: nn.Module, name: str) -> None:
    """Copy every tensor of ``earlier`` that fits by name and shape, and say which did not.

    Raises:
        RequestError: none fits.
    """
    own, given = autoencoder.state_dict(), earlier.state_dict()
    fitting = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise RequestError(f"init_from {name} shares no tensor with this autoencoder: it is of another architecture.")
    autoencoder.load_state_dict(fitting, strict=False)
    left = [key for key in own if key not in fitting]
    say(
        f"init_from {name}: took {len(fitting)} of {len(own)} tensors"
        + (f"; random still: {', '.join(left[:5])}{' …' if len(left) > 5 else ''}" if left else "")
    )
