"""Exports of a store, opened by the loader classes of the projects that they are for.

    python tools/check_formats.py --checkout DIR [--checkout DIR ...] [--json FILE]

DIR is a checkout of LightningDiT, fast-DiT, REPA, EDM2, MAR or efficientvit, or a folder of such. A store of 24 photos
and noise images is encoded by a small stock AutoencoderKL, with moments of each image and its mirror image, exported,
and opened by the loader class of each project, which is taken out of its file unchanged, with the
imports of that file. Every item that it gives is compared with the store. webdataset and datasets are the installed
packages. A project without a checkout is said to be missing and makes the exit code 1.
"""

import argparse
import ast
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latentae.console import format_table
from latentae.data.samples import dead_leaves
from latentae.data.transforms import adm_center_crop
from latentae.store.encode import encode_dataset
from latentae.store.formats import export_store
from latentae.store.reader import LatentStore

SIZE, IMAGES, CLASSES = 64, 24, 3


@dataclass(frozen=True)
class Peer:
    """A loader: its project, the file and the class in it, the format for it, and what compares its items."""

    project: str
    file: str
    loader: str
    format: str
    check: Callable[[Any, Path, LatentStore], int]


def lift(path: Path, name: str, root: Path) -> Any:
    """The class ``name`` of a file, with the classes that it uses and the imports of the file, and nothing else of it.

    ``root`` is that of the project, from which its own modules are imported.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    module = types.ModuleType(f"lifted_{name}")
    sys.modules[module.__name__] = module
    sys.path.append(str(root))
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            _run(node, path, module)
    sys.path.remove(str(root))
    module.__dict__.setdefault("pyspng", None)  # optional, for files that ours are not
    for needed in dict.fromkeys(_used(classes, name)):
        _run(classes[needed], path, module)
    return getattr(module, name)


def _run(node: ast.stmt, path: Path, module: types.ModuleType) -> None:
    try:
        exec(compile(ast.Module([node], []), str(path), "exec"), module.__dict__)
    except ImportError:  # of a package that the loader can do without: its names become empty classes
        for alias in node.names:  # type: ignore[attr-defined]
            name = alias.asname or alias.name.partition(".")[0]
            setattr(module, name, type(name, (), {}))


def _used(classes: dict[str, ast.ClassDef], name: str) -> Iterator[str]:
    """The classes of a file that a class uses, those first that others are made of, and itself."""
    for node in ast.walk(classes[name]):
        if isinstance(node, ast.Name) and node.id in classes and node.id != name:
            yield from _used(classes, node.id)
    yield name


def same(found: Any, expected: Any, what: str) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-5, atol=1e-5):
        raise AssertionError(f"{what}: {found.shape} {found.dtype} is not what the store has")


def check_lightningdit(loader: Any, folder: Path, store: LatentStore) -> int:
    data = loader(str(folder))
    plain = loader(str(folder), latent_norm=False)
    with torch.no_grad():
        values = torch.stack([torch.stack([_draw(store, i, end) for end in ("", "_flip")]) for i in range(len(store))])
    mean, std = values[:, 0].mean((0, 2, 3)).view(-1, 1, 1), values[:, 0].std((0, 2, 3)).view(-1, 1, 1)
    seen = set()
    for _ in range(8):  # it draws one of both each time
        for i in range(len(store)):
            latents, label = plain[i]
            flipped = bool((latents - values[i, 1]).abs().max() < 1e-5)
            same(latents, values[i, int(flipped)], "latents")
            same(label, store.labels[i], "label")
            seen.add((i, flipped))
    assert len(seen) == 2 * len(store)
    for i in range(len(store)):
        normalised, raw = data[i][0], values[i]
        assert any(torch.allclose(normalised, (z - mean) / std, atol=1e-4) for z in raw), "normalised latents"
    return len(data)


def _draw(store: LatentStore, index: int, end: str) -> torch.Tensor:
    """The draw of an entry by torch alone: the seed is documented, a hash of the seed and the key."""
    import hashlib

    item = store[index]
    seed = hashlib.sha256(f"0\0{item['key']}{end and chr(0) + end[1:]}".encode()).digest()[:8]
    mean, log_variance = item[f"moments{end}"].chunk(2)
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
    return mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)


def check_fastdit(loader: Any, folder: Path, store: LatentStore) -> int:
    data = loader(str(folder / f"imagenet{SIZE}_features"), str(folder / f"imagenet{SIZE}_labels"))
    for i in range(len(data)):
        latents, label = data[i]
        same(latents, store.normalise(_draw(store, i, ""))[None], "latents")
        same(label, [store.labels[i]], "label")
    return len(data)


def _mean_and_std(moments: torch.Tensor) -> torch.Tensor:
    mean, log_variance = moments.chunk(2)
    return torch.cat([mean, (0.5 * log_variance).exp()])


def check_repa(loader: Any, folder: Path, store: LatentStore) -> int:
    data = loader(str(folder))
    for i in range(len(data)):
        image, features, label = data[i]
        same(features, _mean_and_std(store[i]["moments"]), "moments")
        same(label, store.labels[i], "label")
        original = np.asarray(Image.open(folder.parent / "photos" / store.keys[i]).convert("RGB"))
        same(image, adm_center_crop(original, SIZE).transpose(2, 0, 1), "picture")
    return len(data)


def check_edm2(loader: Any, folder: Path, store: LatentStore) -> int:
    data = loader(str(folder))
    for i in range(len(data)):
        moments, onehot = data[i]
        same(moments, _mean_and_std(store[i]["moments"]), "moments")
        same(onehot, np.eye(CLASSES)[store.labels[i]], "label")
    return len(data)


def _by_name(data: Any, folder: Path, suffix: str, store: LatentStore) -> dict[int, int]:
    """Which entry of the store each item is, by the file that the loader names."""
    place = {key: i for i, key in enumerate(store.keys)}
    return {
        i: place[Path(path).relative_to(folder).as_posix().removesuffix(suffix)]
        for i, (path, _) in enumerate(data.samples)
    }


def check_mar(loader: Any, folder: Path, store: LatentStore) -> int:
    data = loader(str(folder))
    seen = set()
    for _ in range(8):
        for i, index in _by_name(data, folder, ".npz", store).items():
            moments, label = data[i]
            flipped = bool(np.abs(moments - store[index]["moments_flip"].numpy()).max() < 1e-5)
            same(moments, store[index]["moments_flip" if flipped else "moments"], "moments")
            same(label, store.labels[index], "label")
            seen.add((i, flipped))
    assert len(seen) == 2 * len(store)
    return len(data)


def check_dcae(loader: Any, folder: Path, store: LatentStore) -> int:
    configuration = types.SimpleNamespace(data_dir=str(folder))
    data, _, _ = loader.build_datasets(types.SimpleNamespace(cfg=configuration))
    for i, index in _by_name(data, folder, ".npy", store).items():
        latents, label = data[i]
        same(latents, store.normalise(_draw(store, index, "")), "latents")
        same(label, store.labels[index], "label")
    return len(data)


def check_webdataset(loader: Any, folder: Path, store: LatentStore) -> int:
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    count = 0
    for item, sample in zip(store, loader(tars, shardshuffle=False).decode()):
        assert sample["json"]["key"] == item["key"]
        same(sample["cls"], item["label"], "label")
        for name in ("moments", "moments_flip"):
            same(sample[f"{name}.npy"], item[name], name)
        count += 1
    return count


def check_parquet(loader: Any, folder: Path, store: LatentStore) -> int:
    data = loader("parquet", data_dir=str(folder), split="train", cache_dir=str(folder.parent / "cache"))
    for item, row in zip(store, data.with_format("torch")):
        assert (row["key"], int(row["label"])) == (item["key"], item["label"])
        for name in ("moments", "moments_flip"):
            same(row[name], item[name], name)
    return len(data)


PEERS = [
    Peer("LightningDiT", "datasets/img_latent_dataset.py", "ImgLatentDataset", "lightningdit", check_lightningdit),
    Peer("fast-DiT", "train.py", "CustomDataset", "fastdit", check_fastdit),
    Peer("REPA", "dataset.py", "CustomDataset", "repa", check_repa),
    Peer("EDM2", "training/dataset.py", "ImageFolderDataset", "edm2", check_edm2),
    Peer("MAR", "util/loader.py", "CachedFolder", "mar", check_mar),
    Peer(
        "efficientvit (DC-AE)",
        "efficientvit/diffusioncore/data_provider/latent_imagenet.py",
        "LatentImageNetDataProvider",
        "dcae",
        check_dcae,
    ),
]
PACKAGES = [
    Peer("webdataset", "webdataset", "WebDataset", "webdataset", check_webdataset),
    Peer("datasets", "datasets", "load_dataset", "parquet", check_parquet),
]


def find(peer: Peer, checkouts: list[Path]) -> Path | None:
    """The file of a loader below one of the checkouts."""
    for root in (folder for checkout in checkouts for folder in (checkout, *sorted(checkout.iterdir()))):
        path = root / peer.file
        if path.is_file() and f"class {peer.loader}" in path.read_text(encoding="utf-8"):
            return path
    return None


def make_store(folder: Path) -> LatentStore:
    """24 pictures of three classes and several sizes, encoded with moments of each and its mirror image."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    for number in range(IMAGES):
        path = folder / "photos" / f"class{number % CLASSES}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = dead_leaves(number, 96)
        Image.fromarray(picture[: 96 - number]).save(path)
    options: dict[str, Any] = {"size": SIZE, "shard_size": 10, "kind": "moments", "flip": True, "device": "cpu"}
    encode_dataset(folder / "photos", folder / "store", model, **options)
    return LatentStore(folder / "store")


def check(peer: Peer, loader: Any, folder: Path, store: LatentStore) -> dict[str, Any]:
    """Export for one loader, open, compare."""
    out = folder / peer.format
    export_store(store, out, peer.format, images=folder / "photos" if peer.format == "repa" else None)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    try:
        items = peer.check(loader, out, store)
        assert items == len(store), f"{items} items"
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}, "files were changed"
    except Exception as error:
        return {"opens": False, "error": f"{type(error).__name__}: {error}".replace(str(folder), "")}
    return {"opens": True, "items": items}


def revision(path: Path) -> str | None:
    """The commit of a checkout, where it is one of git."""
    command = ["git", "-C", str(path.parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = make_store(folder)
        for peer in [*PEERS, *PACKAGES]:
            about: dict[str, Any] = {"format": peer.format, "loader": peer.loader}
            if peer in PACKAGES:
                loader = getattr(importlib.import_module(peer.file), peer.loader)
                about |= {"version": importlib.metadata.version(peer.file)}
            elif (path := find(peer, args.checkout)) is None:
                results[peer.project] = about | {"opens": None, "error": "no checkout"}
                continue
            else:
                loader = lift(path, peer.loader, root=path.parents[len(Path(peer.file).parents) - 1])
                about |= {"file": peer.file, "commit": revision(path)}
            results[peer.project] = about | check(peer, loader, folder, store)
    words = {True: "yes", False: "NO", None: "-"}
    rows = []
    for project, r in results.items():
        version = (r.get("commit") or r.get("version") or "-")[:12]
        outcome = r.get("error") or f"{r['items']} items as stored"
        rows.append([project, r["format"], r["loader"], version, words[r["opens"]], outcome])
    print(format_table(["project", "format", "loader", "version", "opens", ""], rows))
    opened = sum(r["opens"] is True for r in results.values())
    print(f"{opened} of {len(results)} loaders, unmodified, read from the exports what the store holds")
    if args.json:
        setting = {"torch": torch.__version__, "images": IMAGES, "opened": opened, "loaders": len(results)}
        Path(args.json).write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")
    return 0 if opened == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
