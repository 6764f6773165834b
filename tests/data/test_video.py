"""Reading clips: every frame by its number, times, colours, rotation; and files that are broken or hostile."""

import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from latentae.data.decode import DecodePolicy
from latentae.data.video import BadVideo, FrameChoice, VideoInfo, frame_numbers, frame_rate, open_video, write_video
from latentae.errors import MissingExtra, RequestError

CODECS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}


def read(path, numbers):
    video = open_video(path)
    return video.clip() if numbers is None else list(video.frames(numbers))


def reason(path, numbers=None):
    with pytest.raises(BadVideo) as raised:
        read(path, numbers)
    assert raised.value.explanation
    return raised.value.reason


@pytest.mark.parametrize("extension", CODECS)
def test_every_frame_of_every_container_is_the_one_of_its_number(extension, tmp_path, clips):
    path = clips.write(tmp_path / f"a.{extension}", 40, fps=30, codec=CODECS[extension])
    video = open_video(path)
    assert (video.info.height, video.info.width, video.info.frames, video.info.fps) == (48, 64, 40, 30)
    assert clips.read(video.clip()) == list(range(40))
    for numbers in ([0], [39], [17, 18, 19], [5, 5, 31], [13, 26, 39]):
        assert clips.read(video.frames(numbers)) == numbers
    assert [clips.read(window) for window in video.windows(16)] == [[*range(16)], [*range(16, 32)], [*range(32, 40)]]


def test_b_frames_without_presentation_times_come_in_the_order_of_display(tmp_path, clips):
    path = clips.write(tmp_path / "a.avi", 30, codec="libx264", bf="3")
    assert clips.read(open_video(path).clip()) == list(range(30))


@pytest.mark.parametrize("extension", ["mp4", "mkv"])  # exact times, and times in whole milliseconds
@pytest.mark.parametrize(("source", "target"), [(30, 10), (25, 10), (30, 24), (Fraction(30000, 1001), 12), (10, 25)])
def test_frames_at_another_rate(extension, source, target, tmp_path, clips):
    path = clips.write(tmp_path / f"a.{extension}", 31, fps=source)
    video, fps = open_video(path), Fraction(target)
    assert video.info.fps == source
    expected = []
    while len(expected) / fps < 31 / Fraction(source):
        nearest = int(len(expected) * Fraction(source) / fps + Fraction(1, 2))
        expected.append(min(nearest, 30))
    assert clips.read(video.clip(FrameChoice(fps=fps))) == expected
    shown = video.clip(FrameChoice(5, fps, stride=2), start=3)
    assert clips.read(shown) == [int(3 + 2 * k * Fraction(source) / fps + Fraction(1, 2)) for k in range(5)]


def test_a_stride_counts_frames(tmp_path, clips):
    video = open_video(clips.write(tmp_path / "a.mp4", 20))
    assert clips.read(video.clip(FrameChoice(4, stride=5), start=2)) == [2, 7, 12, 17]
    assert FrameChoice(4, stride=5).rate(video.info) == 5


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_a_variable_rate_goes_by_what_is_on_show(extension, tmp_path, clips):
    times = [0, 40, 80, 125, 1000, 1040, 1080, 1300]
    video = open_video(clips.write(tmp_path / f"a.{extension}", 8, fps=25, times=times))
    assert not video.info.constant
    ticks = [(time - video.info.pts[0]) * video.info.tick * 1000 for time in video.info.pts]
    assert ticks == pytest.approx(times, abs=1)
    assert video.info.fps == pytest.approx(7 / 1.3)
    # the usual interval is 40 ms; frame 3 stays on show from 125 ms until shortly before 1000 ms
    assert clips.read(video.clip(FrameChoice(fps=Fraction(10)))) == [0, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 6, 6, 7]


def test_starts_are_those_from_which_enough_frames_follow():
    steady = VideoInfo(8, 8, tuple(range(0, 3300, 33)), Fraction(1, 1000), Fraction(30))
    uneven = VideoInfo(8, 8, (0, 40, 80, 900, 940, 2000, 2040, 2081), Fraction(1, 1000))
    for info in (steady, uneven):
        for choice in (FrameChoice(3), FrameChoice(2, stride=3), FrameChoice(4, Fraction(7)), FrameChoice(1)):
            enough = []
            for start in range(info.frames):
                found = list(frame_numbers(info, start=start, fps=choice.fps, stride=choice.stride))
                assert found[0] == start
                assert found == sorted(found)
                enough.append(len(found) >= choice.frames)
            assert choice.starts(info) == sum(enough)
            assert enough == sorted(enough, reverse=True)


@pytest.mark.parametrize("text", ["0", "-1", "abc", "nan", "inf", "1/0"])
def test_rates_that_are_none(text):
    with pytest.raises(RequestError, match="frames per second"):
        frame_rate(text)
    assert frame_rate(29.97002997) == frame_rate("30000/1001") == Fraction(30000, 1001)


def test_a_clip_that_is_too_short_is_said_to_be(tmp_path, clips):
    video = open_video(clips.write(tmp_path / "a.mp4", 10, fps=10))
    with pytest.raises(BadVideo, match="too-short: it has 10 frames and 11 are asked for"):
        video.clip(FrameChoice(11))
    with pytest.raises(BadVideo, match="it has 5 frames at 5 per second and 6 are"):
        video.clip(FrameChoice(6, Fraction(5)))


@pytest.mark.parametrize(
    ("matrix", "orientation"),
    [
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
        ((0, 1, 1, 0), Image.Transpose.TRANSPOSE),
        ((0, -1, -1, 0), Image.Transpose.TRANSVERSE),
    ],
)
def test_rotation_as_phones_write_it(matrix, orientation, tmp_path, clips):
    upright = clips.write(tmp_path / "a.mp4", 3)
    expected = [np.asarray(Image.fromarray(frame).transpose(orientation)) for frame in open_video(upright).clip()]
    turned = open_video(_with_matrix(upright, matrix))
    assert turned.clip().shape[1:3] == (turned.info.height, turned.info.width)
    np.testing.assert_array_equal(turned.clip(), expected)


def _with_matrix(path, matrix):
    """The display matrix in the track header, as the standard (ISO 14496-12, 8.3.2) places it."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 4 + 5 * 4 + 2 * 4 + 4 * 2
    a, b, c, d = (round(value * 65536) for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def test_an_odd_angle_is_refused(tmp_path, clips):
    assert reason(_with_matrix(clips.write(tmp_path / "a.mp4", 2), (0.7, 0.7, -0.7, 0.7))) == "unsupported"


@pytest.mark.parametrize(("space", "kr", "kb"), [("ITU601", 0.299, 0.114), ("ITU709", 0.2126, 0.0722)])
@pytest.mark.parametrize("full", [False, True])
def test_colours_by_the_matrix_and_range_of_the_file(space, kr, kb, full, tmp_path):
    import av
    from av.video.reformatter import ColorRange, Colorspace

    y, u, v = 110, 90, 180
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv444p"
        stream.codec_context.colorspace = Colorspace[space]
        stream.codec_context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        planes = np.stack([np.full((32, 32), value, np.uint8) for value in (y, u, v)])
        frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
        frame.colorspace, frame.color_range = Colorspace[space], ColorRange.JPEG if full else ColorRange.MPEG
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    luma, scale = (y / 255, 255) if full else ((y - 16) / 219, 224)
    pb, pr = (u - 128) / scale, (v - 128) / scale
    red, blue = luma + 2 * (1 - kr) * pr, luma + 2 * (1 - kb) * pb
    expected = 255 * np.array([red, (luma - kr * red - kb * blue) / (1 - kr - kb), blue])
    np.testing.assert_allclose(open_video(tmp_path / "a.mkv").clip()[0, 5, 5], expected, atol=1.5)


def test_transparency_of_a_video_shows_the_background(tmp_path):
    import av

    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 16, 24, "bgra"
        rgba = np.full((16, 24, 4), (200, 100, 0, 255), np.uint8)
        rgba[:, :12, 3] = 0
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format="bgra")))
        container.mux(stream.encode())
    frame = open_video(tmp_path / "a.mkv", DecodePolicy(background=(1, 2, 3))).clip()[0]
    assert frame[0, [0, 23]].tolist() == [[1, 2, 3], [200, 100, 0]]


@pytest.mark.parametrize(("height", "width"), [(47, 63), (48, 63), (2, 2)])
def test_odd_sizes(height, width, tmp_path, clips):
    path = clips.write(tmp_path / "a.mp4", 4, height=height, width=width)
    assert open_video(path).clip().shape == (4, height, width, 3)


def test_an_edit_list_leaves_out_what_is_not_to_be_shown(tmp_path, clips):
    path = clips.write(tmp_path / "a.mp4", 30, bf="0")
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 4 + 4 + 4  # segment duration, then media time
    assert data[entry - 1] == 1
    frame = open_video(path).info.pts[1]
    data[entry + 4 : entry + 8] = (5 * frame).to_bytes(4, "big")
    path.write_bytes(data)
    video = open_video(path)
    assert clips.read(video.clip()) == list(range(5, 30))
    assert clips.read(video.frames([0, 12])) == [5, 17]


# --- clips that need no video library ---


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_animations(extension, tmp_path, clips):
    frames = [Image.fromarray(frame) for frame in clips.frames(7)]
    options = {"lossless": True} if extension == "webp" else {"disposal": 0} if extension == "png" else {}
    path = tmp_path / f"a.{extension}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, loop=0, **options)
    video = open_video(path)
    assert (video.info.frames, video.info.fps) == (7, 20)
    assert clips.read(video.clip()) == list(range(7))
    assert clips.read(video.frames([2, 2, 6])) == [2, 2, 6]
    assert clips.read(video.clip(FrameChoice(fps=Fraction(10)))) == [0, 2, 4, 6]


def test_an_animation_with_pauses(tmp_path, clips):
    frames = [Image.fromarray(frame) for frame in clips.frames(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[100, 1000, 0, 100])
    video = open_video(tmp_path / "a.gif")
    assert video.info.pts == (0, 100, 1100, 1200)
    assert clips.read(video.clip(FrameChoice(fps=Fraction(4)))) == [0, 1, 1, 1, 1, 3]


def test_transparency_shows_the_background(tmp_path):
    frames = [Image.new("RGBA", (8, 6), (200, 100, 0, alpha)) for alpha in (0, 255)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True, exact=True)
    clip = open_video(tmp_path / "a.webp", DecodePolicy(background=(1, 2, 3))).clip()
    assert clip[:, 0, 0].tolist() == [[1, 2, 3], [200, 100, 0]]


def test_arrays(tmp_path, clips):
    np.save(tmp_path / "a.npy", clips.frames(9))
    video = open_video(tmp_path / "a.npy")
    np.testing.assert_array_equal(video.clip(), clips.frames(9))
    assert video.info.fps == 24
    assert clips.read(video.clip(FrameChoice(3, stride=4))) == [0, 4, 8]


def test_a_folder_of_frames_in_natural_order(tmp_path, clips):
    for number, frame in enumerate(clips.frames(12)):
        Image.fromarray(frame).save(tmp_path / f"f{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / ".hidden.png").write_text("no frame")
    assert clips.read(open_video(tmp_path).clip()) == list(range(12))


# --- what is broken ---


def test_a_missing_library_is_one_sentence(tmp_path, clips, monkeypatch):
    path = clips.write(tmp_path / "a.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"pip install 'latentae\[video\]'"):
        open_video(path).clip()
    with pytest.raises(MissingExtra):
        write_video(path, clips.frames(2), 10)


def test_empty_missing_and_other_files(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("This is a letter, and no film. " * 20)
    (tmp_path / "folder").mkdir()
    assert reason(tmp_path / "empty.mp4") == "empty"
    assert reason(tmp_path / "missing.mp4") == "unreadable"
    assert reason(tmp_path / "text.mp4") == "not-a-video"
    assert reason(tmp_path / "folder") == "no-frames"


def test_a_playlist_opens_no_other_file(tmp_path, clips):
    clips.write(tmp_path / "secret.mp4", 4)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.mp4").write_text(playlist)
    (tmp_path / "b.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    assert reason(tmp_path / "a.mp4") == reason(tmp_path / "b.mp4") == "not-a-video"


def test_the_extension_says_nothing(tmp_path, clips):
    clips.write(tmp_path / "a.webm", 5, codec="libvpx-vp9").rename(tmp_path / "a.gif")
    assert clips.read(open_video(tmp_path / "a.gif").clip()) == list(range(5))


def test_audio_only(tmp_path):
    import av

    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason(tmp_path / "a.mp4") == "no-video-stream"


@pytest.mark.parametrize("extension", CODECS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_cut_files_are_refused_and_never_shorter_clips(extension, share, tmp_path, clips):
    path = clips.write(tmp_path / f"a.{extension}", 40, codec=CODECS[extension])
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert reason(path) in {"truncated", "damaged", "not-a-video"}


def test_a_cut_recording_with_its_index_in_front(tmp_path, clips):
    path = clips.write(tmp_path / "a.mp4", 40)
    boxes = _boxes(path.read_bytes())
    shift = len(boxes[b"moov"])
    moov = bytearray(boxes[b"moov"])
    offsets = moov.index(b"stco") + 8
    for entry in range(int.from_bytes(moov[offsets : offsets + 4], "big")):
        place = offsets + 4 + 4 * entry
        moov[place : place + 4] = (int.from_bytes(moov[place : place + 4], "big") + shift).to_bytes(4, "big")
    front = boxes[b"ftyp"] + bytes(moov) + boxes.get(b"free", b"") + boxes[b"mdat"]
    path.write_bytes(front)
    assert clips.read(open_video(path).clip()) == list(range(40))
    path.write_bytes(front[:-300])
    assert reason(path) == "truncated"


def _boxes(data):
    boxes, start = {}, 0
    while start < len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        boxes[data[start + 4 : start + 8]] = data[start : start + length]
        start += length
    return boxes


def test_a_damaged_middle_spoils_only_what_needs_it(tmp_path, clips):
    path = clips.write(tmp_path / "a.mp4", 60, crf="1", bf="0", sc_threshold="0")
    data = bytearray(path.read_bytes())
    with_index = open_video(path)
    import av

    with av.open(str(path)) as container:
        packet = next(p for i, p in enumerate(container.demux(video=0)) if i == 30)
        place, size = packet.pos, packet.size
    data[place : place + size] = bytes(255 - byte for byte in data[place : place + size])
    path.write_bytes(data)
    assert reason(path) == "damaged"
    assert reason(path, [28, 31]) == "damaged"
    damaged = open_video(path, info=with_index.info)
    assert clips.read(damaged.frames([0, 5, 29])) == [0, 5, 29]
    assert clips.read(damaged.frames([36, 50])) == [36, 50]  # behind the next key frame


def test_a_torn_matroska_file_is_damaged(tmp_path, clips):
    path = clips.write(tmp_path / "a.mkv", 40)
    whole = path.read_bytes()
    outcomes = set()
    for place in range(len(whole) // 3, len(whole) - 400, len(whole) // 30):
        path.write_bytes(whole[:place] + bytes(200) + whole[place + 200 :])
        try:
            outcomes.add(clips.read(open_video(path).clip()) == list(range(40)))
        except BadVideo as error:
            outcomes.add(error.reason)
    assert "damaged" in outcomes
    assert False not in outcomes


def test_tables_that_lost_frames_do_not_make_a_shorter_clip(tmp_path, clips):
    path = clips.write(tmp_path / "a.mp4", 40)
    data = bytearray(path.read_bytes())
    count = data.index(b"stsz") + 4 + 4 + 4
    assert int.from_bytes(data[count : count + 4], "big") == 40
    data[count : count + 4] = (25).to_bytes(4, "big")
    path.write_bytes(data)
    assert reason(path) == "truncated"


def test_an_avi_whose_frames_fail_to_decode_is_damaged(tmp_path, clips):
    path = clips.write(tmp_path / "a.avi", 40, codec="mpeg4")
    data = bytearray(path.read_bytes())
    place = data.index(b"\x00\x00\x01\xb6", len(data) // 2)  # where a picture begins
    data[place : place + 4] = bytes(4)
    path.write_bytes(data)
    assert reason(path) == "damaged"


def test_huge_sizes_are_refused_by_the_header(tmp_path, clips):
    video = open_video(clips.write(tmp_path / "a.mp4", 2), DecodePolicy(max_pixels=48 * 64 - 1))
    with pytest.raises(BadVideo, match="too-large: 64 x 48 pixels a frame"):
        video.clip()
    Image.new("RGB", (64, 48)).save(tmp_path / "a.gif")
    np.save(tmp_path / "a.npy", np.zeros((2, 48, 64, 3), np.uint8))
    for name in ("a.gif", "a.npy"):
        with pytest.raises(BadVideo, match="too-large"):
            open_video(tmp_path / name, DecodePolicy(max_pixels=48 * 64 - 1)).clip()


def test_a_header_that_lies_about_its_size_allocates_nothing(tmp_path):
    import av

    path = tmp_path / "a.avi"
    with av.open(path, "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "bgr24"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="bgr24")))
    data = path.read_bytes()
    place = data.index(b"strf") + 8 + 4  # width and height in the BITMAPINFOHEADER
    size = struct.pack("<2i", 2**30, 2**30)
    path.write_bytes(data[:place] + size + data[place + 8 :])
    assert reason(path) in {"too-large", "damaged"}
    path.write_bytes(data[:place] + struct.pack("<2i", 12000, 12000) + data[place + 8 :])
    assert reason(path) == "too-large"


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [((4, 8, 8, 3), np.float32, "unsupported"), ((8, 8, 3), np.uint8, "unsupported"), ((0, 8, 8, 3), np.uint8, "no-")],
)
def test_arrays_of_other_kinds(shape, dtype, expected, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(shape, dtype))
    assert reason(tmp_path / "a.npy").startswith(expected)


def test_hostile_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 8, 8, 3), np.uint8))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-1])
    (tmp_path / "huge.npy").write_bytes(whole.replace(b"(4, 8, 8, 3)", b"(9**9**9, 3)"))
    (tmp_path / "large.npy").write_bytes(whole.replace(b"(4, 8,", b"(4999999999999, 8,"))
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], object), allow_pickle=True)
    assert reason(tmp_path / "cut.npy") == "truncated"
    for name in ("huge", "large", "pickle"):
        assert reason(tmp_path / f"{name}.npy") in {"damaged", "truncated"}


def test_folders_of_mixed_or_broken_frames(tmp_path, clips):
    for number, frame in enumerate(clips.frames(3)):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-60])
    with pytest.raises(BadVideo, match=r"truncated: 1\.png"):
        open_video(tmp_path).clip()
    Image.new("RGB", (64, 50)).save(tmp_path / "1.png")
    assert reason(tmp_path) == "mixed-sizes"


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_cut_animations(extension, tmp_path, clips):
    frames = [Image.fromarray(frame) for frame in clips.frames(7)]
    frames[0].save(tmp_path / f"a.{extension}", save_all=True, append_images=frames[1:], duration=50)
    data = (tmp_path / f"a.{extension}").read_bytes()
    for share in (0.3, 0.6, 0.95):
        (tmp_path / f"a.{extension}").write_bytes(data[: int(share * len(data))])
        assert reason(tmp_path / f"a.{extension}") in {"truncated", "damaged"}


# --- writing ---


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63)])
@pytest.mark.parametrize("fps", [25, Fraction(30000, 1001), 12.5])
def test_written_clips_have_the_frames_the_size_and_the_rate(height, width, fps, tmp_path, clips):
    frames = clips.frames(20, height, width)
    for name in ("a.mp4", "a.mkv"):
        write_video(tmp_path / name, iter(frames), fps)
        video = open_video(tmp_path / name)
        assert video.info.fps == Fraction(fps)
        assert video.clip().shape == frames.shape
        assert clips.read(video.clip()) == list(range(20))
    np.testing.assert_array_equal(video.clip(), frames)
    assert not list(tmp_path.glob("*.tmp"))


def test_colours_survive_in_mp4(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (20, 20, 20), (255, 255, 255), (200, 120, 40)]
    frames = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in colours])
    write_video(tmp_path / "a.mp4", frames, 10)
    assert np.abs(open_video(tmp_path / "a.mp4").clip().astype(int) - frames).max() <= 3


def test_what_cannot_be_written_leaves_nothing(tmp_path, clips):
    frames = clips.frames(3)
    with pytest.raises(RequestError, match="ends in none of"):
        write_video(tmp_path / "a.flv", frames, 10)
    with pytest.raises(RequestError, match="no frames"):
        write_video(tmp_path / "a.mp4", [], 10)
    with pytest.raises(RequestError, match="Frame 1"):
        write_video(tmp_path / "a.mp4", [frames[0], frames[1][:20]], 10)

    def broken():
        yield frames[0]
        raise BadVideo("damaged", "the source is.")

    with pytest.raises(BadVideo):
        write_video(tmp_path / "a.mp4", broken(), 10)
    assert not list(tmp_path.iterdir())
