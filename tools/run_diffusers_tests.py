"""Run diffusers' own model test classes on our families.

    python tools/run_diffusers_tests.py --checkout DIFFUSERS_REPOSITORY [--families DCAE,LiteVAE] [--on-cpu]
        [--commit HASH] [--markdown FILE] [pytest options]

The classes are in diffusers' repository, not in its wheel; ``parameterized``, ``requests`` and ``httpx`` must be
installed. Without an accelerator many of them skip themselves (offloading, layerwise casting, half precision);
``--on-cpu`` runs what a CPU can of these all the same (torch.compile, sharded checkpoints), which takes many minutes.
"""

import argparse
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

# preset, what differs from it, and the modules whose activations may be computed anew
FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "DCAE": ("dc-ae-tiny", {}, {"Stage"}),
    "LiteVAE": ("litevae-tiny", {}, {"UNet", "Decoder", "UNetMidBlock2D"}),
    "DiTo": ("dito-tiny", {"num_inference_steps": 2}, {"Encoder", "UNetMidBlock2D", "UNet"}),
    "SWYCC": ("swycc-tiny", {}, {"Stack", "UNet"}),
    "FourPlane": ("fourplane-tiny", {}, {"Encoder", "Decoder"}),
}
WIDER = {
    "LiteVAE": {"decoder_block_out_channels": (16, 16, 32, 32)},
    "DiTo": {"encoder_widths": (16, 16, 32, 32)},
}
MIXINS = [
    "ModelTesterMixin",
    "TrainingTesterMixin",
    "MemoryTesterMixin",
    "AutoencoderTesterMixin",
    "TorchCompileTesterMixin",
]

TESTS = """
import sys
import warnings

warnings.simplefilter("ignore")
sys.path.insert(0, {checkout!r})

import pytest
import torch

import tests.testing_utils

if {on_cpu}:  # before anything takes the decorator from there
    tests.testing_utils.require_accelerator = lambda test: test
from tests.models.autoencoders.testing_utils import AutoencoderTesterMixin
from tests.models.testing_utils import (
    BaseModelTesterConfig,
    MemoryTesterMixin,
    ModelTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)
from tests.testing_utils import torch_device

import latentae
from latentae.families.presets import find_preset


class Config(BaseModelTesterConfig):
    main_input_name = "sample"
    model_class = latentae.{family}
    output_shape = {shape}

    def get_init_dict(self):
        return {{**find_preset({preset!r}).config, **{changes!r}}}

    def get_dummy_inputs(self):
        generator = torch.Generator().manual_seed(0)
        return {{"sample": torch.randn(2, *self.output_shape, generator=generator).to(torch_device)}}


class TestModel(Config, ModelTesterMixin):
    pass


class TestTraining(Config, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={checkpointed!r})


@pytest.mark.skipif(torch_device == "cpu", reason="offloads to an accelerator, or measures its memory")
class TestMemory(Config, MemoryTesterMixin):
    pass


class TestAutoencoder(Config, AutoencoderTesterMixin):
    def test_forward_with_norm_groups(self):
        # the same with our names of widths: the original's is block_out_channels
        wider = {wider!r}
        if not wider:
            return super().test_forward_with_norm_groups()
        model = self.model_class(**{{**self.get_init_dict(), **wider, "norm_num_groups": 16}}).to(torch_device).eval()
        inputs = self.get_dummy_inputs()
        with torch.no_grad():
            assert model(**inputs).sample.shape == inputs["sample"].shape


class TestCompile(Config, TorchCompileTesterMixin):
    def test_torch_compile_repeated_blocks(self):
        super().test_torch_compile_repeated_blocks(recompile_limit=64)  # blocks are repeated in several widths

    @pytest.mark.skipif(torch_device == "cpu", reason="streams of an accelerator")
    def test_compile_with_group_offloading(self):
        super().test_compile_with_group_offloading()
"""
CLASSES = dict(zip(("TestModel", "TestTraining", "TestMemory", "TestAutoencoder", "TestCompile"), MIXINS))
HEADER = """# diffusers' own model test classes on our families

Written by `tools/run_diffusers_tests.py`: the classes of huggingface/diffusers at commit `{commit}`, run on {versions},
{device}. Each family is its tiny preset; images of 32 x 32 pixels, clips of 5 frames of 16 x 16.

Cells are passed / failed / skipped.
"""

FOOTER = """
## What is changed, and why skips are skips

- `test_forward_with_norm_groups` sets `block_out_channels`, the stock name of the widths; LiteVAE and DiTo run the same
  test by their own names. `test_torch_compile_repeated_blocks` allows recompilations, as ours repeat in several widths.
- None of ours has `_keep_in_fp32_modules`: what must be float32 is so in the layer.
- Everything that asks for an accelerator skips on a CPU. What a CPU can run of it are tests of ours over every family
  (`tests/families/test_memory_helpers.py`, `test_contract.py`): offloading by model, leaf and block, and to disk,
  eight-bit storage, half precision, `channels_last`, whole graphs. Streams and a device's memory are untested.
- DC-AE and SWYCC have no `norm_num_groups`.
"""


class Outcomes:
    """A plugin of pytest that keeps what became of each test: outcome and, where there is one, the reason."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, str, str, str]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        if report.skipped and hasattr(report, "wasxfail"):
            return
        file, cls, test = report.nodeid.split("::")
        family = Path(file).stem.removeprefix("test_")
        reason = ""
        if report.skipped:
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.failed:
            reason = str(getattr(report.longrepr, "reprcrash", report.longrepr)).splitlines()[0]
            reason = re.sub(r"^\S+:\d+: ", "", reason)
        self.found.append((family, CLASSES[cls], test, report.outcome, reason))


def markdown(found: list[tuple[str, str, str, str, str]], header: str) -> str:
    families = list(dict.fromkeys(family for family, *_ in found))
    counts = Counter((family, mixin, outcome) for family, mixin, _, outcome, _ in found)
    text = [header, f"| | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    for mixin in MIXINS:
        cells = [
            " / ".join(str(counts[family, mixin, o]) for o in ("passed", "failed", "skipped")) for family in families
        ]
        text.append(f"| `{mixin}` | {' | '.join(cells)} |")
    for outcome, title in (("failed", "Failed"), ("skipped", "Skipped, by the reason that the test gives")):
        groups: dict[str, list[tuple[str, str]]] = {}
        for family, _, test, what, reason in found:
            if what == outcome:
                groups.setdefault(reason, []).append((family, test.partition("[")[0]))
        text += ["", f"## {title}", ""] + ([] if groups else ["None."])
        for reason, cases in sorted(groups.items()):
            names = ", ".join(f"`{test}`" for test in dict.fromkeys(test for _, test in cases))
            where = sorted({family for family, _ in cases}, key=families.index)
            text.append(
                f"- {reason} ({', '.join(where) if len(where) < len(families) else 'all'}; {len(cases)}): {names}"
            )
    return "\n".join(text) + "\n" + FOOTER


def commit_of(checkout: Path) -> str:
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> int:
    import pytest
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", required=True, metavar="DIR", help="a checkout of huggingface/diffusers")
    parser.add_argument("--families", default=",".join(FAMILIES), metavar="NAMES")
    parser.add_argument("--on-cpu", action="store_true")
    parser.add_argument("--commit", metavar="HASH", help="of the checkout, where it is no git repository")
    parser.add_argument("--markdown", metavar="FILE")
    args, options = parser.parse_known_args()
    checkout = Path(args.checkout).resolve()
    if not (checkout / "tests" / "models" / "testing_utils").is_dir():
        parser.error(f"{checkout} is no checkout of diffusers: it has no tests/models/testing_utils.")
    wanted = args.families.split(",")
    if unknown := set(wanted) - set(FAMILIES):
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    outcomes = Outcomes()
    with tempfile.TemporaryDirectory() as folder:
        for family in wanted:
            preset, changes, checkpointed = FAMILIES[family]
            text = TESTS.format(
                checkout=str(checkout), on_cpu=args.on_cpu, family=family, preset=preset,
                changes=changes, checkpointed=checkpointed, wider=WIDER.get(family),
                shape=(3, 5, 16, 16) if family == "FourPlane" else (3, 32, 32),
            )  # fmt: skip
            Path(folder, f"test_{family}.py").write_text(text)
        Path(folder, "pytest.ini").write_text("[pytest]\nfilterwarnings = ignore\n")
        command = [folder, "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", *options]
        code = int(pytest.main(command, plugins=[outcomes]))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("diffusers", "torch", "accelerate"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU ({platform.machine()})"
    header = HEADER.format(commit=args.commit or commit_of(checkout), versions=versions, device=device)
    if args.markdown:
        Path(args.markdown).write_text(markdown(outcomes.found, header))
    counts = Counter(outcome for *_, outcome, _ in outcomes.found)
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")))
    return code


if __name__ == "__main__":
    sys.exit(main())
