"""H.264 as a reference point for clips: what a stream of so many bits keeps."""

import io

import numpy as np

from latentae.data.video.container import import_av

FPS = 25  # by convention: frames per second hardly change what a constant rate factor gives


def through_h264(clip: np.ndarray, rate_factor: int) -> tuple[np.ndarray, int]:
    """A clip through libx264 and back, by its preset medium and a constant rate factor.

    BT.709, limited range, 4:2:0 where both sides are even, else 4:4:4; the bare stream without a container.

    Args:
        clip: uint8 (T, H, W, 3).
        rate_factor: 0 to 51, lower is better.

    Returns:
        The decoded clip, and the size of the stream in bits.

    Raises:
        MissingExtra: PyAV is not installed.
    """
    av = import_av()
    colours = av.video.reformatter
    matrix, limited = colours.Colorspace.ITU709, colours.ColorRange.MPEG
    exact = colours.Interpolation  # without these flags 4:2:0 loses more than a grey level to rounding
    rounding = exact.BICUBIC | exact.ACCURATE_RND | exact.FULL_CHR_H_INT | exact.FULL_CHR_H_INP
    reformatter, file = colours.VideoReformatter(), io.BytesIO()
    with av.open(file, "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": str(rate_factor), "preset": "medium"})
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv444p" if stream.height % 2 or stream.width % 2 else "yuv420p"
        stream.codec_context.thread_count = 1  # the number of threads changes the bits
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, limited
        for number, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            to_yuv = dict(format=stream.pix_fmt, dst_colorspace=matrix, dst_color_range=limited)
            frame = reformatter.reformat(frame, **to_yuv, interpolation=rounding, threads=1)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    bits = 8 * len(file.getvalue())
    file.seek(0)
    with av.open(file, format="h264") as container:
        to_rgb = dict(format="rgb24", src_colorspace=matrix, src_color_range=limited)
        frames = [
            reformatter.reformat(frame, **to_rgb, interpolation=rounding, threads=1).to_ndarray()
            for frame in container.decode(video=0)
        ]
    return np.stack(frames), bits
