"""Finding a recipe, or a list of stages, by its name: a file, or one of those that are shipped."""

from difflib import get_close_matches
from pathlib import Path

from latentae.errors import RequestError

# in an installed wheel, and in a checkout
FOLDERS = [Path(__file__).parents[1] / "_recipes", Path(__file__).parents[2] / "recipes"]
STAGES = ".stages"  # before the .yaml of a list of stages


def recipe_names() -> list[str]:
    """The shipped recipes, such as ``demo`` and ``dcae/f32c32-phase1``."""
    return [name for name in _names() if not name.endswith(STAGES)]


def stages_names() -> list[str]:
    """The shipped lists of stages, such as ``dcae/f32c32``."""
    return [name.removesuffix(STAGES) for name in _names() if name.endswith(STAGES)]


def find_recipe(name: str) -> Path:
    """The file of a recipe: ``name`` itself if it is a file, else the shipped one of that name.

    Raises:
        RequestError: there is neither.
    """
    return _find(name, "recipe", "", recipe_names())


def find_stages(name: str) -> Path:
    """The file of a list of stages: ``name`` itself if it is a file, else the shipped one of that name.

    Raises:
        RequestError: there is neither.
    """
    return _find(name, "list of stages", STAGES, stages_names())


def _names() -> list[str]:
    paths = ((folder, path) for folder in FOLDERS for path in folder.rglob("*.yaml"))
    return sorted({path.relative_to(folder).with_suffix("").as_posix() for folder, path in paths})


def _find(name: str, kind: str, ending: str, names: list[str]) -> Path:
    if Path(name).is_file():
        return Path(name)
    for folder in FOLDERS:
        if (shipped := folder / f"{name.removesuffix('.yaml').removesuffix(ending)}{ending}.yaml").is_file():
            return shipped
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the shipped ones are {', '.join(names)}."
    raise RequestError(f"There is no file and no {kind} {name!r}; {hint}")
