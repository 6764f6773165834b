"""Recipes and options as one configuration whose keys are checked against the classes that they configure.

jsonargparse parses and types the configuration; this gives a misspelt key or class its one line, which names the key
and the nearest right one, before jsonargparse sees it, and shortens what jsonargparse says about values to one line.
"""

import collections.abc
import importlib
import inspect
import re
import types
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from latentae.errors import RequestError
from latentae.training.recipes import find_recipe

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
NULL = ("null", "~", "")  # as text


def with_recipe_files(argv: list[str]) -> list[str]:
    """The command line with every ``--config NAME`` replaced by the recipe's file, before all other options.

    An option is over a recipe wherever it stands.
    """
    recipes, result = [], []
    for name, value in options(argv):
        if name in ("config", "c"):
            if value is True:
                raise RequestError("--config needs a recipe: a file or the name of a shipped one.")
            recipes.append(f"--config={find_recipe(str(value))}")
        else:
            result.append(f"--{name}" if value is True else f"--{name}={value}")
    return recipes + result


def options(argv: list[str]) -> Iterator[tuple[str, str | bool]]:
    """The options of a command line by name without dashes; True for those without a value.

    Raises:
        RequestError: a word that belongs to no option.
    """
    words = list(argv)
    while words:
        word = words.pop(0)
        if not re.match(r"--?[a-zA-Z]", word):
            raise RequestError(f"{word!r} belongs to no option: options are written --name value.")
        name, equals, value = word.lstrip("-").partition("=")
        if equals:
            yield name, value
        elif words and not re.match(r"--?[a-zA-Z]", words[0]):
            yield name, words.pop(0)
        else:
            yield name, True


def merge(argv: list[str]) -> dict[str, Any]:
    """Files and options, later ones over earlier ones, as one nested mapping; values of options stay text."""
    config: dict[str, Any] = {}
    for name, value in options(argv):
        if name == "config":
            _update(config, read_yaml(Path(str(value))))
        else:
            _set(config, name.split("."), value)
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file.

    Raises:
        RequestError: it is no YAML, or no mapping.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise RequestError(f"{path} is no recipe: it must map keys such as model, data and trainer to their values.")
    return config


def _update(config: dict[str, Any], later: Mapping[str, Any]) -> None:
    for key, value in later.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            _update(config[key], value)
        else:
            config[key] = value


def _set(node: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a dotted key; the ``init_args`` of a class may be left out of the path, as jsonargparse allows."""
    if "class_path" in node and path[0] not in CLASS_KEYS:
        node = node.setdefault("init_args", {})
    key = path[0].removesuffix("+")
    child = node.get(key)
    if len(path) == 1:
        node[key] = [*node.get(key, []), value] if path[0].endswith("+") else _with_class_of(child, value)
        return
    if isinstance(child, list) and child:  # arguments of the class that was appended last
        child[-1] = child = {"class_path": child[-1]} if isinstance(child[-1], str) else child[-1]
    elif isinstance(child, str):  # a class that was given by name alone
        child = node[key] = {"class_path": child}
    elif not isinstance(child, dict):
        child = node[key] = {}
    _set(child, path[1:], value)


def _with_class_of(before: Any, value: Any) -> Any:
    """A mapping of arguments in one option keeps the class that they are for, as jsonargparse does."""
    if isinstance(before, dict) and "class_path" in before and isinstance(value, str) and value.startswith("{"):
        with suppress(yaml.YAMLError):
            arguments = yaml.safe_load(value)
            if "class_path" not in arguments:
                return {"class_path": before["class_path"], "init_args": arguments.get("init_args", arguments)}
    return value


def check_keys(config: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse keys that nothing knows.

    Args:
        known: the top-level keys, each with the class that it configures, or None for a plain value.

    Raises:
        RequestError: naming the first such key or class and the nearest right one.
    """
    for key, value in config.items():
        if key not in known:
            raise _unknown(key, "", known)
        if known[key] is not None and isinstance(value, Mapping):
            _check_arguments(value, known[key], f"{key}.")


def check_left_out(argv: list[str]) -> None:
    """Refuse an option that leaves out a term of the objective which no recipe has: a misspelt name.

    Raises:
        RequestError: naming the term and the nearest right one.
    """
    terms = merge([word for word in argv if word.startswith("--config=")])["model"]["objective"]
    for name, value in options(argv):
        path = name.split(".")
        if path[:-1] == ["model", "objective"] and value in NULL and path[-1] not in terms:
            raise _unknown(path[-1], "model.objective.", terms)


def _check_arguments(arguments: Mapping[str, Any], cls: Any, where: str) -> None:
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    hints = get_type_hints(cls.__init__)
    for key, value in arguments.items():
        if key not in parameters:
            raise _unknown(key, where, parameters)
        _check_value(value, hints.get(key), f"{where}{key}")


def _check_value(value: Any, annotation: Any, where: str) -> None:
    """Check what stands where a class, or a list or mapping of classes, may stand; plain values pass."""
    if isinstance(value, str) and value.startswith(("{", "[")):  # a mapping or a list in one option
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RequestError(f"{where} is not YAML: {value}.") from error
    kinds = list(_alternatives(annotation))
    for kind in kinds:
        if get_origin(kind) is dict and isinstance(value, Mapping):
            for name, inner in value.items():
                _check_value(inner, get_args(kind)[1], f"{where}.{name}")
            return
    bases = [base for kind in kinds for base in _classes(kind)]
    ours = [base for base in bases if base.__module__ not in ("builtins", "typing")]
    if not ours:
        return
    if isinstance(value, list):
        for inner in value:
            _check_value(inner, annotation, where)
    elif isinstance(value, str) and len(ours) == len(bases) and value not in NULL:
        _find_class(value, ours, where)
    elif isinstance(value, Mapping) and "class_path" in value:
        if wrong := [key for key in value if key not in CLASS_KEYS]:
            raise _unknown(wrong[0], f"{where}.", CLASS_KEYS)
        cls = _find_class(value["class_path"], ours, where)
        _check_arguments(value.get("init_args") or {}, cls, f"{where}.")
    elif isinstance(value, Mapping) and inspect.isabstract(ours[0]):
        choices = {cls.__name__ for cls in _subclasses(ours[0])}
        raise RequestError(f"{where} names no class; {_listed(choices)}")
    elif isinstance(value, Mapping) and "init_args" not in value:
        _check_arguments(value, ours[0], f"{where}.")


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union."""
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member)
    else:
        yield annotation


def _classes(annotation: Any) -> Iterator[type]:
    """The class itself, that of a list's elements, or that of what a factory makes."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is collections.abc.Callable:
        yield from _classes(inner[-1])
    elif isinstance(origin, type) and inner and issubclass(origin, collections.abc.Iterable) and origin is not dict:
        for member in _alternatives(inner[0]):
            yield from _classes(member)
    elif isinstance(annotation, type) and annotation is not types.NoneType:
        yield annotation


def _find_class(name: Any, bases: list[type], where: str) -> Any:
    """The class of a full path, or of a short name among the subclasses of ``bases``."""
    module, _, attribute = str(name).rpartition(".")
    if module:
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise RequestError(f"{where} names the class {name!r}, which cannot be imported.") from error
    known = {cls.__name__: cls for base in bases for cls in (base, *_subclasses(base))}
    if name not in known:
        raise _unknown(name, f"{where} names a class; ", known)
    return known[name]


def _subclasses(cls: type) -> list[type]:
    direct: list[type] = cls.__subclasses__()
    return direct + [further for subclass in direct for further in _subclasses(subclass)]


def _unknown(key: Any, where: str, known: Any) -> RequestError:
    names = [name for name in known if name != "self"]
    near = get_close_matches(str(key), names, n=1)
    hint = f"did you mean {near[0]}?" if near else _listed(names)
    place = f"{where}{key}" if not where.endswith(" ") else f"{where}{key!r}"
    return RequestError(f"{place} is unknown; {hint}")


def _listed(names: Collection[str]) -> str:
    public = sorted(name for name in names if not name.startswith("_"))
    return f"known are {', '.join(public[:30])}{' and others' if len(public) > 30 else ''}."


def explain_value(message: str) -> str:
    """One line out of jsonargparse's account of a value of the wrong type, or of a class without what it needs."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    if missing := re.search(r"class_path '[\w.]*?(\w+)':\s+the following arguments are required: (.*)$", message, re.M):
        return f"{'.'.join(keys)}: {missing[1]} needs {missing[2]}."
    message = re.sub(r"\n  - Expected a path but .*", "", message)  # where a list may also be a file of lines
    expected = re.findall(r"Expected an? (?:<class ')?(.+?)(?:'>)?(?:\. Got value: .*)?$", message, flags=re.M)
    got = re.search(r"(?:Got value|Given value): (.*)$", message, flags=re.M)
    if not (keys and expected and got):
        return " ".join(message.split())
    names = [name.removeprefix("typing.").replace("NoneType", "null") for name in expected]
    return f"{'.'.join(keys)} expects {' or '.join(dict.fromkeys(names))}, got {got[1]}."
