"""The claim probe: cells that are kept, shared and judged; codecs that differ in their ratio only."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

import latentae
from latentae.bench.latent_space import LatentSpace, named
from latentae.codec import LatentCodec
from latentae.errors import RequestError


@pytest.fixture
def module(claims):
    return claims.probe


def cells_of(module, **series):
    """Cells with the figures that are given by codec as lists over seeds; all others are 1."""
    names = (*module.MAIN, f"{module.TO_IMAGES}, 2 px")
    trivial = [f"{key} to {to}" for key in ("white noise", "spectral Gaussian") for to in ("images", "own")]
    cells = {}
    for codec in module.CODECS:
        given = series.get(codec.split()[0].lower().replace("-", ""), {})
        cells[codec] = {
            seed: {
                "figures": dict.fromkeys(trivial, 2.0)
                | {name: given.get(name, [1.0, 1.01, 0.99])[seed] for name in names}
            }
            for seed in module.SEEDS
        }
    return cells


def test_comparisons_are_paired_over_seeds(module):
    plain, eq = [1.0, 2.0, 4.0], [0.9, 1.7, 3.7]
    cells = cells_of(module, plain={module.TO_IMAGES: plain}, eq={module.TO_IMAGES: eq})
    [row] = [
        row
        for row in module.compare(cells)
        if (row["figure"], row["first"], row["second"]) == (module.TO_IMAGES, module.EQ, module.PLAIN)
    ]
    shares = 1 - np.array(eq) / np.array(plain)
    expected = ttest_rel(shares, np.zeros(3)).confidence_interval(0.95)
    assert row["lower_by"] == pytest.approx(shares.mean())
    assert row["interval"] == pytest.approx([expected.low, expected.high], abs=1e-3)
    assert row["separates"]


def test_thresholds_ask_for_size_and_certainty(module):
    def shown(eq, deep=(1.0, 1.01, 0.99)):
        same = {module.TO_OWN: list(eq), module.TO_IMAGES: list(eq)}
        cells = cells_of(module, eq=same, dcae={module.TO_IMAGES: list(deep), module.TO_OWN: list(deep)})
        verdicts = module.thresholds(cells, module.compare(cells))
        return [verdict["shown"] for verdict in verdicts[:2]], [verdict["shown"] for verdict in verdicts[4:6]]

    assert shown([0.9, 0.91, 0.88])[0] == [True, True]
    assert shown([0.98, 0.99, 0.97])[0] == [False, False]  # certain, but small
    assert shown([0.7, 1.01, 0.95])[0] == [False, False]  # large, but uncertain
    assert shown([1, 1, 1], deep=[1.02, 1.03, 1.01])[1] == [True, True]  # within what is allowed
    assert shown([1, 1, 1], deep=[1.2, 1.01, 0.99])[1] == [False, False]


def test_the_rate_is_held_to_pairs_that_differ(module):
    far, dear = [2.0, 2.02, 1.98], [1.5, 1.52, 1.47]

    def verdict(**series):
        cells = cells_of(module, **series)
        by_pair = {(row["figure"], row["first"], row["second"]): row for row in module.compare(cells)}
        return module.rate_verdict(by_pair, module.TO_IMAGES)

    assert verdict(eq={module.TO_IMAGES: far, module.RATE: dear})["shown"]
    assert verdict(eq={module.TO_IMAGES: far})["found"] == "0 of 3 pairs that differ"
    assert not verdict(eq={module.TO_IMAGES: far, module.RATE: [0.5, 0.52, 0.47]})["shown"]
    assert not verdict()["shown"], "nothing differs"


def test_a_distance_tells_something_if_samples_beat_trivial_latents(module):
    cells = cells_of(module)
    assert module.learned_verdict(cells, module.TO_OWN, "own")["found"] == "12 of 12 cells"
    cells[module.EQ][1]["figures"]["white noise to own"] = 0.5
    verdict = module.learned_verdict(cells, module.TO_OWN, "own")
    assert (verdict["found"], verdict["shown"]) == ("11 of 12 cells", False)


def test_figures_that_are_missing_are_no_figures(module):
    cells = cells_of(module)
    cells[module.EQ][0]["figures"][module.RATE] = None
    assert module.summarise(cells)[module.EQ][module.RATE] is None
    rows = {(r["figure"], r["first"], r["second"]): r for r in module.compare(cells)}
    assert rows[module.RATE, module.EQ, module.PLAIN]["lower_by"] is None
    module.thresholds(cells, module.compare(cells))


@pytest.fixture
def space(claims):
    pictures = claims.pictures.leaves_of(5, 80, 64)
    codec = LatentCodec(latentae.create("dc-ae-tiny", seed=0, latent_channels=4))
    return LatentSpace(codec, named(pictures[:64], "train"), named(pictures[64:], "held-out"))


def test_samples_of_the_spectral_gaussian_have_its_moments(module, space):
    """Against numpy: mean map, and covariance of all channels at each pixel, of many samples."""
    drawn = module.draw_gaussian(space, 20000, 0)
    torch.testing.assert_close(drawn.mean(0), space.train.mean(0), atol=0.05, rtol=0)
    model = module.SpectralGaussian(space.train)
    assert drawn.double().sub(model.mean).square().flatten(1).sum(1).mean() == pytest.approx(
        model.variances.sum().item(), rel=0.02
    )
    again = module.SpectralGaussian(drawn)  # which learns the same model from its samples
    torch.testing.assert_close(again.variances, model.variances, atol=0.05, rtol=0.05)
    assert not torch.equal(drawn[:4], module.draw_gaussian(space, 4, 1))


def test_the_deep_codec_has_the_floats_of_the_others(claims):
    deep = claims.probe_codecs.deep_model(3)
    shallow = latentae.create(claims.eqvae.PRESET, latent_channels=claims.eqvae.CHANNELS, **claims.eqvae.NETWORK)
    pixels = torch.zeros(1, 3, 64, 64)
    latents = [model.encode(pixels).latent_dist.mode() for model in (deep, shallow)]
    assert latents[0].shape == (1, 16, 4, 4)
    assert latents[0].numel() == latents[1].numel()
    assert not torch.equal(deep.encoder.conv_out.weight, claims.probe_codecs.deep_model(4).encoder.conv_out.weight)


def test_locks_are_of_one_process_at_a_time(module, tmp_path):
    path = tmp_path / "cell.lock"
    with module.locked(path) as mine, module.locked(path, waits=False) as other:
        assert (mine, other) == (True, False)
    with module.locked(path, waits=False) as mine:
        assert mine


def test_a_cell_is_kept_until_its_weights_or_settings_change(module, claims, tmp_path, monkeypatch):
    folder = claims.probe_codecs.folder_of(tmp_path, module.EQ, 1)
    latentae.loading.export(latentae.create("dc-ae-tiny", seed=0), folder)
    (tmp_path / claims.probe_codecs.MODELS).mkdir()
    measured = []
    monkeypatch.setattr(module, "figures_of", lambda space, seed, settings, name: measured.append(name) or {"x": 1})
    pictures = claims.pictures.leaves_of(5, 64, 64), claims.pictures.leaves_of(6, 16, 64)

    def measure(steps):
        return module.cell(tmp_path, "cpu", module.EQ, 1, module.ProbeSettings(steps=steps), pictures)

    assert measure(2)["figures"] == measure(2)["figures"] == {"x": 1}
    assert len(measured) == 1
    measure(3)
    latentae.loading.export(latentae.create("dc-ae-tiny", seed=1), folder)
    measure(3)
    assert len(measured) == 3


def test_tiers_keep_cells_of_their_own(module):
    names = [module.cell_name(tier, codec, 1) for tier in ("cpu", "gpu") for codec in module.CODECS]
    assert len(set(names)) == 8
    assert names[3] == "dc-ae-f16-1"


def test_what_the_claim_refuses(module, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="--json"):
        module.run("cpu", True, None, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="CUDA device"):
        module.run("gpu", True, None, tmp_path / "probe.png")


@pytest.mark.slow
def test_the_claim_from_end_to_end_by_two_processes(tool, claims, tmp_path):
    """The models are there; two processes share the cells and end with one report."""
    codecs = claims.probe_codecs
    for codec in claims.probe.CODECS:
        for seed in codecs.SEEDS:
            make = codecs.deep_model(seed) if codec == codecs.DEEP else latentae.create("dc-ae-tiny", seed=seed)
            latentae.loading.export(make.eval(), codecs.folder_of(tmp_path, codec, seed))
    (tmp_path / codecs.MODELS / f"{codecs.DEEP_FOLDER}.json").write_text('{"start": 1}')
    command = [sys.executable, tool("claims").__file__, "probe", "--quick", "--threads", "1", "--json"]
    files = [tmp_path / "probe.json", tmp_path / "again.json"]
    running = [subprocess.Popen([*command, str(file)], stdout=subprocess.PIPE, text=True) for file in files]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0].splitlines()[-1].startswith("probe: EQ's samples are nearer")
    first, second = (json.loads(file.read_text())["probe"] for file in files)
    assert first["cells"] == second["cells"]
    assert first["training_of_the_f16"] == {"start": 1}
    assert all(len(by_seed) == 3 for by_seed in first["cells"].values())
    assert (tmp_path / "probe.png").stat().st_size > 10_000
