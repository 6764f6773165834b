"""``latentae fit`` and ``latentae validate``: LightningCLI with runs that continue and errors of one line."""

import logging
import os
import pickle
import signal
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import unified_diff
from importlib.util import find_spec
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import yaml
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from pytorch_lightning.utilities.warnings import PossibleUserWarning

from latentae.console import format_table, say
from latentae.errors import LatentAEError, RequestError
from latentae.files import atomic_write
from latentae.objectives import Term
from latentae.training.autoencoder import AutoencoderModule
from latentae.training.callbacks import (
    AtomicCheckpointIO,
    BrokenImages,
    Checkpoints,
    ReconstructionImages,
    SampleImages,
    Termination,
    TrainingProgress,
)
from latentae.training.config import check_keys, check_left_out, explain_value, merge, options, with_recipe_files
from latentae.training.datamodule import ImageData
from latentae.training.diffusion import LatentDiffusionModule
from latentae.training.latent_data import LatentData
from latentae.training.recipes import recipe_names
from latentae.weights import open_state_dict

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "devices": 1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 1000,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # ImageData gives each rank its own positions
}


@dataclass(frozen=True)
class Task:
    """What a recipe configures: the classes of its sections, and what is said about its run."""

    module: type
    data: type
    images: type
    use: str  # of a finished run
    anew: str  # how a changed configuration starts

    @property
    def sections(self) -> dict[str, Any]:
        return {
            "seed_everything": None,
            "trainer": Trainer,
            "model": self.module,
            "data": self.data,
            "checkpoint": Checkpoints,
            "images": self.images,
        }


AUTOENCODER = Task(
    AutoencoderModule,
    ImageData,
    ReconstructionImages,
    use="Use it as --model {run}.",
    anew="start a new run with --model.autoencoder.init_from RUN_DIR",
)
DIFFUSION = Task(
    LatentDiffusionModule,
    LatentData,
    SampleImages,
    use="Make a diffusers pipeline of it with 'latentae export {run} DIR'.",
    anew="start a new run in another --run_dir",
)
NOT_IN_CONFIG = ("config", "run_dir", "fork", "ckpt_path")  # of one command, not of the run
# These may differ between two commands on one run: no result depends on them.
WITHOUT_EFFECT = ("data.workers", "trainer.enable_progress_bar", "trainer.default_root_dir")


def fit_command(argv: list[str]) -> int:
    """Train as ``argv`` says, from the run folder's last checkpoint if it has one; returns the exit code."""
    with quiet_libraries():
        cli = CommandLine(argv)
        if cli.max_steps < 0:
            raise RequestError("The data is an endless stream: set the length of training with --trainer.max_steps N.")
        last = cli.run_dir / "checkpoints" / "last.ckpt"
        resuming = last.is_file()
        if resuming:
            cli.refuse_changes()
            if (step := step_of(last)) >= cli.max_steps:
                say(f"{cli.run_dir} is finished: {step} of {cli.max_steps} steps are done.")
                return 0
            say(f"Continuing {cli.run_dir} from step {step}.")
        cli.build(resuming)
        cli.save_config()
        trainer: Any = cli.trainer
        with one_voice(), lightning_manners(trainer, cli.task):
            trainer.fit(cli.model, cli.datamodule, ckpt_path=last if resuming else None)
            if cli.datamodule.validates:
                print_results(trainer.validate(cli.model, cli.datamodule, verbose=False))
        if trainer.is_global_zero:
            say(f"{cli.run_dir} is finished: {trainer.global_step} steps. {cli.task.use.format(run=cli.run_dir)}")
        return 0


def validate_command(argv: list[str]) -> int:
    """Print the held-out values of a run's last checkpoint, or of ``--ckpt_path``; returns the exit code."""
    with quiet_libraries():
        given = dict(options(argv))
        if "run_dir" in given and "config" not in given:
            config = Path(str(given["run_dir"]), "config.yaml")
            if not config.is_file():
                raise RequestError(f"{given['run_dir']} is no run of latentae fit: it has no config.yaml.")
            argv = ["--config", str(config), *argv]
        cli = CommandLine(argv)
        checkpoint = Path(cli.config.ckpt_path or cli.run_dir / "checkpoints" / "last.ckpt")
        if not checkpoint.is_file():
            raise RequestError(f"There is no checkpoint {checkpoint}: give --run_dir of a run, or --ckpt_path.")
        if "data.val_images" not in given:
            cli.config.data.val_images = None
        cli.config.images.count = 0
        if cli.task is AUTOENCODER and "data.size" in given and "data.val_sizes" not in given:
            cli.config.data.val_sizes = None
        cli.config.trainer.logger = False
        cli.build(resuming=True)
        trainer: Any = cli.trainer
        with one_voice(), lightning_manners(trainer, cli.task):
            print_results(trainer.validate(cli.model, cli.datamodule, ckpt_path=checkpoint, verbose=False))
        return 0


@rank_zero_only
def print_results(results: list[Any]) -> None:
    values = {name: value for of_size in results for name, value in of_size.items() if name != "step"}
    rows = [(name.removeprefix("val/"), float(value)) for name, value in values.items()]
    print(format_table(("held-out", "value"), rows))


@contextmanager
def one_voice() -> Iterator[None]:
    """Of ranks that fail together, or one after the other, only the first says why."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not first_to_fail():
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)) from None
        raise


def first_to_fail() -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return True
    try:
        return torch.distributed.distributed_c10d._get_default_store().add("latentae/failed", 1) == 1
    except RuntimeError:  # the rank that held the store has gone, and has said why
        return False


@contextmanager
def lightning_manners(trainer: Any, task: Task) -> Iterator[None]:
    """Turn Lightning's ways of ending on signals and mistakes into ours."""
    outer = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning would run an inherited handler in mid-step
    others = set(active_children())
    try:
        yield
    except SIGTERMException:  # Lightning leaves with 0
        if trainer.is_global_zero:
            say("Terminated; the same command continues.")
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit:
        if trainer.state.status == TrainerStatus.INTERRUPTED:  # Lightning leaves with 1 on Ctrl-C
            raise KeyboardInterrupt from None
        raise
    except MisconfigurationException as error:
        raise RequestError(" ".join(str(error).split())) from error
    except LatentAEError as error:
        if "in DataLoader worker" in str(error):  # the worker's traceback comes with it; its last line is the message
            raise type(error)(str(error).strip().splitlines()[-1].split(": ", 1)[1]) from error
        raise
    except (RuntimeError, ValueError) as error:
        if "state_dict" in str(error) or "state dict" in str(error):
            raise RequestError(
                f"The run's checkpoint does not fit the changed configuration ({str(error).split(':')[0]}): "
                f"{task.anew}."
            ) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, outer)
        end_workers(set(active_children()) - others)


def end_workers(workers: set[BaseProcess]) -> None:
    """End what reads for a run that failed: such workers ignore the SIGTERM that Python would wait for at its end."""
    outer = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the end of a worker for an error
    for worker in workers:
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, outer)


class CommandLine(LightningCLI):
    """The configuration of one command: parsed on construction, built into trainer, module and data by `build`."""

    def __init__(self, argv: list[str]):
        recipe = with_recipe_files([word for word in argv if word != "--help-all"])
        model = merge(recipe).get("model")
        self.task = DIFFUSION if isinstance(model, dict) and "denoiser" in model else AUTOENCODER
        arguments = ["--help"] if "--help-all" in argv else recipe
        super().__init__(
            self.task.module,
            self.task.data,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
            args=arguments,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
        name = str(dict(options(arguments)).get("config", "fit"))
        self.run_dir = Path(self.config.run_dir or Path("runs", Path(name).stem))
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise RequestError(f"{self.run_dir} is a file: --run_dir names the folder of the run.")
        self.config.trainer.default_root_dir = str(self.run_dir)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, default=None, help="Folder of the run.")
        parser.add_argument("--fork", action="store_true", help="Continue under a changed configuration.")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint to validate.")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(self.task.images, "images")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        check_keys(merge(args), self.task.sections | dict.fromkeys([*NOT_IN_CONFIG, "help", "print_config"]))
        objective: Any = next((action for action in parser._actions if action.dest == "model.objective"), None)
        if objective is not None:
            objective._typehint = dict[str, Term | None]  # null leaves a term of the recipe out
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            if str(error).startswith("the following arguments are required"):
                names = ", ".join(recipe_names())
                raise RequestError(f"Give a whole recipe with --config: a file, or one of {names}.") from error
            raise RequestError(explain_value(str(error))) from error
        if objective is None:
            return
        check_left_out(args)
        terms = {name: term for name, term in self.config.model.objective.items() if term is not None}
        if not terms:
            raise RequestError("model.objective has no term left: keep one, such as --model.objective.l1 L1.")
        self.config.model.objective = terms
        objective._typehint = dict[str, Term]  # of a union, jsonargparse hides why a term cannot be made

    def instantiate_classes(self) -> None:
        """Nothing yet: `build` does it once the command knows that there is something to do."""

    def build(self, resuming: bool) -> None:
        """Build trainer, module and data; weights that a checkpoint replaces are not read."""
        if "WandbLogger" in str(self.config.trainer.logger) and find_spec("wandb") is None:
            raise RequestError(
                "trainer.logger WandbLogger needs Weights & Biases, not installed here: pip install wandb."
            )
        description = self.config.model.get("autoencoder")
        if resuming and description is not None:
            self.config.model.autoencoder = {k: v for k, v in description.items() if k != "init_from"}
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise own_cause(error) or error from None
        if description is not None:
            self.config.model.autoencoder = description  # the configuration that is saved names where the run began

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self.config_init.trainer
        if config.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.run_dir, name="tensorboard", version="")
        kwargs["callbacks"] = [*(config.callbacks or []), BrokenImages(), Termination()]
        if config.enable_progress_bar is not False:
            kwargs["callbacks"].append(TrainingProgress())
        if config.strategy == "auto" and str(config.devices) != "1":
            kwargs["strategy"] = "ddp_find_unused_parameters_true"  # each of the two passes uses one network only
        kwargs["plugins"] = [*(config.plugins or []), AtomicCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise RequestError(f"trainer: {' '.join(str(error).split())}") from error

    @property
    def max_steps(self) -> int:
        return self.config.trainer.max_steps

    @property
    def saved_config(self) -> Path:
        return self.run_dir / "config.yaml"

    def describe(self) -> str:
        """The whole configuration as YAML, defaults included."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=True))
        return yaml.safe_dump({k: v for k, v in config.items() if k not in NOT_IN_CONFIG}, sort_keys=False)

    @rank_zero_only
    def save_config(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.saved_config) as stream:
            stream.write(self.describe().encode())

    def refuse_changes(self) -> None:
        """Stop if the run was started with another configuration and ``--fork`` does not allow it."""
        if self.config.fork or not self.saved_config.is_file():
            return
        before, now = (settings(text) for text in (self.saved_config.read_text(), self.describe()))
        if before != now:
            lines = unified_diff(before, now, lineterm="", n=0)
            changes = [line for line in lines if line[0] in "+-" and not line.startswith(("+++", "---"))]
            raise RequestError(
                f"{self.run_dir} was started with another configuration ({'; '.join(changes)}): take another "
                "--run_dir, or continue it under the new one with --fork."
            )


def own_cause(error: BaseException) -> LatentAEError | None:
    """Why something could not be made that may also be left out, which jsonargparse hides behind its own words."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, LatentAEError):
        cause = cause.__cause__
    return cause


def settings(text: str) -> list[str]:
    """A YAML configuration as sorted ``key: value`` lines, without those that affect no result."""

    def flatten(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                yield from flatten(inner, f"{key}.{name}" if key else name)
        else:
            yield key, value

    lines = flatten(yaml.safe_load(text), "")
    return sorted(f"{key}: {value}" for key, value in lines if key not in WITHOUT_EFFECT and value is not None)


def step_of(checkpoint: Path) -> int:
    """The global step of a checkpoint, without reading its tensors."""
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        return open_state_dict(checkpoint)["global_step"]  # says what is wrong with the file


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the remarks of libraries that a user of a command can do nothing about."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in ("pytorch_lightning", "lightning_fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # torch.compile's own doing
        yield
