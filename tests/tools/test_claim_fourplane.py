"""The claim fourplane: arms of equal floats, clips and linear codes against numpy, costs against arithmetic by hand."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from latentae.denoisers import create_denoiser
from latentae.errors import RequestError
from latentae.nn.planes import PlaneLayout


@pytest.fixture
def module(claims):
    import claims.fourplane

    return claims.fourplane


@pytest.fixture
def clips(module):
    import claims.clips

    return claims.clips


@pytest.fixture
def costs(module):
    return module.plane_costs


def test_arms_have_equal_floats_and_trunks(module):
    models = {name: module.build(name, module.QUICK, 3) for name in module.ARMS}
    assert models[module.HALVES](torch.zeros(1, 3, 8, 16, 24)).shape == (1, 3, 8, 16, 24)
    assert {module.floats_of(model) for model in models.values()} == {1536}
    trunks = [{k: x for k, x in m.state_dict().items() if "block" in k} for m in models.values()]
    for other in trunks[1:]:
        assert other.keys() == trunks[0].keys()
        assert all(torch.equal(x, trunks[0][key]) for key, x in other.items())
    assert all(model.net.decoder.time.weight.shape[1] == 8 for model in models.values())  # the time coordinate
    other_seed = module.build(module.HAT, module.QUICK, 4).net.encoder.conv_in.weight
    assert not torch.equal(other_seed, models[module.HAT].net.encoder.conv_in.weight)


def test_arms_differ_in_what_spatial_planes_are_means_of(module):
    pixels = torch.rand(1, 192, module.FRAMES, 2, 3, generator=torch.Generator().manual_seed(0))
    planes = {}
    for name in (module.HALVES, module.HAT, module.DOUBLED):
        model = module.build(name, module.QUICK, 0).net
        torch.nn.init.eye_(model.encoder.heads["xy2"].weight[:, :, 1, 1].data)
        model.encoder.heads["xy1"].load_state_dict(model.encoder.heads["xy2"].state_dict())
        planes[name] = model.layout(tuple(pixels.shape)).split(model.encode(pixels).latent_dist.mean)
    assert torch.allclose(planes[module.DOUBLED]["xy1"], planes[module.DOUBLED]["xy2"])  # one mean, two heads
    for name in (module.HALVES, module.HAT):
        assert not torch.allclose(planes[name]["xy1"], planes[name]["xy2"])
        assert torch.equal(planes[name]["xt"], planes[module.DOUBLED]["xt"])


def test_two_planes_of_one_mean_are_a_plane_of_twice_the_channels(module):
    """What the decoder makes of both is what one convolution makes of their concatenation."""
    decoder = module.build(module.DOUBLED, module.QUICK, 0).net.decoder
    layout = PlaneLayout(8, 4, 4, channels=6)
    a, b = torch.randn(2, 1, 6, 4, 4)
    zeros = {name: torch.zeros(1, 6, 8, 4) for name in ("xt", "yt")}
    fused = decoder.fuse({"xy1": a, "xy2": b, **zeros}, layout) - decoder.fuse(
        {"xy1": 0 * a, "xy2": 0 * b, **zeros}, layout
    )
    kernels = []
    for name in ("xy1", "xy2"):
        mix, spread = decoder.embeds[name]
        kernels.append(torch.einsum("omhw,mi->oihw", spread.weight, mix.weight[:, :, 0, 0]))
    expected = F.conv2d(torch.cat([a, b], dim=1), torch.cat(kernels, dim=1), padding=1)
    torch.testing.assert_close(fused, expected[:, :, None].expand_as(fused), atol=1e-5, rtol=1e-4)


def test_clips_are_frozen_and_apart_from_the_test(clips):
    assert torch.equal(clips.pool(4, 3, 32)[:2], clips.pool(2, 3, 32))
    test, tune = clips.test_clips(1, 3, 32), clips.tune_clips(1, 3, 32)
    for kind in ("photos", "leaves"):
        assert test[kind].shape == (1, 3, 3, 32, 32)
        assert not torch.equal(test[kind], tune[kind])
        assert not torch.equal(test[kind][0, :, 0], test[kind][0, :, 1])  # it moves


def test_every_clip_is_seen_once_an_epoch(clips):
    pool = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1, 1) * 40 + torch.arange(8, dtype=torch.uint8).view(
        2, 2, 2
    )
    seen = [clips.batch_at(pool, 0, step, 2) for step in range(3)]
    assert sorted(int(x.min()) // 40 for batch in seen for x in batch) == list(range(6))
    for one in torch.cat(seen):  # only mirrored and reversed
        assert sorted((one - one.min()).flatten().tolist()) == list(range(8))
    assert torch.equal(seen[1], clips.batch_at(pool, 0, 1, 2))
    others = [clips.batch_at(pool, seed, step, 2) for seed, step in ((1, 0), (0, 3))]
    assert all(not torch.equal(seen[0], other) for other in others)


def test_figures_against_scikit_image(clips):
    generator = np.random.default_rng(0)
    original = {kind: generator.integers(0, 256, (2, 3, 4, 16, 16), dtype=np.uint8) for kind in ("photos", "leaves")}
    made = {kind: generator.integers(0, 256, x.shape, dtype=np.uint8) for kind, x in original.items()}
    found = clips.figures(
        {kind: torch.from_numpy(x).float() / 127.5 - 1 for kind, x in made.items()},
        {kind: torch.from_numpy(x) for kind, x in original.items()},
    )
    a, b = original["photos"], made["photos"]
    frames = [(a[n, :, t], b[n, :, t]) for n in range(2) for t in range(4)]
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in frames]
    assert found["psnr_photos"] == pytest.approx(np.mean(expected), abs=1e-4)
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=0, data_range=255)
    expected = [structural_similarity(x, y, **options) for x, y in frames]
    assert found["ssim_photos"] == pytest.approx(np.mean(expected), abs=0.02)  # scikit-image leaves another border out
    errors = np.square(np.diff(a.astype(float), axis=2) - np.diff(b.astype(float), axis=2)).mean((1, 2, 3, 4))
    assert found["difference_photos"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-4)
    assert found["psnr"] == pytest.approx((found["psnr_photos"] + found["psnr_leaves"]) / 2)


def test_the_best_sum_of_planes_is_least_squares(clips):
    volume = torch.randn(4 * 3 * 2, dtype=torch.float64)
    fit = clips.best_fit("uniform", 1, 4, 3, 2, moving=True).double() @ volume
    cube = volume.view(4, 3, 2).numpy()
    over = {axis: cube.mean(axis, keepdims=True) for axis in (0, 1, 2)}
    pairs = [cube.mean((1, 2), keepdims=True), cube.mean((0, 2), keepdims=True), cube.mean((0, 1), keepdims=True)]
    expected = over[0] + over[1] + over[2] - sum(pairs) + cube.mean()  # analysis of variance
    np.testing.assert_allclose(fit.view(4, 3, 2).numpy(), expected, atol=1e-5)
    only = clips.best_fit("uniform", 1, 4, 3, 2, moving=False).double() @ volume
    np.testing.assert_allclose(only.view(4, 3, 2).numpy(), np.broadcast_to(over[0], cube.shape), atol=1e-5)

    ramp = torch.arange(4)[:, None, None] / 3 * torch.randn(3, 2) + torch.randn(3, 2)  # a line in time at each place
    hat = clips.best_fit("hat", 2, 4, 3, 2, moving=False) @ ramp.flatten()
    torch.testing.assert_close(hat, ramp.flatten(), atol=1e-4, rtol=0)
    halves = clips.best_fit("halves", 2, 4, 3, 2, moving=False) @ ramp.flatten()
    expected = torch.cat([part.mean(0, keepdim=True).expand(2, -1, -1) for part in ramp.split(2)])
    torch.testing.assert_close(halves, expected.flatten(), atol=1e-4, rtol=0)


def test_linear_codes_of_volumes_are_those_of_frames(claims, clips):
    training, test = clips.pool(8, 4, 32), clips.test_clips(2, 4, 32)
    frames = {kind: x.transpose(1, 2).flatten(0, 1) for kind, x in test.items()}
    expected = claims.pictures.pca(training.transpose(1, 2).flatten(0, 1), frames, 8, 3)
    found = clips.linear_code(training, test, 8, 3, None, 0)
    assert found["psnr_photos"] == pytest.approx(expected["psnr_photos"], abs=1e-4)
    planes = clips.linear_code(training, test, 8, 3, ("hat", 2), 0)
    assert planes["psnr"] < found["psnr"]  # fewer floats of the same components
    still = {kind: x[:, :, :1].expand(-1, -1, 4, -1, -1) for kind, x in test.items()}
    same = [clips.linear_code(training, still, 8, 3, spread, 0)["psnr"] for spread in (None, ("uniform", 1))]
    assert same[0] == pytest.approx(same[1], abs=1e-3)  # a plane holds all of what stands still
    more = clips.linear_code(training, still, 8, 3, ("uniform", 1), 3)["psnr"]
    assert more == pytest.approx(clips.linear_code(training, still, 8, 6, None, 0)["psnr"], abs=1e-3)


def test_block_means(clips):
    test = clips.test_clips(1, 4, 32)
    expected = []
    for x in test.values():
        mean = x[0].numpy().astype(np.float64).reshape(3, 2, 2, 8, 4, 8, 4).mean((2, 4, 6), keepdims=True)
        flat = np.broadcast_to(mean, (3, 2, 2, 8, 4, 8, 4)).reshape(x[0].shape)
        rounded = np.floor(flat + 0.5)
        expected += [peak_signal_noise_ratio(x[0, :, t].numpy(), rounded[:, t], data_range=255) for t in range(4)]
    assert clips.block_mean(test, 2, 4)["psnr"] == pytest.approx(np.mean(expected), abs=0.01)


def test_tokens_are_those_of_the_growth_law(costs):
    known = [(672, 1280), (2368, 5120), (3072, 16384), (3136, 17408), (15924, 131040), (12416, 135168)]
    for shape, tokens in zip(costs.SHAPES, known, strict=True):
        assert tuple(shape.law.values()) == tokens
        t, h, w = shape.latent
        assert PlaneLayout(t, h, w).num_tokens == tokens[0]


def test_multiplications_of_the_transformer_by_hand(costs):
    """Each of 12 blocks: 12 d^2 a token and 2 N d for attention; and what is once: 6 d^2 of modulation a block."""
    width, shape = 384, costs.SHAPES[0]
    for way, tokens in shape.law.items():
        once = 256 * width + width**2 + 2 * width**2  # of the time, and the last modulation
        expected = 12 * (tokens * (12 * width**2 + 2 * tokens * width) + 6 * width**2) + 2 * tokens * 8 * width + once
        assert costs.giga_macs(way, shape) == pytest.approx(expected / 1e9, rel=1e-6)


def test_the_transformer_of_a_volume_knows_where_its_tokens_are(costs):
    shape = costs.Shape(1, 32, 48, 1)
    image = create_denoiser({"preset": "planes-s", "num_layers": 1}, PlaneLayout(1, 4, 6))
    volume = costs.denoiser_of(costs.VOLUME, shape, 1)
    for denoiser in (image, volume):
        torch.manual_seed(0)
        for parameter in denoiser.parameters():
            parameter.data.normal_(0, 0.1)
    noisy, t = torch.randn(1, 24, 8), torch.tensor([0.3])
    moved = [denoiser(noisy, t) for denoiser in (image, volume)]
    torch.testing.assert_close(moved[0], moved[1], atol=1e-4, rtol=1e-3)  # positions apart from a shift in time
    longer = costs.denoiser_of(costs.VOLUME, replace(shape, frames=2), 1).transformer
    assert longer.rotation.shape[1] == 48
    assert torch.equal(longer.rotation[:, :24], volume.transformer.rotation)
    assert not torch.equal(longer.rotation[:, 24:], volume.transformer.rotation)
    assert not longer.types.any()


def test_what_is_too_large_is_counted_only(costs, monkeypatch):
    monkeypatch.setattr(costs, "peak_memory", lambda make, tier: make()() or 100)
    small, large = costs.Shape(2, 16, 16, 1), costs.Shape(8, 64, 64, 1)
    rows = costs.measure(replace(costs.QUICK, shapes=(small, large), most=0.1))
    assert rows[0]["tokens"] == rows[0]["law"] == {costs.PLANES: 16, costs.VOLUME: 8}
    assert rows[0]["ratios"].keys() == {"tokens", "giga_macs", "peak_bytes", "seconds"}
    assert rows[1]["seconds"] == rows[1]["peak_bytes"] == {}
    assert rows[1]["ratios"].keys() == {"tokens", "giga_macs"}
    costs.print_table(rows)
    verdicts = costs.thresholds(rows)
    assert [verdict["shown"] for verdict in verdicts] == [True] + [False] * len(costs.LEAST)
    assert verdicts[1]["found"] == "not measured"
    rows[0]["name"], rows[0]["ratios"]["seconds"] = costs.SHAPES[2].name, 9.5
    assert [verdict["shown"] for verdict in costs.thresholds(rows)][:3] == [True, True, False]


def test_cells_are_kept_until_the_setting_changes(module, tmp_path):
    made = []
    cells = module.Cells(tmp_path / "cells", "cpu")
    work = {"a": lambda: made.append("a") or [1], "b": lambda: made.append("b") or [2]}
    assert cells.gather(work, {"steps": (1, 2)}) == cells.gather(work, {"steps": [1, 2]}) == {"a": [1], "b": [2]}
    assert made == ["a", "b"]
    module.Cells(tmp_path / "cells", "gpu").gather({"a": work["a"]}, {"steps": [1, 2]})
    cells.gather({"a": work["a"]}, {"steps": [3]})
    assert made == ["a", "b", "a", "a"]


def test_cells_that_another_process_has_come_last(module, tmp_path):
    cells = module.Cells(tmp_path, "cpu")
    order = []
    with module.locked(tmp_path / "a.lock"):
        code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        held = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.lock")], capture_output=True, check=False)
        assert b"BlockingIOError" in held.stderr
        cells.gather({"b": lambda: order.append("b")}, {})
    cells.gather({"a": lambda: order.append("a"), "b": lambda: order.append("again")}, {})
    assert order == ["b", "a"]


def test_the_setting_names_what_figures_depend_on(module, clips):
    plan = module.Plan(4, 2, (1e-3, 2e-3, 4e-3), 1)
    test = clips.test_clips(1, 8, 32)
    setting = module.describe(module.QUICK, plan, test)
    assert {arm["floats"] for arm in setting["arms"].values()} == {1536}
    assert setting == json.loads(json.dumps(setting))
    for changed in (
        module.describe(module.QUICK, replace(plan, steps=5), test),
        module.describe(replace(module.QUICK, batch=2), plan, test),
        module.describe(module.QUICK, plan, {**test, "real": test["leaves"]}),
        module.describe(module.QUICK, plan, {kind: x + 1 for kind, x in test.items()}),
    ):
        assert changed != setting
    assert asdict(plan)["steps"] == setting["steps"]


def test_what_the_claim_refuses(module, tool, tmp_path, monkeypatch, capsys):
    with pytest.raises(RequestError, match="--json"):
        module.run("cpu", True, None, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="CUDA device"):
        module.run("gpu", True, None, tmp_path / "fourplane.png")
    with pytest.raises(RequestError, match="does not exist"):
        module.run("cpu", True, None, tmp_path / "fourplane.png", tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        tool("claims").main(["dcae", "--clips", str(tmp_path)])
    assert "--clips is for the claim fourplane" in capsys.readouterr().err


@pytest.mark.slow
def test_the_claim_from_end_to_end_by_two_processes(tool, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    np.save(clips / "noise.npy", np.random.default_rng(0).integers(0, 256, (20, 70, 90, 3), dtype=np.uint8))
    command = [sys.executable, tool("claims").__file__, "fourplane", "--quick", "--threads", "1"]
    files = [tmp_path / "fourplane.json", tmp_path / "again.json"]
    running = [
        subprocess.Popen([*command, "--clips", str(clips), "--json", str(file)], stdout=subprocess.PIPE, text=True)
        for file in files
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0].splitlines()[-1].startswith("fourplane: four planes (hat) beat the tri-plane")
    first, second = (json.loads(file.read_text())["fourplane"] for file in files)
    assert first["arms"] == second["arms"]
    assert len(first["arms"]) == 5
    assert all(len(arm["final"]["psnr_real"]) == 3 for arm in first["arms"].values())
    assert [row["tokens"] == row["law"] for row in first["costs"]["rows"]] == [True, True]
    assert (tmp_path / "fourplane.png").stat().st_size > 10_000
