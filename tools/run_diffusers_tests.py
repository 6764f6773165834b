"""Run diffusers' own model test classes on ours.

    python tools/run_diffusers_tests.py --checkout DIFFUSERS_REPOSITORY [pytest options]

The classes are in diffusers' repository, not in its wheel; ``parameterized``, ``requests`` and ``httpx`` must be
installed. Without an accelerator many of them skip themselves (offloading, layerwise casting, half precision).
"""

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = """
import sys
import warnings

warnings.simplefilter("ignore")
sys.path.insert(0, {checkout!r})

from tests.models.autoencoders.test_models_autoencoder_dc import AutoencoderDCTesterConfig
from tests.models.autoencoders.testing_utils import AutoencoderTesterMixin
from tests.models.testing_utils import MemoryTesterMixin, ModelTesterMixin, TorchCompileTesterMixin, TrainingTesterMixin

from latentae import DCAE


class Config(AutoencoderDCTesterConfig):
    @property
    def model_class(self):
        return DCAE


class TestModel(Config, ModelTesterMixin):
    base_precision = 1e-2


class TestTraining(Config, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={{"Encoder", "Decoder"}})


class TestMemory(Config, MemoryTesterMixin):
    pass


class TestTiling(Config, AutoencoderTesterMixin):
    pass


class TestCompile(Config, TorchCompileTesterMixin):
    pass
"""


def main() -> int:
    import pytest

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", required=True, metavar="DIR", help="a checkout of huggingface/diffusers")
    args, options = parser.parse_known_args()
    checkout = Path(args.checkout).resolve()
    if not (checkout / "tests" / "models" / "testing_utils").is_dir():
        parser.error(f"{checkout} is no checkout of diffusers: it has no tests/models/testing_utils.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "test_dcae.py")
        path.write_text(TESTS.format(checkout=str(checkout)))
        Path(folder, "pytest.ini").write_text("[pytest]\nfilterwarnings = ignore\n")
        return int(pytest.main([str(path), "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", *options]))


if __name__ == "__main__":
    sys.exit(main())
