"""Measure a checkpoint of a run on held-out images."""

import importlib.util

from latentae.errors import MissingExtra

SUMMARY = "measure a trained checkpoint on held-out images"

HELP = """usage: latentae validate --run_dir DIR [--data.val_path FOLDER] [OPTIONS]

Print PSNR, SSIM, LPIPS (if AlexNet's weights are on this machine) and every loss term of a run's last checkpoint on all
its held-out images, with averaged weights if the run has them; of a latent diffusion, the loss on held-out latents.

  latentae validate --run_dir runs/mine --data.val_path other-photos

  --run_dir DIR               the run; its config.yaml is the configuration
  --ckpt_path FILE            another checkpoint than DIR/checkpoints/last.ckpt
  --config RECIPE             another configuration than the run's
  --data.val_path FOLDER      images, or a store, to measure on (default: what the run held out)
  --data.val_images N         only the first N of them
  --data.size N               side of the centre crops        --data.batch_size N
  --help-all                  every option

Compare models by 'latentae bench', which states its protocol; these values are for watching a run.
"""


def print_help() -> None:
    print(HELP, end="")


def run_argv(argv: list[str]) -> int:
    if importlib.util.find_spec("pytorch_lightning") is None:
        raise MissingExtra("Training", "train")
    from latentae.training.cli import validate_command

    return validate_command(argv)
