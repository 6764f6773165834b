"""Latent diffusion on planes: statistics by hand, a store against clips, given planes, every refusal."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import latentae
from latentae.cli.main import main
from latentae.denoisers import create_denoiser, velocity_errors
from latentae.errors import RequestError
from latentae.families.fourplane import PlaneGaussian
from latentae.loading.diffusion import load_diffusion
from latentae.nn.pixels import to_float
from latentae.nn.planes import PlaneLayout
from latentae.store.reader import LatentStore
from latentae.training.config import read_yaml
from latentae.training.diffusion import LatentDiffusionModule
from latentae.training.latent_data import CentreClips, LatentData
from latentae.training.planes import GivenPlanes
from latentae.training.recipes import find_recipe

SMALL = {"preset": "planes-tiny", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
ENDPOINTS = "fourplane-endpoints-tiny"
LAYOUT = PlaneLayout(3, 4, 4, planes=2, channels=4)  # of 5 frames of 16 x 16 pixels


def make_module(codec=ENDPOINTS, **options):
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3), "ema": 0.9, **options}
    return LatentDiffusionModule(options.pop("denoiser", SMALL), codec, **options)


def make_data(path, **options):
    options = {"size": 16, "frames": 5, "batch_size": 4, "workers": 0, "val_fraction": 0.0, **options}
    return LatentData(str(path), **options)


def write_clips(folder, clips):
    for name, clip in clips.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, clip)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two classes of eight moving waves, of 5 frames each."""
    t, y, x = np.mgrid[:5, :16, :16]
    moving = {}
    for i in range(8):
        waves = [127 + 110 * np.sin(x / (2 + i) + y / (3 + c) + t * (i % 2 - 0.5) + i) for c in range(3)]
        moving[f"{'ab'[i % 2]}/{i}.npy"] = np.stack(waves, -1).astype(np.uint8)
    return write_clips(tmp_path_factory.mktemp("clips"), moving)


@pytest.fixture(scope="module")
def stores(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores")
    for kind in ("mode", "moments"):
        latentae.encode_dataset(
            clips, out / kind, ENDPOINTS, size=16, frames=5, kind=kind, shard_size=3, device="cpu", workers=1
        )
    return out


def pixels_of(clips):
    files = sorted(clips.glob("*/*.npy"))
    return torch.from_numpy(np.stack([np.load(file) for file in files])).permute(0, 4, 1, 2, 3)


# Latents as the denoiser sees them


def test_tokens_have_mean_0_and_deviation_1_plane_by_plane_and_channel_by_channel(runs, clips, tmp_path):
    module = make_module(normalisation_images=8)
    runs.fit(module, make_data(clips), tmp_path, 1)
    assert module.layout == LAYOUT
    assert module.denoiser.latent_shape == (LAYOUT.num_tokens, 4)
    with torch.no_grad():
        posterior = module.codec.autoencoder.encode(to_float(pixels_of(clips))).latent_dist
    tokens = module.normalise(posterior.mode())
    variances = posterior.var / LAYOUT.of_tokens(module.latents_std) ** 2
    for k in range(4):
        of_plane = LAYOUT.types == k
        mean = tokens[:, of_plane].mean((0, 1))
        total = (tokens[:, of_plane] ** 2 + variances[:, of_plane]).mean((0, 1))
        torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(total, torch.ones(4), atol=1e-4, rtol=0)
    expected = (posterior.mean - LAYOUT.of_tokens(module.latents_mean)) / LAYOUT.of_tokens(module.latents_std)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(module.as_diffusion().denormalise(tokens), posterior.mode(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mode", "moments"])
def test_a_store_of_clips_and_the_clips_give_the_same_run(runs, clips, stores, tmp_path, kind, monkeypatch):
    """The store without its pixels; of modes the clips' posteriors are made to have no spread."""
    if kind == "mode":
        init = PlaneGaussian.__init__

        def narrow(self, *arguments):
            init(self, *arguments)
            self.logvar, self.std, self.var = self.logvar - 100, 0 * self.std, 0 * self.var

        monkeypatch.setattr(PlaneGaussian, "__init__", narrow)
    options = {"normalisation_images": 8, "given": GivenPlanes(0.5, 0.2)}
    on_the_fly = runs.fit(make_module(**options), make_data(clips), tmp_path / "clips", 4)
    monkeypatch.undo()
    module = make_module(None, **options)
    if kind == "mode":  # which draws nothing, so what follows is drawn later
        monkeypatch.setattr("latentae.training.diffusion.draw_latents", drawing_anyway)
    from_store = runs.fit(module, make_data(stores / kind), tmp_path / "store", 4)
    for step, values in from_store.items():
        assert values == pytest.approx(on_the_fly[step], rel=1e-3)
    one, two = (load_diffusion(tmp_path / way) for way in ("store", "clips"))
    torch.testing.assert_close(one.std, two.std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-4, atol=1e-5)
    assert one.autoencoder_sha256 == two.autoencoder_sha256
    assert one.labels == two.labels == {0: "a", 1: "b"}
    assert one.given == ("first", "both")


def drawing_anyway(posterior, rank, world_size):
    torch.randn(len(posterior.mode()), LAYOUT.num_tokens, 4)
    return posterior.mode()


def test_moments_in_a_store_are_those_of_the_planes(clips, stores):
    store = LatentStore(stores / "moments")
    codec = latentae.LatentCodec(latentae.load(ENDPOINTS))
    with torch.no_grad():
        expected = codec.posterior(to_float(pixels_of(clips)[:1]))
    entry = next(store[i] for i in range(8) if store[i]["key"] == "a/0.npy")
    assert store.latent_shape == (16, 3, 4, 4)
    torch.testing.assert_close(entry["latents"][None], expected.mode(), atol=1e-5, rtol=1e-5)
    again = PlaneGaussian.of_moments(entry["moments"][None], LAYOUT)
    torch.testing.assert_close(again.mean, expected.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.logvar, expected.logvar, atol=1e-5, rtol=1e-5)
    noise = torch.randn(expected.mean.shape)
    torch.testing.assert_close(again.at(noise), expected.at(noise), atol=1e-5, rtol=1e-5)


def test_clips_begin_anywhere_in_training_and_at_the_first_frame_in_validation(tmp_path):
    numbered = np.zeros((9, 20, 16, 3), np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None]
    numbered[:, :, :8] += 100  # the left half
    folder = write_clips(tmp_path, {f"{i}.npy": numbered for i in range(4)})
    data = make_data(folder, flip=True, val_fraction=0.25)
    data.setup("fit")
    assert isinstance(data.train_set, CentreClips)
    drawn = [data.train_set[position]["pixels"] for position in range(60)]
    for pixels in drawn:
        assert pixels.shape == (3, 5, 16, 16)
        assert (pixels[0, 1:, 0, 0] - pixels[0, :-1, 0, 0] == 1).all()
    assert {int(pixels[0, 0, 0].min()) for pixels in drawn} == {0, 1, 2, 3, 4}
    assert 15 < sum(int(pixels[0, 0, 0, 0]) < 100 for pixels in drawn) < 45  # mirrored
    assert torch.equal(data.train_set[7]["pixels"], drawn[7])
    held_out = data.val_set[0]["pixels"]
    assert held_out[0, :, 0, 0].tolist() == [100, 101, 102, 103, 104]


# Given planes


def test_given_planes_have_their_shares():
    given = GivenPlanes(first=0.3, both=0.1).draw(torch.empty(4000), LAYOUT)
    planes = torch.stack([given[:, LAYOUT.types == k].float().mean(1) for k in range(4)])
    assert set(planes.unique().tolist()) == {0.0, 1.0}
    assert planes[2:].max() == 0
    assert planes[0].mean() == pytest.approx(0.4, abs=0.03)
    assert planes[1].mean() == pytest.approx(0.1, abs=0.02)
    assert (planes[1] <= planes[0]).all()


def test_given_tokens_are_modes_and_reach_the_loss(runs, clips, tmp_path, monkeypatch):
    seen = []

    def errors(denoiser, clean, t, noise, labels, given):
        seen.append((clean, given))
        return velocity_errors(denoiser, clean, t, noise, labels, given)

    monkeypatch.setattr("latentae.training.diffusion.velocity_errors", errors)
    module = make_module(given=GivenPlanes(first=1.0))
    runs.fit(module, make_data(clips, batch_size=8), tmp_path, 1)
    clean, given = seen[0]
    assert torch.equal(given, (LAYOUT.types == 0).expand(8, -1))
    with torch.no_grad():
        posterior = module.codec.autoencoder.encode(to_float(pixels_of(clips))).latent_dist
    modes = module.normalise(posterior.mode())
    for sample in clean:
        distance = (modes - sample)[:, LAYOUT.types == 0].abs().amax((1, 2))
        assert distance.min() < 1e-3
        nearest = int(distance.argmin())
        assert (modes[nearest] - sample)[LAYOUT.types != 0].abs().max() > 1e-3  # drawn


def test_it_learns_to_continue_a_given_frame(runs, tmp_path):
    """Of still clips of one brightness everything follows from the first frame, and nothing from noise alone."""
    rng = np.random.default_rng(0)
    still = {f"{i:02}.npy": np.full((3, 8, 8, 3), rng.integers(20, 235), np.uint8) for i in range(32)}
    folder = write_clips(tmp_path / "clips", still)
    codec = latentae.create(ENDPOINTS)
    with torch.no_grad():
        for head in codec.encoder.heads.values():  # without spread
            head.weight[4:], head.bias[4:] = 0, -30
    module = make_module(
        codec,
        given=GivenPlanes(first=0.5),
        denoiser={**SMALL, "num_layers": 2},
        normalisation_images=32,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
    )
    runs.fit(module, make_data(folder, size=8, frames=3, batch_size=32), tmp_path / "run", 150)
    layout = module.layout
    clean = module.normalise(module.posterior({"pixels": pixels_of_all(folder)}).mode())
    noise, t = torch.randn(clean.shape), torch.ones(len(clean))
    first = (layout.types == 0).expand(len(clean), -1)
    with torch.no_grad():
        known = velocity_errors(module.denoiser, clean, t, noise, None, first).mean()
        unknown = velocity_errors(module.denoiser, clean, t, noise, None).mean()
    assert known < 0.35 * unknown


def pixels_of_all(folder):
    return torch.from_numpy(np.stack([np.load(file) for file in sorted(folder.glob("*.npy"))])).permute(0, 4, 1, 2, 3)


# Runs


def test_a_crashed_run_repeats_the_uninterrupted_one(runs, clips, tmp_path):
    def go(run_dir, **options):
        module = make_module(given=GivenPlanes(0.3, 0.3), label_dropping=0.5, normalisation_images=4)
        return runs.fit(module, make_data(clips, flip=True), run_dir, 4, **options)

    straight = go(tmp_path / "straight")
    with pytest.raises(runs.Crash):
        go(tmp_path / "resumed", crash_at=2)
    resumed = go(tmp_path / "resumed")
    assert {step: straight[step] for step in resumed} == resumed


def test_a_checkpoint_says_what_it_is(runs, clips, tmp_path, capsys):
    module = make_module(given=GivenPlanes(first=0.5), normalisation_images=4)
    runs.fit(module, make_data(clips), tmp_path, 2)
    diffusion = load_diffusion(tmp_path)
    assert diffusion.layout == LAYOUT
    assert (diffusion.given, diffusion.autoencoder) == (("first",), ENDPOINTS)
    volume = torch.randn(2, 16, 3, 4, 4)
    torch.testing.assert_close(diffusion.normalise(volume), module.normalise(volume))
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["latents"] == "56 tokens of 4 channels, planes of 3 x 4 x 4 with 2 spatial"
    assert facts["given planes"] == "first"
    samples = module.draw_images(2, steps=2, guidance_scale=1.0)
    assert (samples.shape, samples.dtype) == ((2, 3, 5, 16, 16), torch.uint8)


def test_planes_train_in_bf16_on_the_tri_plane_too(runs, clips, tmp_path):
    codec = latentae.create("fourplane-tiny", spatial_planes=1)
    steps = runs.fit(make_module(codec), make_data(clips), tmp_path / "bf16", 4, precision="bf16-mixed")
    full = runs.fit(make_module(codec), make_data(clips), tmp_path / "full", 4)
    assert [v["loss"] for v in steps.values()] == pytest.approx([v["loss"] for v in full.values()], rel=0.03)


# Bad input


def volume():
    return latentae.create("fourplane-tiny", spatial_planes=0)


def means():
    return latentae.create("fourplane-tiny")


def triplane():
    return latentae.create("fourplane-tiny", spatial_planes=1, time_weights="endpoints")


REFUSALS = {
    "given, no endpoints": ({"codec": means, "given": (0.3, 0)}, {}, "endpoints.*; this one's are of halves: take"),
    "both of one plane": ({"codec": triplane, "given": (0, 0.3)}, {}, "has one spatial plane"),
    "shares": ({"given": (0.6, 0.6)}, {}, "first 0.6 and both 0.6 are shares"),
    "no planes": ({"codec": volume}, {}, "FourPlane, for video and without planes"),
    "no frames": ({}, {"frames": None}, r"holds clips: say how many frames to take of each with --data\.frames"),
    "one frame": ({}, {"frames": 1}, "clips of 1 frames are 1 frames long, .* takes clips of 2 to 5"),
    "no number of frames": ({}, {"frames": 4}, r"data\.frames 4 are not 1 more than a multiple .* 2: use 5"),
    "windows": ({}, {"frames": 16}, "are 8 frames long, .* clips of 2 to 5, whose windows of 9 frames"),
    "images": ({"codec": lambda: "dc-ae-tiny"}, {}, "DCAE, for images: leave data.frames out"),
    "size": ({}, {"size": 18}, r"data\.size 18 is not a multiple of the autoencoder's 4: use 16 or 20"),
    "denoiser": ({"denoiser": {"preset": "dit-tiny"}}, {}, "which are of planes: take a denoiser such as planes-s"),
}


def given_module(codec, given=(0.0, 0.0), **options):
    return make_module(codec, given=GivenPlanes(*given), **options)


@pytest.mark.parametrize("name", REFUSALS)
def test_one_sentence_for_what_cannot_be(runs, clips, tmp_path, name):
    options, data, message = REFUSALS[name]
    options = dict(options)
    codec = options.pop("codec", lambda: ENDPOINTS)
    with pytest.raises(RequestError, match=message) as caught:
        runs.fit(given_module(codec(), **options), make_data(clips, **data), tmp_path, 1)
    assert "\n" not in str(caught.value)


def test_given_planes_are_for_planes(runs, photo_folder, tmp_path):
    module = make_module("dc-ae-tiny", denoiser={"preset": "dit-tiny"}, given=GivenPlanes(first=0.5), num_classes=1)
    with pytest.raises(RequestError, match="these latents are no planes"):
        runs.fit(module, make_data(photo_folder, frames=None, size=32), tmp_path, 1)


def test_other_stores_are_refused(runs, clips, stores, tmp_path):
    other = tmp_path / "other"
    latentae.encode_dataset(clips, other, ENDPOINTS, size=16, frames=3, device="cpu", workers=1)
    with pytest.raises(RequestError, match=r"of different shapes, 16 x 3 x 4 x 4 and 16 x 2 x 4 x 4"):
        runs.fit(make_module(), make_data(stores / "mode", val_path=str(other)), tmp_path / "run", 1)
    latentae.encode_dataset(clips, tmp_path / "volume", volume(), size=16, frames=5, device="cpu", workers=1)
    with pytest.raises(RequestError, match="volumes of a FourPlane without planes"):
        runs.fit(make_module(None), make_data(tmp_path / "volume"), tmp_path / "run", 1)


# The recipes


@pytest.mark.parametrize("name", ["diffusion/planes", "diffusion/planes-tiny"])
def test_the_recipes_run_at_a_small_size(tmp_path, clips, capsys, name):
    header = find_recipe(name).read_text()
    assert f"--config {name} " in header
    assert all(word in header for word in ("# Hardware:", "# Expect:"))
    options = {
        "run_dir": tmp_path / "run",
        "model.denoiser.num_layers": 1,
        "model.denoiser.num_attention_heads": 2,
        "model.denoiser.attention_head_dim": 16,
        "model.codec": ENDPOINTS,
        "data.path": clips,
        "data.size": 16,
        "data.frames": 5,
        "data.batch_size": 2,
        "data.workers": 0,
        "data.val_fraction": 0.3,
        "trainer.devices": 1,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
    }
    command = ["--config", name, *(f"--{key}={value}" for key, value in options.items())]
    assert main(["fit", *command]) == 0
    assert "latentae export" in capsys.readouterr().err
    with Image.open(tmp_path / "run/samples/step-00000002.png") as picture:
        count = read_yaml(find_recipe(name))["images"]["count"]
        assert picture.size == (5 * 18 - 2, count * 18 - 2)  # a row of 5 frames for each
    diffusion = load_diffusion(tmp_path / "run")
    assert (diffusion.denoiser.num_classes, diffusion.given) == (2, ("first", "both"))
    assert main(["fit", *command, "--model.given", "null"]) == 2
    assert "was started with another configuration" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["planes-s", "planes-b", "planes-xl"])
def test_every_size_of_the_recipe_can_be_built(preset):
    recipe = read_yaml(find_recipe("diffusion/planes"))
    layout = PlaneLayout((recipe["data"]["frames"] - 1) // 4 + 1, 16, 16, planes=2, channels=8)
    assert layout.num_tokens == 672
    with torch.device("meta"):
        denoiser = create_denoiser({**recipe["model"]["denoiser"], "preset": preset}, layout, 101)
    millions = sum(p.numel() for p in denoiser.parameters()) / 1e6
    assert millions == pytest.approx({"planes-s": 33, "planes-b": 130, "planes-xl": 675}[preset], rel=0.02)
    assert recipe["data"]["batch_size"] * recipe["trainer"]["devices"] == 256
