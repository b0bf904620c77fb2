"""Videos for tests: each frame shows its number in binary as black and white columns."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from granite4v.clip_projector import Video

BITS, COLUMN_PX, HEIGHT_PX = 8, 8, 48


def write_video(path: Path, n_frames: int, rate: int, **options: str) -> Path:
    """Writes a video of 64x48 pixels; `options` go to the file format."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = BITS * COLUMN_PX, HEIGHT_PX, "yuv420p"
        for i in range(n_frames):
            row = np.repeat([255 * (i >> bit & 1) for bit in range(BITS)], COLUMN_PX).astype(np.uint8)
            pixels = np.broadcast_to(row[None, :, None], (HEIGHT_PX, len(row), 3)).copy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(video: Video) -> list[int]:
    """Reads the frame numbers of a video from its frames."""
    middles = [np.asarray(frame.pillow)[HEIGHT_PX // 2, COLUMN_PX // 2 :: COLUMN_PX, 0] for frame in video.frames]
    return [sum(1 << bit for bit in range(BITS) if values[bit] > 127) for values in middles]
