"""Statistics of a reference set, as ADM's evaluator and pytorch-fid publish them: the mean and the covariance."""

import zipfile
from pathlib import Path

import numpy as np
import torch

from latentae.errors import RequestError
from latentae.files import sha256_file

FEATURES = 2048


class FrechetReference:
    """What ``fid`` is measured against.

    Args:
        path: an npz file with ``mu`` (2048,) and ``sigma`` (2048, 2048); other arrays in it are left alone.

    Attributes:
        mean, covariance: float64.

    Raises:
        RequestError: there is no such file, or it holds something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise RequestError(f"--fid-reference: there is no file {path}.")
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise RequestError(f"--fid-reference: {path} is no npz file with mu and sigma ({error}).") from error
        if mean.shape != (FEATURES,) or covariance.shape != (FEATURES, FEATURES):
            raise RequestError(
                f"--fid-reference: {path} has mu {mean.shape} and sigma {covariance.shape}; expected ({FEATURES},) and "
                f"({FEATURES}, {FEATURES}), the features of the 2015 Inception."
            )
        self.mean, self.covariance = torch.from_numpy(mean), torch.from_numpy(covariance)
        self.sha256 = sha256_file(self.path)

    def describe(self) -> str:
        """The file and its hash."""
        return f"{self.path.name}, sha256 {self.sha256[:16]}"
