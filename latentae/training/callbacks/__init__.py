"""What happens beside the training step: checkpoints, pictures, progress."""

from latentae.training.callbacks.broken import BrokenImages
from latentae.training.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from latentae.training.callbacks.images import ReconstructionImages, SampleImages
from latentae.training.callbacks.progress import TrainingProgress
from latentae.training.callbacks.termination import Termination

__all__ = [
    "AtomicCheckpointIO",
    "BrokenImages",
    "Checkpoints",
    "ReconstructionImages",
    "SampleImages",
    "Termination",
    "TrainingProgress",
]
