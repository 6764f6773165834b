"""Latent diffusion: closed forms of Gaussians, guidance, resume, a store against images, every refusal, the recipes."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

import latentae
from latentae.cli.main import main
from latentae.denoisers import create_denoiser
from latentae.errors import DataError, RequestError
from latentae.loading import weights_hash
from latentae.loading.diffusion import is_diffusion_run, load_diffusion
from latentae.objectives import LogitNormalTimes
from latentae.store.reader import LatentStore
from latentae.training.config import read_yaml
from latentae.training.diffusion import LatentDiffusionModule
from latentae.training.latent_data import LatentData, class_names
from latentae.training.recipes import find_recipe, recipe_names
from latentae.training.stages import read_stages

SMALL = {"preset": "dit-tiny", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
RECIPES = [name for name in recipe_names() if name.startswith("diffusion/") and "planes" not in name]


class Pixels(ModelMixin, ConfigMixin):
    """The autoencoder that changes nothing: latents are the pixels, so their statistics are known."""

    @register_to_config
    def __init__(self, latent_channels: int = 3, spatial_compression_ratio: int = 1):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def encode(self, pixels):
        return SimpleNamespace(latent=pixels)

    def decode(self, latents):
        return SimpleNamespace(sample=latents)


def make_module(codec=None, **options):
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3), "ema": 0.9, **options}
    return LatentDiffusionModule(options.pop("denoiser", SMALL), codec, **options)


def make_data(path, **options):
    return LatentData(str(path), **{"size": 32, "batch_size": 4, "workers": 0, "val_fraction": 0.0, **options})


def write_images(folder, images):
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def noise_folder(tmp_path_factory):
    """Images of independent Gaussian pixels: no network can know more of them than their mean and spread."""
    rng = np.random.default_rng(0)
    images = {f"{i:03}.png": np.clip(rng.normal(120, 25, (8, 8, 3)).round(), 0, 255) for i in range(64)}
    images = {name: image.astype(np.uint8) for name, image in images.items()}
    return write_images(tmp_path_factory.mktemp("noise"), images)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Two folders of smooth pictures."""
    y, x = np.mgrid[:40, :40]
    images = {}
    for i in range(8):
        waves = [127 + 110 * np.sin(x / (3 + i) + y / (5 + c) + i) for c in range(3)]
        images[f"{'ab'[i % 2]}/{i}.png"] = np.stack(waves, -1).astype(np.uint8)
    return write_images(tmp_path_factory.mktemp("classes"), images)


@pytest.fixture(scope="module")
def stores(classes, tmp_path_factory):
    """Modes of a DC-AE and moments of a LiteVAE."""
    out = tmp_path_factory.mktemp("stores")
    for name, kind in [("dc-ae-tiny", "mode"), ("litevae-tiny", "moments")]:
        latentae.encode_dataset(classes, out / kind, name, size=32, kind=kind, shard_size=3, device="cpu", workers=1)
    return out


def copy_of(store, path):
    for file in store.rglob("*"):
        if file.is_file():
            (path / file.relative_to(store)).parent.mkdir(parents=True, exist_ok=True)
            (path / file.relative_to(store)).write_bytes(file.read_bytes())
    return path


# Closed forms


def test_normalised_pixels_have_mean_0_and_deviation_1(runs, noise_folder, tmp_path):
    module = make_module(Pixels(), normalisation_images=64)
    runs.fit(module, make_data(noise_folder, size=8, flip=True), tmp_path, 1)
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(noise_folder.iterdir())]) / 127.5 - 1
    for found, expected in ((module.latents_mean, pixels.mean((0, 1, 2))), (module.latents_std, pixels.std((0, 1, 2)))):
        torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)
    fewer = make_module(Pixels(), normalisation_images=3)
    runs.fit(fewer, make_data(noise_folder, size=8), tmp_path / "fewer", 1)
    assert not torch.allclose(fewer.latents_std, module.latents_std, rtol=1e-3)


@pytest.mark.parametrize("times", [None, LogitNormalTimes(0.5, 0.8)], ids=["uniform", "logit-normal"])
def test_the_best_velocity_of_gaussian_latents_has_the_loss_that_theory_says(runs, noise_folder, tmp_path, times):
    """Of x and noise both N(0, 1), E[v | z] = (2t - 1) z / ((1 - t)² + t²) with the error 1 / ((1 - t)² + t²) of the
    velocity, π / 2 on average over even times, as validation takes them."""
    module = make_module(Pixels(), times=times, ema=None, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    data = make_data(noise_folder, size=8, batch_size=64, val_fraction=0.5)
    module_setup = module.setup

    def setup(stage):
        module_setup(stage)
        scale = torch.nn.Parameter(torch.ones(()))

        def best(noisy, t, labels=None):
            t = t.view(-1, 1, 1, 1)
            return scale * (2 * t - 1) * noisy / ((1 - t) ** 2 + t**2)

        module.denoiser.register_parameter("scale", scale)
        module.denoiser.forward = best

    module.setup = setup
    steps = runs.fit(module, data, tmp_path, 39)  # the tenths of time begin anew where they are logged, at step 30
    trainer = runs.trainer(tmp_path / "validate", 1)
    held_out = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    assert held_out == pytest.approx(math.pi / 2, rel=0.03)
    drawn = (times or SimpleNamespace(draw=torch.rand_like)).draw(torch.empty(100000))
    expected = (1 / ((1 - drawn) ** 2 + drawn**2)).mean().item()
    assert np.mean([values["loss"] for values in steps.values()]) == pytest.approx(expected, rel=0.02)
    by_tenth = module.loss_by_time.means("loss")
    assert by_tenth["loss_t5"] == pytest.approx(10 * (math.atan(0.2) - math.atan(0.0)), rel=0.05)


def test_it_learns_two_classes_and_guidance_moves_them_apart(runs, tmp_path):
    rng = np.random.default_rng(0)
    images = {}
    for i in range(64):
        level = (100 if i % 2 else 140) + rng.normal(0, 30)
        image = np.clip(level + rng.normal(0, 10, (4, 4, 3)), 0, 255).astype(np.uint8)
        images[f"{'light' if i % 2 == 0 else 'dark'}/{i}.png"] = image
    folder = write_images(tmp_path / "images", images)
    module = make_module(
        Pixels(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), denoiser={**SMALL, "num_layers": 2}
    )
    steps = runs.fit(module, make_data(folder, size=4, batch_size=64), tmp_path / "run", 250)
    losses = [values["loss"] for values in steps.values()]
    assert np.mean(losses[-50:]) < 0.6 * np.mean(losses[:10])

    def brightness(guidance_scale):
        images = module.draw_images(64, steps=10, guidance_scale=guidance_scale).float()
        return images[32:].mean() - images[:32].mean()  # light is the second of the two folders

    plain, guided = brightness(1.0), brightness(3.0)
    assert 25 < plain < 60  # 40 in the images
    assert guided > 1.5 * plain
    diffusion = load_diffusion(tmp_path / "run")
    assert diffusion.labels == {0: "dark", 1: "light"}


# The same latents from a store and from images


@pytest.mark.parametrize("kind", ["mode", "moments"])
def test_a_store_and_images_give_the_same_run(runs, classes, stores, tmp_path, kind):
    """Also of moments, of which each step draws anew: the losses are equal, so latents and draws are."""
    name = {"mode": "dc-ae-tiny", "moments": "litevae-tiny"}[kind]
    options = {"normalisation_images": 8, "denoiser": {**SMALL, "patch_size": 2}}
    from_store = runs.fit(make_module(**options), make_data(stores / kind), tmp_path / "store", 5)
    on_the_fly = runs.fit(make_module(name, **options), make_data(classes), tmp_path / "images", 5)
    for step, values in from_store.items():
        assert values == pytest.approx(on_the_fly[step], rel=1e-3)
    one, two = (load_diffusion(tmp_path / way) for way in ("store", "images"))
    torch.testing.assert_close(one.mean, two.mean)
    torch.testing.assert_close(one.std, two.std)
    assert one.autoencoder_sha256 == two.autoencoder_sha256
    assert one.labels == two.labels == {0: "a", 1: "b"}


def test_moments_are_drawn_from_anew_in_every_step(runs, stores, tmp_path):
    module = make_module()
    runs.fit(module, make_data(stores / "moments"), tmp_path, 1)
    entry = LatentStore(stores / "moments")[0]
    mean, log_variance = entry["moments"].chunk(2)
    posterior = module.posterior({"moments": entry["moments"][None]})
    torch.testing.assert_close(posterior.mode()[0], mean)
    torch.testing.assert_close(posterior.std[0], (0.5 * log_variance).exp())
    statistics = LatentStore(stores / "moments").statistics()
    torch.testing.assert_close(module.latents_std, statistics.sample_std.float())


@pytest.mark.parametrize("kind", ["mode", "moments"])
def test_the_model_s_own_normalisation_is_the_codec_s(runs, stores, tmp_path, kind):
    module = make_module(normalisation="model")
    runs.fit(module, make_data(stores / kind), tmp_path, 1)
    latents = torch.randn(2, *module.denoiser.latent_shape)
    torch.testing.assert_close(module.normalise(latents), LatentStore(stores / kind).normalise(latents, by="model"))
    torch.testing.assert_close(module.as_diffusion().denormalise(module.normalise(latents)), latents)


def test_held_out_samples_are_the_same_in_both_ways(runs, classes, stores, tmp_path):
    from_store, from_images = make_data(stores / "mode", val_fraction=0.4), make_data(classes, val_fraction=0.4)
    for data in (from_store, from_images):
        data.setup("fit")
    for part in ("train_set", "val_set"):
        one, two = (getattr(data, part) for data in (from_store, from_images))
        assert [one[i]["key"] for i in range(len(one))] == [two[i]["key"] for i in range(len(two))]
    assert 1 < len(from_store.val_set) < 8


def test_half_of_the_images_are_mirrored(classes):
    plain, mirrored = (make_data(classes, flip=flip) for flip in (False, True))
    for data in (plain, mirrored):
        data.setup("fit")
    positions = range(200)
    flipped = [not torch.equal(plain.train_set[i]["pixels"], mirrored.train_set[i]["pixels"]) for i in positions]
    for i in [position for position in positions if flipped[position]][:5]:
        assert torch.equal(plain.train_set[i]["pixels"].flip(-1), mirrored.train_set[i]["pixels"])
    assert 75 < sum(flipped) < 125


# Runs


@pytest.mark.parametrize(("accumulate", "crashes", "workers"), [(1, [2, 1], 0), (2, [5], 1)])
def test_a_crashed_run_repeats_the_uninterrupted_one(runs, stores, tmp_path, accumulate, crashes, workers):
    def go(run_dir, **options):
        module = make_module(accumulate=accumulate, label_dropping=0.5)
        return runs.fit(module, make_data(stores / "moments", workers=options.pop("workers", 0)), run_dir, 4, **options)

    straight = go(tmp_path / "straight")
    for crash_at in crashes:
        with pytest.raises(runs.Crash):
            go(tmp_path / "resumed", crash_at=crash_at, workers=workers)
    resumed = go(tmp_path / "resumed", workers=workers)
    assert {step: straight[step] for step in resumed} == resumed
    one, two = (
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("straight", "resumed")
    )
    for key in ("state_dict", "latentae_ema"):
        assert one[key].keys() == two[key].keys()
        assert all(torch.equal(one[key][name], value) for name, value in two[key].items())
    assert one["latentae_progress"] == two["latentae_progress"]


def test_a_resumed_run_keeps_the_normalisation_that_it_measured(runs, classes, tmp_path, capsys):
    runs.fit(make_module("dc-ae-tiny", normalisation_images=2), make_data(classes), tmp_path, 1)
    before = load_diffusion(tmp_path)
    assert "on the first 2 of the training samples" in capsys.readouterr().err
    runs.fit(make_module("dc-ae-tiny", normalisation_images=8), make_data(classes), tmp_path, 2)
    assert "Measuring" not in capsys.readouterr().err
    torch.testing.assert_close(load_diffusion(tmp_path).std, before.std)


def test_a_checkpoint_holds_the_averaged_denoiser_and_no_codec(runs, classes, tmp_path, capsys):
    module = make_module("dc-ae-tiny", normalisation_images=8)
    runs.fit(module, make_data(classes), tmp_path, 3)
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"denoiser", "latents_mean", "latents_std"}
    diffusion = load_diffusion(tmp_path)
    assert diffusion.autoencoder == "dc-ae-tiny"
    for name, value in diffusion.denoiser.state_dict().items():
        assert torch.equal(value, checkpoint["latentae_ema"][name])
    assert not torch.equal(diffusion.denoiser.state_dict()["transformer.proj_out_2.weight"],
                           checkpoint["state_dict"]["denoiser.transformer.proj_out_2.weight"])  # fmt: skip
    latents = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(diffusion.normalise(latents), module.normalise(latents))

    assert is_diffusion_run(tmp_path)
    with pytest.raises(RequestError, match=r"holds a denoiser of latents, not an autoencoder: open its .*dc-ae-tiny"):
        latentae.load(tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["class"] == "DiTTransformer2DModel"
    assert facts["classes"] == 2
    assert facts["autoencoder"] == "dc-ae-tiny"


def test_an_autoencoder_is_no_diffusion_run(runs, folder, tmp_path):
    runs.fit(runs.module(), runs.data(folder), tmp_path, 1)
    assert not is_diffusion_run(tmp_path)
    assert not is_diffusion_run(tmp_path / "nothing")
    with pytest.raises(RequestError, match="holds no denoiser"):
        load_diffusion(tmp_path)


def test_validation_depends_on_neither_the_batches_nor_the_training(runs, stores, tmp_path):
    """And goes by averaged weights."""
    values = []
    for batch_size in (1, 3):
        module = make_module()
        data = make_data(stores / "moments", val_fraction=0.6, batch_size=batch_size)
        runs.fit(module, make_data(stores / "moments", val_fraction=0.6), tmp_path / str(batch_size), 3)
        trainer = runs.trainer(tmp_path, 1)
        values += [trainer.validate(module, data, verbose=False)[0]["val/loss"] for _ in range(2)]
        module.ema.average = {name: torch.zeros_like(value) for name, value in module.ema.average.items()}
        of_nothing = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    assert values[0] == values[1]
    assert values[2] == pytest.approx(values[0], rel=1e-5)
    assert abs(of_nothing - values[0]) > 1e-3


def test_without_classes_labels_play_no_part(runs, classes, folder, tmp_path):
    """Of a folder without subfolders, or where it is asked for."""
    for path, options in ((folder, {}), (classes, {"num_classes": 1})):
        module = make_module("dc-ae-tiny", normalisation_images=4, **options)
        runs.fit(module, make_data(path), tmp_path / path.name, 2)
        assert module.denoiser.num_classes == 1
        assert module.labels({"label": torch.tensor([0, 1])}) is None
        assert load_diffusion(tmp_path / path.name).labels is None


def test_dropped_labels_are_the_null_label_in_the_asked_share(runs, stores, tmp_path, monkeypatch):
    seen = []
    module = make_module(label_dropping=0.25)
    monkeypatch.setattr(
        "latentae.training.diffusion.velocity_errors",
        lambda denoiser, clean, t, noise, labels, given: (
            seen.append(labels) or denoiser.transformer.proj_out_2.bias.sum() * t
        ),
    )
    runs.fit(module, make_data(stores / "mode", batch_size=100), tmp_path, 8)
    labels = torch.cat(seen)
    assert set(labels.tolist()) == {0, 1, 2}
    assert 0.2 < (labels == 2).float().mean() < 0.3


@pytest.mark.parametrize("preset", ["dit-tiny", "pixart-tiny", "sana-tiny"])
def test_every_transformer_trains_in_bf16_with_gradient_checkpointing(runs, stores, tmp_path, preset):
    module = make_module(denoiser={"preset": preset, "num_layers": 2, "patch_size": 2}, gradient_checkpointing=True)
    steps = runs.fit(module, make_data(stores / "moments"), tmp_path / "bf16", 6, precision="bf16-mixed")
    assert all(np.isfinite(values["loss"]) for values in steps.values())
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    plain = make_module(denoiser={"preset": preset, "num_layers": 2, "patch_size": 2})
    full = runs.fit(plain, make_data(stores / "moments"), tmp_path / "full", 6)
    assert [v["loss"] for v in steps.values()] == pytest.approx([v["loss"] for v in full.values()], rel=0.03)


# Bad input


def without_statistics(store, _):
    for marker in (store / "shards").glob("*.json"):
        content = json.loads(marker.read_text())
        del content["sum"]
        marker.write_text(json.dumps(content))


def emptied(store, _):
    for marker in (store / "shards").glob("*.json"):
        marker.unlink()


def poisoned(store, _):
    from safetensors.torch import load_file, save_file

    for file in (store / "shards").glob("*.safetensors"):
        tensors = load_file(file)
        tensors["latents"][-1, 0, 0, 0] = torch.nan
        save_file(tensors, file)


def without_a_label(store, tables):
    path = store / "shards/00000.parquet"
    rows = tables.read_table(path).to_pydict()
    rows["label"][1] = None
    schema = tables.read_schema(path)
    import pyarrow

    tables.write_table(pyarrow.table(rows, schema=schema), path)
    marker = store / "shards/00000.json"
    content = json.loads(marker.read_text())
    content["rows"]["bytes"] = path.stat().st_size
    marker.write_text(json.dumps(content))


BAD_STORES = {
    "without statistics": (without_statistics, {}, "has shards without statistics: encode them again"),
    "empty": (emptied, {}, "is a store without latents: run 'latentae encode'"),
    "not a number": (poisoned, {}, r"The latents of [ab]/\d\.png in .* are not all finite"),
    "of another codec": (None, {"codec": "litevae-tiny"}, r"latents of dc-ae-tiny \(weights .*not of litevae-tiny"),
    "a missing label": (without_a_label, {}, r"1 of the 8 samples of .* have no label, such as .*num_classes 1"),
    "no such denoiser": (None, {"denoiser": {"preset": "dit-nano"}}, "There is no denoiser 'dit-nano'"),
    "no class": (None, {"num_classes": 0}, "expected at least 1"),
    "patches": (None, {"denoiser": {**SMALL, "patch_size": 3}}, "patches of 3 do not divide latents of 4 x 4"),
    "label dropping": (None, {"label_dropping": 1.0}, "from 0 to below 1, not 1.0"),
}


@pytest.mark.parametrize("name", BAD_STORES)
def test_a_bad_store_is_refused_in_one_sentence(runs, stores, tmp_path, name):
    import pyarrow.parquet as tables

    spoil, options, message = BAD_STORES[name]
    store = copy_of(stores / "mode", tmp_path / "store")
    if spoil:
        spoil(store, tables)
    with pytest.raises((RequestError, DataError), match=message) as caught:
        runs.fit(make_module(**options), make_data(store), tmp_path / "run", 4)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/checkpoints").exists() or name == "not a number"


def test_labels_beyond_the_classes_are_refused(runs, classes, tmp_path):
    (tmp_path / "three").mkdir()
    images = {f"{c}/{i}.png": np.full((8, 8, 3), i, np.uint8) for i, c in enumerate("abc")}
    folder = write_images(tmp_path / "three", images)
    with pytest.raises(RequestError, match=r"c/2\.png of .* has label 2, but model\.num_classes 2 allows 0 to 1"):
        runs.fit(make_module(Pixels(), num_classes=2), make_data(folder, size=8), tmp_path / "run", 1)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({}, {}, r"Images must be encoded: name their autoencoder with --model\.codec"),
        (
            {"codec": "dc-ae-tiny"},
            {"size": 30},
            r"data\.size 30 is not a multiple of the autoencoder's 8: use 24 or 32",
        ),
        ({"codec": "litevae-tiny"}, {"val_path": True, "size": 64}, r"of different shapes, 4 x 8 x 8 and 4 x 4 x 4"),
        ({"codec": Pixels(), "normalisation_images": 0}, {}, r"normalisation_images is 0"),
    ],
    ids=["no codec", "size", "another validation", "no images"],
)
def test_images_that_cannot_be_trained_on(runs, classes, stores, tmp_path, options, data, message):
    if data.get("val_path"):
        data = {**data, "val_path": str(stores / "moments")}
    with pytest.raises(RequestError, match=message):
        runs.fit(make_module(**options), make_data(classes, **data), tmp_path, 1)


def test_a_channel_that_never_varies_is_named(runs, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
    image[..., 1] = 7
    folder = write_images(tmp_path / "images", {"a.png": image, "b.png": image})
    with pytest.raises(RequestError, match=r"Channel 1 of the latents .* has the standard deviation 0"):
        runs.fit(make_module(Pixels()), make_data(folder, size=8), tmp_path / "run", 1)


def test_names_of_classes_are_folders_or_none():
    assert class_names([("dog/1.png", 1), ("cat/a/1.png", 0), ("dog/2.png", 1)]) == {0: "cat", 1: "dog"}
    assert class_names([("x/1.png", 1), ("x/2.png", 0)]) is None
    assert class_names([("x/1.png", 1), ("y/2.png", 1)]) is None
    assert class_names([("1.png", 1)]) is None


# The command


def small_options(tmp_path, *more):
    options = {
        "--run_dir": tmp_path / "run",
        "--model.denoiser.num_layers": 1,
        "--model.denoiser.num_attention_heads": 2,
        "--model.denoiser.attention_head_dim": 16,
        "--model.codec": "dc-ae-tiny",
        "--data.size": 32,
        "--data.batch_size": 2,
        "--data.workers": 0,
        "--data.val_fraction": 0.3,
        "--trainer.devices": 1,
        "--trainer.accelerator": "cpu",
        "--trainer.max_steps": 2,
        "--trainer.val_check_interval": 2,
    }
    return [f"{key}={value}" for key, value in options.items()] + list(more)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_run_at_a_small_size(tmp_path, classes, capsys, name):
    header = find_recipe(name).read_text()
    assert f"--config {name}" in header
    assert all(word in header for word in ("# Hardware:", "# Expect:"))
    assert main(["fit", "--config", name, *small_options(tmp_path, f"--data.path={classes}")]) == 0
    printed = capsys.readouterr()
    assert printed.out.split()[-2] == "loss"
    assert f"Make a diffusers pipeline of it with 'latentae export {tmp_path / 'run'} DIR'" in printed.err
    count = read_yaml(find_recipe(name))["images"]["count"]
    columns = math.ceil(math.sqrt(count))
    with Image.open(tmp_path / "run/samples/step-00000002.png") as picture:
        assert picture.width == columns * 34 - 2
    assert load_diffusion(tmp_path / "run").denoiser.num_classes == 2


@pytest.mark.parametrize("name", [name for name in RECIPES if "tiny" not in name])
@pytest.mark.parametrize("preset", ["dit-s", "dit-b", "dit-xl"])
def test_every_size_of_the_recipes_can_be_built(name, preset):
    """With the latents of the autoencoder that the recipe names."""
    recipe = read_yaml(find_recipe(name))
    ratio, patch = (int(number) for number in name.removeprefix("diffusion/dit-f").split("p"))
    channels, side = {8: 4, 32: 32, 64: 128}[ratio], recipe["data"]["size"] // ratio
    with torch.device("meta"):
        denoiser = create_denoiser({**recipe["model"]["denoiser"], "preset": preset}, (channels, side, side), 1000)
    assert denoiser.transformer.config.patch_size == patch
    assert recipe["data"]["batch_size"] * recipe["trainer"]["devices"] == 256


def test_a_store_runs_and_validates_by_the_same_commands(tmp_path, stores, capsys):
    store = stores / "mode"
    command = ["--config", "diffusion/tiny", *small_options(tmp_path, f"--data.path={store}")]
    assert main(["fit", *command]) == 0
    capsys.readouterr()
    assert main(["fit", *command]) == 0
    assert "is finished: 2 of 2 steps are done" in capsys.readouterr().err
    assert main(["validate", "--run_dir", str(tmp_path / "run")]) == 0
    own = capsys.readouterr().out
    assert main(["validate", "--run_dir", str(tmp_path / "run"), "--data.val_path", str(store)]) == 0
    assert capsys.readouterr().out != own
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["model"]["codec"] == "dc-ae-tiny"
    assert saved["model"]["denoiser"]["num_layers"] == 1


def test_stages_train_an_autoencoder_and_then_a_denoiser_of_its_latents(tmp_path, classes):
    (tmp_path / "both.yaml").write_text("[{config: demo, run_dir: codec}, {config: diffusion/tiny, run_dir: flow}]")
    options = [option for option in small_options(tmp_path) if "model" not in option and "run_dir" not in option]
    first, second = read_stages(tmp_path / "both.yaml", tmp_path, [*options, f"--data.path={classes}"])
    for stage in (first, second):
        assert main(["fit", *stage.arguments]) == 0
    assert load_diffusion(second.run_dir).autoencoder == str(first.run_dir)
    assert load_diffusion(second.run_dir).autoencoder_sha256 == weights_hash(latentae.load(first.run_dir))


COMMAND_ERRORS = {
    "--model.denoiser.preset=dit-tny": "There is no denoiser 'dit-tny'; did you mean dit-tiny?",
    "--model.label_droping=0.2": "model.label_droping is unknown; did you mean label_dropping?",
    "--model.denoiser.num_layer=1": "has no argument 'num_layer' of its own; did you mean num_layers?",
    "--model.normalisation=own": "model.normalisation",
    "--model.autoencoder.preset=dc-ae-tiny": "model.autoencoder is unknown",
    "--data.val_sizes=[32]": "data.val_sizes is unknown; did you mean val_",
    "--model.codec=dc-ae-tin": "did you mean dc-ae-tiny",
    "--images.steps=0": "images.steps is 0",
    "--trainer.precision=16-true": "trainer.precision 16-true is not supported",
}


@pytest.mark.parametrize("option", COMMAND_ERRORS)
def test_errors_of_the_command_are_one_line(tmp_path, classes, capsys, option):
    command = ["fit", "--config", "diffusion/tiny", *small_options(tmp_path, f"--data.path={classes}", option)]
    assert main(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert COMMAND_ERRORS[option] in errors[0]
