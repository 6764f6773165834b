"""Finding a recipe by its name: a file, or one of those that are shipped."""

from difflib import get_close_matches
from pathlib import Path

from latentae.errors import RequestError

# in an installed wheel, and in a checkout
FOLDERS = [Path(__file__).parents[1] / "_recipes", Path(__file__).parents[2] / "recipes"]


def recipe_names() -> list[str]:
    """The shipped recipes, such as ``demo`` and ``dcae/f32c32-phase1``."""
    return sorted(
        {path.relative_to(folder).with_suffix("").as_posix() for folder in FOLDERS for path in folder.rglob("*.yaml")}
    )


def find_recipe(name: str) -> Path:
    """The file of a recipe: ``name`` itself if it is a file, else the shipped one of that name.

    Raises:
        RequestError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    for folder in FOLDERS:
        if (shipped := folder / f"{name.removesuffix('.yaml')}.yaml").is_file():
            return shipped
    names = recipe_names()
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the shipped ones are {', '.join(names)}."
    raise RequestError(f"There is no file and no recipe {name!r}; {hint}")
