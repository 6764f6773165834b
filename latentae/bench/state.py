"""What a half-done measurement knows, as bytes: to continue it after a kill, and to bring the parts of several
processes together.

Everything that was counted is taken: numbers, tensors, lists, torchmetrics Metrics, and the objects of this package
that hold them. What only works (networks, codecs, functions) is not: the receiver has its own, in the same places.
Reading runs no code of the bytes: only this package's classes and plain containers are made.
"""

import importlib
import io
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from latentae.codec import LatentCodec
from latentae.errors import RequestError

REDUCTIONS = "torchmetrics.utilities.data"
PLAIN = (type(None), bool, int, float, str, bytes, Tensor, np.ndarray, torch.device, torch.dtype, torch.Size, type)
CONTAINERS = {
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("torch", "device"),
    ("torch", "Size"),
    ("torch", "float16"),
    ("torch", "bfloat16"),
    ("torch", "float32"),
    ("torch", "float64"),
    ("torch", "int64"),
}


def dump_state(root: Any) -> bytes:
    """The state of an object and of all it holds."""
    stream, graph = io.BytesIO(), io.BytesIO()
    pickler = _Pickler(graph, _working_parts(root))
    pickler.dump(root)
    torch.save({"graph": torch.frombuffer(bytearray(graph.getvalue()), dtype=torch.uint8), **pickler.parts}, stream)
    return stream.getvalue()


def load_state(data: bytes, fresh: Any) -> Any:
    """What `dump_state` gave, with the networks, codecs and functions of ``fresh``, which was built the same way.

    Raises:
        RequestError: the bytes are damaged, or not of this version.
    """
    try:
        parts = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        graph = io.BytesIO(parts.pop("graph").numpy().tobytes())
        return _Unpickler(graph, {path: part for path, part in _working_parts(fresh)}, parts).load()
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, AttributeError, ImportError) as error:
        raise RequestError(f"The saved state cannot be read ({error}).") from error


def merge(mine: Any, theirs: Any) -> Any:
    """Bring the state of two processes together: what both counted, whole; returns ``mine``, or theirs if None.

    Metrics merge by their reductions, objects by their ``merge`` or else attribute by attribute, dictionaries key by
    key; of anything else ``mine`` stands.
    """
    if mine is None:
        return theirs
    if theirs is None:
        return mine
    if isinstance(mine, Metric):
        mine.merge_state(theirs)
    elif hasattr(mine, "merge"):
        mine.merge(theirs)
    else:
        merge_attributes(mine, theirs)
    return mine


def merge_attributes(mine: Any, theirs: Any) -> None:
    """`merge` for all that an object or a dictionary holds."""
    ours, others = (x if isinstance(x, dict) else vars(x) if _is_ours(x) else {} for x in (mine, theirs))
    for name, value in others.items():
        if not isinstance(value, PLAIN) and (isinstance(value, dict | Metric) or _is_ours(value)):
            ours[name] = merge(ours.get(name), value)


def metrics_of(root: Any) -> Iterator[Metric]:
    """All torchmetrics Metrics that an object holds."""
    for _, part in _walk(root, "", set()):
        if isinstance(part, Metric):
            yield part


def _is_ours(value: Any) -> bool:
    of_package = type(value).__module__.startswith("latentae.")
    return isinstance(value, Metric) or (of_package and not isinstance(value, nn.Module | LatentCodec))


def _working_parts(root: Any) -> list[tuple[str, Any]]:
    return [(path, part) for path, part in _walk(root, "", set()) if not _is_ours(part)]


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Paths and objects, without what is plain: containers are walked through, working parts are not walked into."""
    if isinstance(value, PLAIN) or getattr(value, "__module__", "") == REDUCTIONS or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, list | tuple | set):
        members: list[tuple[Any, Any]] = [*enumerate(value)]
    elif isinstance(value, dict):
        members = [*value.items()]
    else:
        yield path, value
        members = [*_state_of(value).items()] if _is_ours(value) else []
    for name, member in members:
        yield from _walk(member, f"{path}/{name}", seen)


def _state_of(value: Any) -> dict[str, Any]:
    return value.__getstate__() if isinstance(value, Metric) else vars(value)


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, working: list[tuple[str, Any]]):
        super().__init__(stream, protocol=4)
        self.working = {id(part): path for path, part in working}
        self.kept = [part for _, part in working]  # so that no id is given to another
        self.parts: dict[str, Any] = {}

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Tensor | np.ndarray):
            tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
            name = f"tensor {len(self.parts)}"
            # Sums that are still empty are half of what a Fréchet distance holds.
            is_empty = tensor.numel() > 1000 and not tensor.any()
            self.parts[name] = [tensor.dtype, list(tensor.shape)] if is_empty else tensor.clone()
            return ("tensor" if isinstance(value, Tensor) else "array", name)
        path = self.working.get(id(value))
        return None if path is None else ("working", path)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, working: dict[str, Any], parts: dict[str, Any]):
        super().__init__(stream)
        self.working, self.parts = working, parts

    def persistent_load(self, identity: Any) -> Any:
        kind, name = identity
        if kind == "working":
            return self.working[name]
        part = self.parts[name]
        tensor = torch.zeros(part[1], dtype=part[0]) if isinstance(part, list) else part
        return tensor if kind == "tensor" else tensor.numpy()

    def find_class(self, module: str, name: str) -> Any:
        is_reduction = module == REDUCTIONS and name.startswith("dim_zero_")
        if (module, name) in CONTAINERS or is_reduction:
            return getattr(importlib.import_module(module), name)
        if module.startswith("latentae.") and "." not in name:
            found = getattr(importlib.import_module(module), name)
            if isinstance(found, type) and found.__module__.startswith("latentae."):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
