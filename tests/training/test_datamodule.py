"""The data of a run: what is held out, positions and ranks, the bundled photos."""

from itertools import chain, islice

import pytest
import torch

from latentae.data.samples import photos
from latentae.data.sources import Item, ItemTable, open_source
from latentae.errors import DataError, RequestError
from latentae.training.datamodule import ImageData, PositionBatches, SamplePhotos, hold_out


class Names:
    """A source of names alone."""

    def __init__(self, names):
        self._items = ItemTable.of(Item(name, name, 0) for name in sorted(names))

    def items(self):
        return self._items


def keys(source):
    return [item.key for item in source.items()]


def test_the_split_is_complete_and_disjoint_and_about_as_large_as_asked():
    names = [f"{i:05d}.png" for i in range(5000)]
    trained, held_out = hold_out(Names(names), 0.1)
    assert sorted(keys(trained) + keys(held_out)) == names
    assert 430 < len(held_out.items()) < 570
    assert keys(trained) == sorted(keys(trained))


def test_a_larger_folder_moves_no_image_across():
    names = [f"{i:05d}.png" for i in range(1000)]
    _, before = hold_out(Names(names), 0.1)
    _, after = hold_out(Names(names + [f"new-{i}.png" for i in range(1000)]), 0.1)
    assert set(keys(before)) == {key for key in keys(after) if not key.startswith("new")}


def test_small_folders_hold_out_one_and_never_the_last():
    trained, held_out = hold_out(Names(["a", "b", "c"]), 1e-9)
    assert (len(trained.items()), len(held_out.items())) == (2, 1)
    trained, held_out = hold_out(Names(["a", "b", "c"]), 1.0)
    assert (len(trained.items()), len(held_out.items())) == (1, 2)
    trained, held_out = hold_out(Names(["a"]), 0.5)
    assert (len(trained.items()), len(held_out.items())) == (1, 0)
    trained, held_out = hold_out(Names(["a", "b"]), 0.0)
    assert (len(trained.items()), len(held_out.items())) == (2, 0)


def test_ranks_share_the_positions_of_one_large_batch():
    whole = list(islice(PositionBatches(start=7, batch_size=6), 4))
    ranks = [list(islice(PositionBatches(7, 2, rank, 3), 4)) for rank in range(3)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole
    assert whole[0] == [7, 8, 9, 10, 11, 12]
    assert whole[3][-1] == 7 + 4 * 6 - 1


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_bundled_photos_come_out_of_their_source_unchanged(split):
    from latentae.data.decode import decode_image

    source, wanted = SamplePhotos(split), photos(split)
    assert keys(source) == sorted(wanted)
    for item in source.items():
        assert (decode_image(source.read(item)) == wanted[item.key]).all()


def test_validation_sees_the_held_out_folder_in_the_same_order(runs, folder, photo_folder, tmp_path):
    seen = []

    class Watch(runs.Recorder):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_, **__):
            seen.append(list(batch["key"]))

    data = runs.data(folder, val_path=str(photo_folder), val_images=3)
    runs.trainer(tmp_path, 2, Watch(), val_check_interval=1).fit(runs.module(), data)
    first = keys(open_source(photo_folder))[:3]
    assert seen == [first[:2], first[2:]] * 2
    assert len(data.train_source.items()) == 5, "with val_path nothing of path is held out"


def test_a_broken_image_is_let_pass_once_and_many_stop_the_run(runs, folder, tmp_path):
    def broken_folder(name, count):
        target = tmp_path / name
        target.mkdir()
        for i, path in enumerate(sorted(folder.iterdir())):
            (target / path.name).write_bytes(b"not a png" if i < count else path.read_bytes())
        return target

    runs.fit(runs.module(), runs.data(broken_folder("one", 1), val_fraction=0, workers=1), tmp_path / "a", 3)
    from latentae.training.cli import fit_command

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {autoencoder: {preset: dc-ae-tiny}, objective: {l1: {class_path: L1}}}\n"
        "data: {size: 32, batch_size: 2, workers: 1, val_fraction: 0}\n"
        "trainer: {max_steps: 9, accelerator: cpu}\n"
    )
    with pytest.raises(DataError, match=r"^\d of 5 images cannot be decoded") as caught:
        fit_command(
            ["--config", str(recipe), "--data.path", str(broken_folder("many", 4)), "--run_dir", str(tmp_path / "b")]
        )
    assert "\n" not in str(caught.value), "the traceback of the worker must not be part of the message"


def test_no_path_and_a_wrong_path_are_one_sentence(runs, tmp_path):
    for path, message in [(None, "--data.path"), (str(tmp_path / "nowhere"), "nowhere does not exist")]:
        with pytest.raises(RequestError, match=message):
            runs.fit(runs.module(), ImageData(path), tmp_path, 1)


def test_batches_are_uint8_squares(runs, folder, tmp_path):
    trainer = runs.trainer(tmp_path, 1)
    data = runs.data(folder, size=40, batch_size=3)
    trainer.fit(runs.module(), data)
    batch = next(iter(data.train_dataloader()))
    assert batch["pixels"].shape == (3, 3, 40, 40)
    assert batch["pixels"].dtype == torch.uint8
