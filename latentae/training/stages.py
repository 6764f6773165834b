"""``latentae stages``: a list of recipes in order, each a run of ``latentae fit`` in a process of its own.

A process a stage gives the memory of one back before the next, and lets Lightning launch the ranks of each. What is
done is read from the checkpoints of the runs, so nothing else has to be kept to resume in the middle.
"""

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from latentae.console import say
from latentae.errors import RequestError
from latentae.training.cli import CommandLine, quiet_libraries, step_of
from latentae.training.config import options, read_yaml
from latentae.training.recipes import find_recipe, find_stages

PR_SET_PDEATHSIG = 1
KEYS = ("config", "run_dir", "overrides")
BEFORE = "{before}"  # in overrides: the folder of the run before


@dataclass(frozen=True)
class Stage:
    """One run: its folder and the whole command line of ``latentae fit`` that makes it."""

    run_dir: Path
    arguments: list[str]


def stages_command(argv: list[str]) -> int:
    """Run what is left of the stages that ``argv`` names; returns the exit code of the last one that ran."""
    if not argv or argv[0].startswith("-"):
        raise RequestError("Give the file of stages first: latentae stages FILE. See 'latentae stages --help'.")
    name, *rest = argv
    given = dict(options(rest))
    runs = Path(str(given.pop("runs", "runs")))
    dry_run = given.pop("dry-run", False)
    if own := [key for key in ("config", "c", "run_dir", "ckpt_path") if key in given]:
        raise RequestError(f"--{own[0]} belongs to a single stage: write it into the file, or use 'latentae fit'.")
    common = [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]

    stages = read_stages(find_stages(name), runs, common)
    remaining = [_remaining_steps(number, stage, len(stages)) for number, stage in enumerate(stages, 1)]
    for number, (stage, steps) in enumerate(zip(stages, remaining), 1):
        where = f"stage {number} of {len(stages)}, {stage.run_dir}"
        if steps == 0:
            say(f"{where}: finished.")
            continue
        say(f"{where}: {steps} steps to do.")
        if not dry_run and (code := _run(stage)):
            say(f"{where}: ended with exit code {code}; the same command continues here.")
            return code
    return 0


def read_stages(file: Path, runs: Path, common: list[str]) -> list[Stage]:
    """The stages of a file; every one but the first starts from the run before it, a denoiser with it as its codec.

    Raises:
        RequestError: it is no YAML list of stages, has a key that stages do not have, or a run folder twice.
    """
    try:
        listed = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise RequestError(f"{file} is no list of stages: each is written - {{config: RECIPE, run_dir: FOLDER}}.")
    stages: list[Stage] = []
    for number, entry in enumerate(listed, 1):
        where = f"{file}: stage {number}"
        if unknown := [key for key in entry if key not in KEYS]:
            near = get_close_matches(str(unknown[0]), KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"a stage has {', '.join(KEYS)}."
            raise RequestError(f"{where} has no key {unknown[0]!r}; {hint}")
        if not isinstance(entry.get("config"), str):
            raise RequestError(f"{where} needs a config: a recipe's file or name.")
        run_dir = runs / str(entry.get("run_dir") or Path(entry["config"]).stem)
        if run_dir in [stage.run_dir for stage in stages]:
            raise RequestError(f"{where} has the run_dir {run_dir} of an earlier stage: give it another.")
        overrides = entry.get("overrides") or {}
        if not isinstance(overrides, dict):
            raise RequestError(f"{where}: overrides map options of 'latentae fit' to their values.")
        before = str(stages[-1].run_dir) if stages else BEFORE
        own = [word.replace(BEFORE, before) for word in _as_options(overrides)]
        config = entry["config"] if not (beside := file.parent / entry["config"]).is_file() else str(beside)
        begins = "model.codec" if _trains_denoiser(config) else "model.autoencoder.init_from"
        start = [f"--{begins}={before}"] if stages else []
        stages.append(Stage(run_dir, [f"--config={config}", f"--run_dir={run_dir}", *start, *common, *own]))
    return stages


def _trains_denoiser(config: str) -> bool:
    """Whether a recipe is one of latent diffusion, which takes the run before as its codec."""
    with suppress(RequestError):  # said when the stage is checked
        return "denoiser" in read_yaml(find_recipe(config)).get("model", {})
    return False


def _as_options(overrides: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Overrides, nested or dotted, as options of the command line."""
    words: list[str] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping) and "class_path" not in value:
            words += _as_options(value, f"{prefix}{key}.")
        else:
            words.append(f"--{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}")
    return words


def _remaining_steps(number: int, stage: Stage, count: int) -> int:
    """Steps that a stage still has to do, by its checkpoint; its configuration is checked on the way."""
    with quiet_libraries():
        try:
            cli = CommandLine(stage.arguments)
            last = stage.run_dir / "checkpoints" / "last.ckpt"
            done = step_of(last) if last.is_file() else 0
            if done:
                cli.refuse_changes()
        except RequestError as error:
            raise RequestError(f"stage {number} of {count}: {error}") from error
    if cli.max_steps < 0:
        raise RequestError(f"stage {number} of {count} is endless: set trainer.max_steps.")
    return max(cli.max_steps - done, 0)


def _run(stage: Stage) -> int:
    """One stage in a process of its own, which a SIGTERM of ours ends too; returns its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "latentae", "fit", *stage.arguments], preexec_fn=_end_with_parent)
    outer = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        code = process.wait()
    except KeyboardInterrupt:
        try:
            code = process.wait(timeout=5)  # the terminal sends it to both
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, outer)
    return 128 - code if code < 0 else code


def _end_with_parent() -> None:
    """On Linux, ask for a SIGTERM when the parent dies, also of SIGKILL: an orphan would train on beside a new run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
