"""Clips in and out: containers, animations, arrays and folders of frames, all seen as frames with times.

| in the file                  | in the frames                                                                      |
|------------------------------|------------------------------------------------------------------------------------|
| mp4, m4v, mov, webm, mkv, avi| the first video stream, by PyAV (extra ``video``); what they are is told by content |
| animated GIF, WebP, PNG      | by Pillow, transparency over the policy's background, a duration of 0 is 100 ms    |
| ``.npy``, uint8 (T, H, W, 3) | as it is, 24 frames a second                                                       |
| a folder of images           | in the natural order of their names (2 before 10), 24 frames a second              |
| colour                       | to RGB of 8 bits by the matrix and range that the file states, else BT.601 limited  |
| rotation, mirroring          | applied; angles other than quarter turns are refused                               |
| pixel aspect ratio, HDR      | not applied: pixels are not stretched, PQ and HLG are not tone-mapped              |
| interlaced                   | not taken apart                                                                    |

A clip that cannot be read raises `BadVideo` with a reason, and so does each wanted frame that is missing or damaged:
it is never another frame, a black one, or a shorter clip. As in images, bits that flipped where a codec has no checksum
may go unnoticed.
"""

from latentae.data.video.base import (
    ASSUMED_FPS,
    BadVideo,
    ClipBytes,
    FrameChoice,
    Video,
    VideoInfo,
    check_memory,
    frame_numbers,
    frame_rate,
)
from latentae.data.video.opening import VIDEO_EXTENSIONS, is_animated, open_video
from latentae.data.video.writing import VIDEO_FORMATS, write_video

__all__ = [
    "ASSUMED_FPS",
    "VIDEO_EXTENSIONS",
    "VIDEO_FORMATS",
    "BadVideo",
    "ClipBytes",
    "FrameChoice",
    "Video",
    "VideoInfo",
    "check_memory",
    "frame_numbers",
    "frame_rate",
    "is_animated",
    "open_video",
    "write_video",
]
