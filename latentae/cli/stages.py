"""Run a list of recipes in order. The same command again continues in the middle."""

import importlib.util

from latentae.errors import MissingExtra

SUMMARY = "train by a list of recipes in order; the same command again resumes in the middle"

HELP = """usage: latentae stages FILE [--runs DIR] [OPTIONS]

Train in stages: each recipe of FILE in order, every later one from the weights of the run before it (its averaged
weights, and the average goes on from there); a recipe of latent diffusion takes that run as its codec. The same command
again skips what is finished and continues the rest.

  latentae stages dcae/f32c32 --data.path IMAGENET/train

  FILE            a YAML list, or the name of a shipped one: dcae/f32c32, dcae/f64c128, dcae/f128c512,
                  dito/onto-sd-vae, litevae/b-f8c12
  --runs DIR      folder that the run_dir of each stage is in (default: runs)
  --dry-run       say what would be done, and stop
  OPTIONS         of 'latentae fit', for every stage; those of the file's own stages count more

A file looks like this; overrides are options of 'latentae fit' and may be left out:

  - {config: dcae/f32c32-phase1, run_dir: f32c32-phase1}
  - config: dcae/f32c32-phase2
    run_dir: f32c32-phase2
    overrides: {data.path: photos-of-512-px-and-more, trainer.max_steps: 20000}

The configuration of every stage is checked before the first one starts. A stage whose overrides name
model.autoencoder.init_from starts from that instead; {before} in overrides is the folder of the run before. Every stage
is a run of 'latentae fit' of its own, and may be looked at, validated and encoded with as such; exit codes are those of
the stage that ended the command.
"""


def print_help() -> None:
    print(HELP, end="")


def run_argv(argv: list[str]) -> int:
    if importlib.util.find_spec("pytorch_lightning") is None:
        raise MissingExtra("Training", "train")
    from latentae.training.stages import stages_command

    return stages_command(argv)
