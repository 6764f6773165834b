"""A family as one readable file: its class and all that it needs of this package, copied from their sources.

Such a file lies beside the weights of an exported model, so that stock diffusers opens them where latentae is not
installed. Definitions keep their text, comments and order; only imports of the package are left out.
"""

import ast
import builtins
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from latentae.version import __version__

PACKAGE = "latentae"
LINE_LENGTH = 120

HEADER = '''"""{docstring}

One file that needs diffusers and not latentae, written by ``latentae export --with-code`` from the sources of latentae
{version} (Apache License 2.0); the comments name them.
"""'''

SAVING = '''

def _save_with_code(self, save_directory, **options):
    """As diffusers writes a configuration, with this file beside it, for the folder would not open without."""
    import json
    import shutil
    from pathlib import Path

    from diffusers import ConfigMixin

    ConfigMixin.save_config(self, save_directory, **options)  # by super(), {name} may be another class by now
    path = Path(save_directory, "config.json")
    config = {{**json.loads(path.read_text()), "auto_map": {{"AutoModel": f"{{Path(__file__).stem}}.{name}"}}}}
    path.write_text(json.dumps(config, indent=2) + "\\n")
    shutil.copy(__file__, save_directory)


{name}.save_config = _save_with_code
{name}.__module__ = __name__.rsplit(".", 1)[-1]  # as diffusers is to write it into the index of a pipeline
'''


@dataclass
class Module:
    """The top level of one source file.

    Attributes:
        nodes: functions, classes and constants by name, in their order.
        texts: the lines of each, with the comments before it.
        internal: for each name imported from this package, its module.
        external: for each other imported name, its full dotted path and whether that is a module.
    """

    name: str
    docstring: str
    nodes: dict[str, ast.stmt] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    internal: dict[str, str] = field(default_factory=dict)
    external: dict[str, tuple[str, bool]] = field(default_factory=dict)


def flatten(cls: type) -> str:
    """The source of one file that defines ``cls``, a family, and imports nothing of this package.

    Raises:
        ValueError: the sources cannot be joined: two things of one name, or a statement of an unexpected kind.
    """
    home = cls.__init__.__module__  # type: ignore[misc]  # cls.__module__ is the face of the package
    modules: dict[str, Module] = {}
    _read(home, modules)
    needed = _needed(home, cls.__name__, modules)
    sections = []
    owners: dict[str, str] = {}  # name -> module that defines it
    imports: dict[str, tuple[str, bool]] = {}
    for module in modules.values():
        names = [name for name in module.nodes if (module.name, name) in needed]
        for name in names:
            if name in owners or hasattr(builtins, name):
                raise ValueError(f"{name} of {module.name} is also in {owners.get(name, 'builtins')}: rename one.")
            owners[name] = module.name
            for used in _names_in(module.nodes[name]) & set(module.external):
                path, _ = imports.setdefault(used, module.external[used])
                if path != module.external[used][0]:
                    raise ValueError(f"{used} is {path} in one module and {module.external[used][0]} in {module.name}.")
        if names:
            sections.append(_section(module, names, with_docstring=module.name != home))
    if clash := sorted(set(owners) & set(imports)):
        raise ValueError(f"{clash[0]} of {owners[clash[0]]} is imported from elsewhere in another module: rename one.")
    header = HEADER.format(docstring=modules[home].docstring, version=__version__)
    return "\n".join([header, "", *_import_lines(imports), ""]) + "\n" + "\n\n".join(sections)


def with_saving(cls: type) -> str:
    """`flatten`, and a method that saves the file with the model, which diffusers alone would lose."""
    return flatten(cls) + SAVING.format(name=cls.__name__)


def _read(name: str, modules: dict[str, Module]) -> None:
    """Read a module after those that it imports from this package."""
    if name in modules:
        return
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(source)
    module = Module(name, ast.get_docstring(tree) or "")
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for alias in node.names:
                if alias.asname:
                    raise ValueError(f"{name} imports {alias.name} as {alias.asname}: import it by its own name.")
                module.internal[alias.name] = str(node.module)
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)  # type: ignore[operator]
    end = 0
    for i, node in enumerate(tree.body):
        text = "\n".join(lines[end : node.end_lineno]).strip("\n")
        end = node.end_lineno or end
        if isinstance(node, ast.Import | ast.ImportFrom):
            _add_external(module, node)
        elif defined := _defined_by(node):
            module.nodes |= dict.fromkeys(defined, node)
            module.texts |= dict.fromkeys(defined, text)
        elif not _is_left_out(node, i):
            raise ValueError(f"{name} has a statement in line {node.lineno} that defines nothing: move it.")
    for other in sorted(set(module.internal.values())):
        _read(other, modules)
    modules[name] = module


def _add_external(module: Module, node: ast.Import | ast.ImportFrom) -> None:
    if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == PACKAGE:
        return
    for alias in node.names:
        bound = alias.asname or alias.name
        if isinstance(node, ast.ImportFrom):
            module.external[bound] = f"{node.module}.{alias.name}", False
        elif "." in bound:
            raise ValueError(f"{module.name} imports {bound} without a name for it: write 'import {bound} as ...'.")
        else:
            module.external[bound] = alias.name, True


def _defined_by(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines, if that is what it does."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _is_left_out(node: ast.stmt, position: int) -> bool:
    """Docstrings, which become comments, and ``Family.__module__ = ...``, which holds for the package alone."""
    if position == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    return isinstance(node, ast.Assign) and all(
        isinstance(target, ast.Attribute) and target.attr == "__module__" for target in node.targets
    )


def _needed(home: str, name: str, modules: dict[str, Module]) -> set[tuple[str, str]]:
    """Module and name of all that a definition reaches."""
    found: set[tuple[str, str]] = set()
    open_ends = [(home, name)]
    while open_ends:
        where, name = open_ends.pop()
        module = modules[where]
        if name in module.internal:
            open_ends.append((module.internal[name], name))
        elif name in module.nodes and (where, name) not in found:
            found.add((where, name))
            open_ends += [(where, mentioned) for mentioned in _names_in(module.nodes[name])]
    return found


def _names_in(node: ast.AST) -> set[str]:
    """Every bare name in a piece of code, those of quoted annotations included."""
    names = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    quoted = {child.value for child in ast.walk(node) if isinstance(child, ast.Constant)}
    return names | {text for text in quoted if isinstance(text, str) and text.isidentifier()}


def _section(module: Module, names: list[str], with_docstring: bool) -> str:
    """What is needed of one module, under a comment that says where it is from."""
    origin = f"From {module.name.replace('.', '/')}.py"
    summary = f": {module.docstring.partition(chr(10) * 2)[0]}" if with_docstring else "."
    text = "\n".join(f"# {line}" for line in textwrap.wrap(origin + summary, LINE_LENGTH - 2))
    before: ast.stmt | None = None
    for name in names:
        node = module.nodes[name]
        if node is before:  # a = b = 1
            continue
        constants = isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(node, ast.Assign | ast.AnnAssign)
        text += ("\n" if constants else "\n\n\n") + module.texts[name]
        before = node
    return text + "\n"


def _import_lines(imports: dict[str, tuple[str, bool]]) -> list[str]:
    """Import statements: first of the standard library, then of others."""
    plain: dict[bool, list[str]] = defaultdict(list)
    members: dict[bool, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for bound, (path, is_module) in sorted(imports.items(), key=lambda item: item[1][0]):
        standard = path.split(".")[0] in sys.stdlib_module_names
        if is_module:
            plain[standard].append(f"import {path}" if bound == path else f"import {path} as {bound}")
        else:
            parent, _, name = path.rpartition(".")
            members[standard][parent].append(name if bound == name else f"{name} as {bound}")
    lines = []
    for standard in (True, False):
        lines += plain[standard]
        for parent, names in sorted(members[standard].items()):
            line = f"from {parent} import {', '.join(names)}"
            wrapped = [f"from {parent} import (", *(f"    {name}," for name in names), ")"]
            lines += [line] if len(line) <= LINE_LENGTH else wrapped
        lines += [""]
    return lines[:-1]
