"""Decodes the frames of a video file, in a child process, through PyAV (the extra 'video').

Frames are converted to RGB by FFmpeg's rules for the file's own colour space; sizes and tiles are not decided here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_FRAMES_IN_FILE = 1_000_000  # that are counted, where a file does not say how many it has
DEFAULT_FPS = 25.0  # of a file that does not say it


def spread(n_total: int, n: int) -> list[int]:
    """Which of `n_total` frames are taken: `n`, evenly spread from the first on, or all where there are fewer.

    As transformers 5.24 (`video_utils.default_sample_indices_fn`).
    """
    n = min(n, n_total)
    return [i * n_total // n for i in range(n)]


def main(request: str) -> None:
    """`request`: JSON with the `path` of the video, the file that gets the `pixels`, and `frames` or `fps`. Prints the
    sizes of the frames, or what is wrong with the file, as JSON."""
    import av

    av.logging.set_level(av.logging.PANIC)  # what is wrong with a file is raised, too
    asked = json.loads(request)
    try:
        reply = _read(av, asked)
    except av.error.FFmpegError as error:
        reply = {"error": f"cannot be read as a video: {error.strerror or error}"}
    except MemoryError:
        reply = {"error": "needs more memory than is available; take fewer frames"}
    print(json.dumps(reply))


def _read(av: Any, asked: dict[str, Any]) -> dict[str, Any]:
    with av.open(asked["path"]) as container:
        if not container.streams.video:
            return {"error": "has no video in it; give a file with a video stream"}
        stream = container.streams.video[0]
        n_total, fps = stream.frames, float(stream.average_rate or stream.base_rate or DEFAULT_FPS)
    if not n_total:  # not every kind of file says it
        n_total = sum(1 for _ in _decoded(av, asked["path"]))
    n = asked["frames"] or max(1, int(n_total / fps * asked["fps"]))
    wanted = spread(n_total, n) if n_total else []
    if len(wanted) > asked["max_frames"]:
        return {"error": f"has {len(wanted):,} frames at that rate; expected at most {asked['max_frames']:,}"}
    sizes = _write(av, asked, set(wanted))
    if not sizes:
        return {"error": "has no frame that can be decoded; it may be damaged"}
    return {"sizes": sizes, "n_wanted": len(wanted)}


def _write(av: Any, asked: dict[str, Any], wanted: set[int]) -> list[tuple[int, int]]:
    """Writes the pixels of the wanted frames, as far as the file can be decoded; their sizes."""
    sizes: list[tuple[int, int]] = []
    last = max(wanted, default=-1)
    with open(asked["pixels"], "wb") as out:
        try:
            for i, frame in enumerate(_decoded(av, asked["path"])):
                if i in wanted:
                    image = frame.to_image()
                    sizes.append(image.size)
                    out.write(image.tobytes())
                if i >= last:
                    break
        except av.error.FFmpegError:
            if not sizes:
                raise
    return sizes


def _decoded(av: Any, path: str) -> Iterator[Any]:
    with av.open(path) as container:
        for i, frame in enumerate(container.decode(container.streams.video[0])):
            if i >= MAX_FRAMES_IN_FILE:
                return
            yield frame
