"""The command line: finds the command, runs it, and turns errors into one sentence and an exit code.

Only the standard library is imported here and by the command files, so that ``--help`` answers at once.
"""

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from latentae.errors import LatentAEError, ResumableError, explain_os_error
from latentae.version import __version__

COMMANDS = {
    "demo": "train, encode, decode and benchmark a small autoencoder on bundled photos, offline",
    "fit": "train an autoencoder from a recipe; the same command again resumes",
    "stages": "train by a list of recipes in order; the same command again resumes in the middle",
    "validate": "measure a trained checkpoint on held-out images",
    "plan": "decide what goes into which shard of a store; --dry-run says what it will take",
    "encode": "turn images or videos into a store of latents; killed and resumed at will",
    "decode": "turn a store of latents back into images or videos",
    "verify": "hash a store again, and its inputs",
    "reconstruct": "send images or videos through an autoencoder and back",
    "bench": "measure autoencoders by one stated protocol and write a report",
    "probe": "say how easy a latent space is to model, by a small diffusion model (experimental)",
    "export": "save a trained autoencoder as a diffusers folder, or a store for other people's loaders",
    "info": "say what a model, a run or a store is",
    "presets": "list every named configuration",
}
ARGV_COMMANDS = {"fit", "stages", "validate"}  # these hand their arguments to Lightning's own parser


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest option."""

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = get_close_matches(word.split("=")[0], known, n=1)
            message = f"{word} is not an option of {self.prog}" + (f"; did you mean {near[0]}?" if near else "")
        end = "" if message.endswith("?") else "."
        print(f"error: {message.rstrip('.')}{end} See '{self.prog} --help'.", file=sys.stderr)
        raise SystemExit(2)


def print_help() -> None:
    width = max(map(len, COMMANDS))
    print(
        "usage: latentae COMMAND [OPTIONS]\n\nTrain, benchmark, run and export the autoencoders of latent diffusion.\n"
    )
    print("commands:")
    for name, summary in COMMANDS.items():
        print(f"  {name.ljust(width)}  {summary}")
    print(
        "\n'latentae COMMAND --help' explains a command. Start with 'latentae demo'.\n"
        "--debug shows the traceback of an error; --version prints the version.\n\n"
        "exit codes: 0 done, 1 a bug of ours, 2 the request cannot be met as given, 3 the inputs or the data are bad\n"
        "beyond the allowed number, 4 stopped but resumable, 130 and 143 interrupted or terminated"
    )


def run_command(name: str, argv: list[str]) -> int:
    module = importlib.import_module(f"latentae.cli.{name}")
    if name in ARGV_COMMANDS:
        if "-h" in argv or "--help" in argv:
            module.print_help()
            return 0
        return int(module.run_argv(argv))
    parser = Parser(
        prog=f"latentae {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(argv)))


def find_command(word: str) -> str:
    if word in COMMANDS:
        return word
    near = get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "'latentae --help' lists them."
    print(f"error: {word!r} is not a command; {hint}", file=sys.stderr)
    raise SystemExit(2)


def _terminate(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)  # unwinds like any exception, so files are closed and workers stopped


def explain(error: Exception) -> LatentAEError | None:
    """The error as one of ours, or None for a bug."""
    if isinstance(error, LatentAEError):
        return error
    if isinstance(error, OSError):
        return explain_os_error(error)
    if isinstance(error, MemoryError):
        return ResumableError("Out of memory: use smaller images or batches, or a machine with more.")
    return None


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print_help()
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"latentae {__version__}")
        return 0
    return run_command(find_command(argv[0]), argv[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (see ``latentae.errors``)."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it can", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, say) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        explained = explain(error)
        if explained is not None:
            print(f"error: {explained}", file=sys.stderr)
            return explained.exit_code
        summary = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"error: a bug of ours, or a case that we forgot: {summary} (--debug shows where)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
