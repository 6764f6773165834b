"""Clips into stores, out of them, and straight through an autoencoder."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from latentae.cli.main import main
from latentae.codec import LatentCodec
from latentae.data.transforms import adm_center_crop
from latentae.data.video import FrameChoice, open_video, write_video
from latentae.errors import DataError, RequestError
from latentae.nn.pixels import to_uint8
from latentae.store.decode import decode_store
from latentae.store.encode import encode_dataset
from latentae.store.reader import LatentStore
from latentae.store.reconstruction import reconstruct


@pytest.fixture(scope="module")
def wan():
    """A stock autoencoder of videos: ratio 4 in space and time."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1] * 4, latents_std=[2.0] * 4, scale_factor_spatial=4, scale_factor_temporal=4,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def ltx():
    """Another, with a distribution of its own making: ratio 4 in space, 2 in time."""
    from diffusers import AutoencoderKLLTXVideo

    torch.manual_seed(0)
    return AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False), decoder_inject_noise=(False, False, False),
        upsample_residual=(False, False), upsample_factor=(1, 1), patch_size=2,
    ).eval()  # fmt: skip


@pytest.fixture
def folder(tmp_path, clips):
    root = tmp_path / "clips"
    clips.write(root / "run/a.mp4", 9, fps=10, height=24, width=32)
    clips.write(root / "run/b.webm", 9, fps=Fraction(30000, 1001), codec="libvpx-vp9", height=26, width=30)
    clips.write(root / "walk/c.mp4", 6, fps=10, height=24, width=32)
    return root


def reference(model, clip):
    """Latents of one clip, uint8 (T, H, W, 3), straight from the model; padded as causal encoders want it."""
    pixels = torch.from_numpy(clip.transpose(3, 0, 1, 2).copy())[None] / 127.5 - 1
    with torch.no_grad():
        return model.encode(pixels).latent_dist.mode()[0]


def test_whole_clips_of_their_own_sizes(folder, tmp_path, wan, read_raw):
    summary = encode_dataset(folder, tmp_path / "store", wan, size="native")
    assert (summary.encoded, summary.bad, summary.shards, summary.unit) == (3, 0, 2, "clips")
    store = LatentStore(tmp_path / "store")
    assert store.holds_clips
    by_key = {store[i]["key"]: store[i] for i in range(3)}
    shapes = {key: tuple(row["latents"].shape) for key, row in by_key.items()}
    # of 9 frames, 9, and 6 with the last one repeated; 26 x 30 pixels are padded to 28 x 32
    assert shapes == {"run/a.mp4": (4, 3, 6, 8), "run/b.webm": (4, 3, 7, 8), "walk/c.mp4": (4, 3, 6, 8)}
    for key, height, width, count, fps in (
        ("run/a.mp4", 24, 32, 9, 10),
        ("run/b.webm", 26, 30, 9, 30000 / 1001),
        ("walk/c.mp4", 24, 32, 6, 10),
    ):
        row = by_key[key]
        assert (row["height"], row["width"], row["frames"], row["fps"]) == (height, width, count, fps)
        clip = open_video(folder / key).clip()
        clip = np.concatenate([clip, *[clip[-1:]] * (9 - count)])
        clip = np.pad(clip, ((0, 0), (0, -height % 4), (0, -width % 4), (0, 0)), mode="reflect")
        torch.testing.assert_close(row["latents"], reference(wan, clip), atol=1e-5, rtol=0)
    assert [row["label"] for row in by_key.values()] == [{"r": 0, "w": 1}[key[0]] for key in by_key]
    raw = read_raw(tmp_path / "store")
    assert raw.json["preprocess"]["frames"] == "all"
    assert store.statistics().mean.shape == (4,)
    assert encode_dataset(folder, tmp_path / "store", wan, size="native").encoded_now == 0


def test_the_first_frames_at_a_rate(folder, tmp_path, ltx):
    options = {"size": 16, "frames": 5, "fps": 5, "max_bad": 3, "kind": "moments"}
    summary = encode_dataset(folder, tmp_path / "store", ltx, **options)
    assert (summary.encoded, summary.shards, summary.reasons) == (1, 1, {"too-short": 2})
    store = LatentStore(tmp_path / "store")
    clip = open_video(folder / "run/a.mp4").clip()[::2]
    expected = reference(ltx, np.stack([adm_center_crop(frame, 16) for frame in clip]))
    torch.testing.assert_close(store[0]["latents"], expected, atol=1e-5, rtol=0)
    assert store[0]["moments"].shape == (2 * expected.shape[0], *expected.shape[1:])
    assert (store[0]["frames"], store[0]["fps"]) == (5, 5)
    with pytest.raises(RequestError, match=r"preprocess\.frames: 5 in the store, 4 now"):
        encode_dataset(folder, tmp_path / "store", ltx, **{**options, "frames": 4})
    with pytest.raises(RequestError, match=r'preprocess\.fps: "5" in the store, "10" now'):
        encode_dataset(folder, tmp_path / "store", ltx, **{**options, "fps": 10})


def test_decoded_clips_have_frames_size_and_rate(folder, tmp_path, wan):
    encode_dataset(folder, tmp_path / "store", wan, size="native")
    assert decode_store(tmp_path / "store", tmp_path / "out", wan).to_dict()["unit"] == "clips"
    decode_store(tmp_path / "store", tmp_path / "exact", wan, format="mkv")
    codec = LatentCodec(wan)
    for name in ("run/a", "run/b", "walk/c"):
        source = next(folder.glob(f"{name}.*"))
        there, back = open_video(source).info, open_video(tmp_path / "out" / f"{name}.mp4").info
        assert (there.frames, there.height, there.width, there.fps) == (back.frames, back.height, back.width, back.fps)
        pixels = torch.from_numpy(open_video(source).clip()).permute(3, 0, 1, 2)[None]
        expected = to_uint8(codec.reconstruct(pixels))[0].permute(1, 2, 3, 0).numpy().astype(int)
        written = open_video(tmp_path / "exact" / f"{name}.mkv").clip()
        assert np.abs(written - expected).max() <= 1


def test_bad_clips_are_rows_and_can_be_tried_again(folder, tmp_path, wan, read_raw, clips):
    whole = (folder / "run/a.mp4").read_bytes()
    (folder / "run/a.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "run/e.mp4").touch()
    with pytest.raises(DataError, match="2 of 4 inputs are bad"):
        encode_dataset(folder, tmp_path / "store", wan, size="native")
    raw = read_raw(tmp_path / "store")
    assert {row["key"]: row["reason"] for row in raw.quarantine} == {"run/a.mp4": "truncated", "run/e.mp4": "empty"}
    assert len(raw.rows) == 4
    # planned under the shape of what cannot be read, it does not fit there; with a size of its own it does
    options = {"size": 16, "frames": 5, "max_bad": 2}
    encode_dataset(folder, tmp_path / "sized", wan, **options)
    (folder / "run/a.mp4").write_bytes(whole)
    summary = encode_dataset(folder, tmp_path / "sized", wan, **options, retry_failed=True)
    assert (summary.encoded, summary.reasons) == (3, {"empty": 1})
    assert {LatentStore(tmp_path / "sized")[i]["fps"] for i in range(3)} == {10, 30000 / 1001}


def test_a_store_is_the_same_however_often_it_was_interrupted(folder, tmp_path, wan, tree, monkeypatch):
    from latentae.store import job

    encode_dataset(folder, tmp_path / "a", wan, size=16, frames=5, shard_size=1)
    real, published = job.publish, []

    def stop_after_one(*arguments, **options):
        if published:
            raise KeyboardInterrupt
        published.append(real(*arguments, **options))
        return published[-1]

    with monkeypatch.context() as patch:
        patch.setattr(job, "publish", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            encode_dataset(folder, tmp_path / "b", wan, size=16, frames=5, shard_size=1)
    encode_dataset(folder, tmp_path / "b", wan, size=16, frames=5, shard_size=1)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_folders_of_frames_and_animations_when_asked_for(tmp_path, clips, wan):
    frames = [Image.fromarray(frame) for frame in clips.frames(5, 16, 16)]
    (tmp_path / "in/walk").mkdir(parents=True)
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"in/walk/{number}.png")
    frames[0].save(tmp_path / "in/a.gif", save_all=True, append_images=frames[1:], duration=100)
    assert encode_dataset(tmp_path / "in", tmp_path / "images", wan, size=16).encoded == 6
    assert not LatentStore(tmp_path / "images").holds_clips
    assert encode_dataset(tmp_path / "in", tmp_path / "clips", wan, size=16, frames="all").encoded == 2
    decode_store(tmp_path / "clips", tmp_path / "out", wan)
    assert open_video(tmp_path / "out/walk.mp4").info.fps == 24
    assert open_video(tmp_path / "out/a.mp4").info.fps == 10


def test_an_autoencoder_of_images_takes_no_clips_into_a_store(folder, tmp_path, dcae):
    with pytest.raises(RequestError, match="DCAE is an autoencoder of images, and the inputs are clips"):
        encode_dataset(folder, tmp_path / "store", dcae, size=32)
    assert not (tmp_path / "store").exists()


def test_reconstructions_bear_the_same_names(folder, tmp_path, wan):
    (folder / "run/e.mp4").touch()
    summary = reconstruct(folder, tmp_path / "out", wan, max_bad=1)
    assert (summary.images, summary.unit, summary.bad) == (3, "clips", {"run/e.mp4": "empty"})
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert names == ["run/a.mp4", "run/b.mp4", "walk/c.mp4"]
    info = open_video(tmp_path / "out/run/b.mp4").info
    assert (info.frames, info.height, info.width, info.fps) == (9, 26, 30, Fraction(30000, 1001))
    reconstruct(folder / "run/a.mp4", tmp_path / "first", wan, frames=3, format="mkv")
    pixels = torch.from_numpy(open_video(folder / "run/a.mp4").clip(FrameChoice(3))).permute(3, 0, 1, 2)[None]
    expected = to_uint8(LatentCodec(wan).reconstruct(pixels))[0].permute(1, 2, 3, 0).numpy()
    np.testing.assert_array_equal(open_video(tmp_path / "first/a.mkv").clip(), expected)


def test_windows_are_independent(tmp_path, clips, wan):
    frames = clips.frames(7, 16, 16)
    write_video(tmp_path / "a.mkv", frames, 8)
    reconstruct(tmp_path / "a.mkv", tmp_path / "out", wan, window=3, format="mkv")
    codec = LatentCodec(wan)
    windows = [torch.from_numpy(frames[start : start + 3]).permute(3, 0, 1, 2)[None] for start in (0, 3, 6)]
    expected = [to_uint8(codec.reconstruct(window))[0].permute(1, 2, 3, 0) for window in windows]
    np.testing.assert_array_equal(open_video(tmp_path / "out/a.mkv").clip(), torch.cat(expected).numpy())


def test_an_autoencoder_of_images_takes_clips_frame_by_frame(tmp_path, clips, dcae):
    frames = clips.frames(5, 32, 40)
    write_video(tmp_path / "a.mkv", frames, 8)
    reconstruct(tmp_path / "a.mkv", tmp_path / "out", dcae, format="mkv", batch_size=2)
    expected = to_uint8(LatentCodec(dcae).reconstruct(torch.from_numpy(frames).permute(0, 3, 1, 2)))
    written = open_video(tmp_path / "out/a.mkv").clip().astype(int)
    assert np.abs(written - expected.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_a_clip_that_breaks_in_the_middle_leaves_no_file(tmp_path, clips, dcae):
    import av

    path = clips.write(tmp_path / "in/a.mp4", 30, crf="1", bf="0", height=32, width=32)
    with av.open(path) as container:
        packet = next(p for i, p in enumerate(container.demux(video=0)) if i == 20)
        place, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[place : place + size] = bytes(255 - byte for byte in data[place : place + size])
    path.write_bytes(data)
    assert reconstruct(tmp_path / "in", tmp_path / "out", dcae, max_bad=1).bad == {"a.mp4": "damaged"}
    assert not list((tmp_path / "out").iterdir())


def test_a_model_that_drops_frames_is_refused(folder, tmp_path):
    from diffusers import AutoencoderKLWan

    # Wan's code goes by four frames, whatever its configuration says of the ratio
    half = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.1] * 4,
        latents_std=[2.0] * 4, scale_factor_spatial=2, scale_factor_temporal=2,
    )  # fmt: skip
    with pytest.raises(RequestError, match="AutoencoderKLWan makes 3 frames of latents of 7 frames"):
        encode_dataset(folder / "walk", tmp_path / "store", half, size=16)
    with pytest.raises(RequestError, match="AutoencoderKLWan gives back 5 of 6 frames"):
        reconstruct(folder / "walk", tmp_path / "out", half)


def test_planes_of_long_clips_come_back_whole(tmp_path, clips):
    """A clip of several windows: their number and overlap are the model's own affair."""
    import latentae

    codec = LatentCodec(latentae.create("fourplane-tiny", seed=0))
    frames = clips.frames(40, 32, 36)
    write_video(tmp_path / "a.mkv", frames, 8)
    encode_dataset(tmp_path / "a.mkv", tmp_path / "store", codec, size="native")
    decode_store(tmp_path / "store", tmp_path / "out", codec, format="mkv")
    written = open_video(tmp_path / "out/a.mkv").clip().astype(int)
    expected = to_uint8(codec.reconstruct(torch.from_numpy(frames).permute(3, 0, 1, 2)[None]))[0]
    assert written.shape == frames.shape
    assert np.abs(written - expected.permute(1, 2, 3, 0).numpy()).max() <= 1


def test_on_the_command_line(folder, tmp_path, wan, capsys):
    wan.save_pretrained(tmp_path / "wan")
    model = ["--model", str(tmp_path / "wan")]
    store = str(tmp_path / "store")
    command = ["encode", str(folder), store, *model, "--size", "16", "--frames", "4", "--fps", "10"]
    assert main(command) == 0
    assert "3 of 3 clips in 1 shard (3 now, " in capsys.readouterr().out
    assert main(["decode", store, str(tmp_path / "out")]) == 0
    assert "3 clips (" in capsys.readouterr().out
    info = open_video(tmp_path / "out/run/b.mp4").info
    assert (info.frames, info.height, info.width, info.fps) == (4, 16, 16, 10)
    assert main(["info", store]) == 0
    assert "4" in capsys.readouterr().out
    assert main(["reconstruct", str(folder), str(tmp_path / "again"), *model, "--window", "5"]) == 0
    assert "3 clips (" in capsys.readouterr().out
    for arguments, message in (
        (["--frames", "some"], "frames='some'; expected a number of frames or 'all'"),
        (["--frames", "0"], "frames=0; expected at least 1"),
        (["--fps", "fast"], "'fast' frames per second: expected a positive number"),
        (["--stride", "0"], "stride=0; expected at least 1"),
    ):
        assert main(["encode", str(folder), str(tmp_path / "no"), *model, "--size", "16", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["reconstruct", str(folder), str(tmp_path / "no"), *model, "--format", "png"]) == 2
    assert "expected one of mp4, mkv" in capsys.readouterr().err
    assert main(["reconstruct", str(folder), str(folder / "no"), *model]) == 2
    assert not (tmp_path / "no").exists()
