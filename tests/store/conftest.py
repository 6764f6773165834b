"""Small images, small models, and stores read with nothing but numpy, pyarrow and json."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKL
from PIL import Image

import latentae


@pytest.fixture(autouse=True)
def _one_thread():
    """These images are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def write_images():
    """Write noise images of given (height, width) as PNG, or as what the name says, and return their pixels."""

    def write(folder: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        images = {}
        for i, (name, (height, width)) in enumerate(sizes.items()):
            coarse = np.random.default_rng(i).integers(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), np.uint8)
            image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            images[name] = image
        return images

    return write


@pytest.fixture
def seven(tmp_path, write_images):
    """A folder with seven images of 32 x 32 in two classes, and their pixels by key."""
    names = ["cats/a.png", "cats/b.png", "cats/c.png", "dogs/a.png", "dogs/b.png", "dogs/c.png", "dogs/d.png"]
    images = write_images(tmp_path / "seven", dict.fromkeys(names, (32, 32)))
    return tmp_path / "seven", images


@pytest.fixture(scope="session")
def dcae():
    """A deterministic autoencoder with ratio 8."""
    return latentae.create("dc-ae-tiny", seed=1)


@pytest.fixture(scope="session")
def kl():
    """A stock autoencoder with a distribution, ratio 4, 4 channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.25,
        shift_factor=0.125,
    ).eval()


@pytest.fixture
def reference_latents():
    """Raw latents of images, straight from the model, one by one: float32 (N, C, h, w)."""

    @torch.no_grad()
    def encode(model, images) -> np.ndarray:
        pixels = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1 for image in images]
        outputs = [model.encode(one) for one in pixels]
        return torch.cat([output.latent_dist.mode() for output in outputs]).numpy()

    return encode


class RawStore:
    """A store read without our reader."""

    def __init__(self, path: Path):
        self.path = path
        self.json = json.loads((path / "store.json").read_text())
        self.markers = [json.loads(p.read_text()) for p in sorted((path / "shards").glob("*.json"))]
        self.tensors = [safetensors.numpy.load_file(p) for p in sorted((path / "shards").glob("*.safetensors"))]
        rows = [pyarrow.parquet.read_table(p).to_pylist() for p in sorted((path / "shards").glob("*.parquet"))]
        self.rows = [row for shard in rows for row in shard]

    @property
    def latents(self) -> np.ndarray:
        return np.concatenate([tensors["latents"] for tensors in self.tensors])

    @property
    def quarantine(self) -> list[dict]:
        return pyarrow.parquet.read_table(self.path / "quarantine.parquet").to_pylist()


@pytest.fixture
def read_raw():
    return RawStore


@pytest.fixture
def tree():
    """Every file below a folder by name and hash."""

    def snapshot(folder: Path) -> dict[str, str]:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return snapshot
