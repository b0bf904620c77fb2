"""Frames of videos: which ones are taken, the accepted sources, and the messages for files that are not videos."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from granite4v.clip_projector import Image, Video, load_image, load_video
from granite4v.clip_projector.files import is_video
from granite4v.clip_projector.video import VideoLimits, read_video
from granite4v.clip_projector.video_decoding import spread
from granite4v.errors import DeviceError, ImageError, ImageWarning
from tests.helpers.pictures import noise_picture
from tests.helpers.videos import numbers, write_video

N, RATE = 40, 10


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "numbers.mp4", N, RATE)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frames": 8}, range(0, 40, 5)),
        ({"frames": 3}, (0, 13, 26)),
        ({"frames": 100}, range(40)),
        ({"fps": 2.5}, range(0, 40, 4)),
        ({"fps": 0.01}, (0,)),
        ({}, [i * 40 // 32 for i in range(32)]),
    ],
)
def test_which_frames_are_taken(file: Path, options: dict[str, float], expected: object) -> None:
    assert numbers(load_video(file, **options)) == list(expected)  # type: ignore[arg-type, call-overload]


def test_frames_are_spread_as_the_reference_does() -> None:
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    for n_total in (1, 7, 32, 1001):
        for n in range(1, n_total + 1, 5):
            expected = default_sample_indices_fn(VideoMetadata(total_num_frames=n_total), num_frames=n)
            assert spread(n_total, n) == expected.tolist()


def test_no_room_for_temporary_files(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    for source in (file, file.read_bytes()):
        with pytest.raises(DeviceError, match=r"none can be written: No space left on device; make room"):
            load_video(source)


def test_a_directory_and_a_list_are_videos_too(tmp_path: Path) -> None:
    frames = [noise_picture((20, 10), seed) for seed in range(4)]
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    digests = [Image(frame).digest for frame in frames]
    assert [frame.digest for frame in load_video(tmp_path).frames] == digests
    assert [frame.digest for frame in load_video(frames).frames] == digests
    assert [frame.digest for frame in load_video(tmp_path, frames=2).frames] == [digests[0], digests[2]]
    video = load_video(frames)
    assert load_video(video) is video


def test_a_file_that_ends_early_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mkv", 200, RATE).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    found = load_video(tmp_path / "cut.mkv", frames=400)
    assert 0 < len(found.frames) < 200
    moved = write_video(tmp_path / "front.mp4", 200, RATE, movflags="faststart").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(moved[: len(moved) * 2 // 3])
    with pytest.warns(ImageWarning, match="is cut short or damaged: .* of 50 frames could be decoded"):
        assert 0 < len(load_video(tmp_path / "cut.mp4", frames=50).frames) < 50


def test_what_is_no_video_is_said(tmp_path: Path, file: Path) -> None:
    noise_picture((4, 4)).save(tmp_path / "a.png")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "cut.mp4").write_bytes(file.read_bytes()[:2000])
    (tmp_path / "none").mkdir()
    for name, message in {
        "missing.mp4": "there is no such file",
        "empty.mp4": "cannot be read as a video: ",
        "noise.mp4": "cannot be read as a video: Invalid data",
        "cut.mp4": "cannot be read as a video: ",
        "none": "is a directory without images",
    }.items():
        with pytest.raises(ImageError, match=message):
            load_video(tmp_path / name)
    with pytest.raises(ImageError, match="which have no times"):
        load_video(tmp_path, fps=1)
    with pytest.raises(ImageError, match="has 0 frames; expected 1 to 1,024"):
        load_video([])


def test_encoded_videos_are_read(file: Path) -> None:
    assert numbers(load_video(file.read_bytes(), frames=4)) == [0, 10, 20, 30]
    with pytest.raises(ImageError, match=r"^the video \(3 bytes\) cannot be read as a video"):
        load_video(b"abc")


def test_videos_are_known_by_their_frames(file: Path) -> None:
    few, many = load_video(file, frames=2), load_video(file, frames=3)
    assert few.digest == load_video(file, frames=2).digest != many.digest
    assert few.digest not in {frame.digest for frame in few.frames}


def test_files_that_name_other_files_are_not_followed(tmp_path: Path) -> None:
    """A playlist or an FFmpeg script could make it open any file or address."""
    write_video(tmp_path / "private.ts", 10, RATE)
    (tmp_path / "script.mp4").write_text("ffconcat version 1.0\nfile private.ts\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nprivate.ts\n#EXT-X-ENDLIST\n")
    with av.open(str(tmp_path / "script.mp4")) as followed:  # what FFmpeg does by default
        assert sum(1 for _ in followed.decode(video=0)) == 10
    for name in ("script.mp4", "list.m3u8"):
        with pytest.raises(ImageError, match="cannot be read as a video: it is of another kind"):
            load_video(tmp_path / name)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"n_pixels": 5 * 64 * 48 - 1}, "has frames of 64x48 pixels, of which 5 have more than 15,359 pixels together"),
        ({"memory_bytes": 1 << 20}, "decoder ended|GiB of memory"),
        ({"time_s": 0.01}, "its decoder ended after a timeout"),
    ],
)
def test_what_exceeds_a_limit_is_given_up(file: Path, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_video(file, frames=5, limits=VideoLimits(**limits))


def test_the_number_of_frames_is_limited(file: Path) -> None:
    limits = VideoLimits(n_frames=5)
    assert len(read_video(file, limits=limits)[0].frames) == 5
    with pytest.raises(ValueError, match="frames is 6; expected 1 to 5"):
        read_video(file, frames=6, limits=limits)
    with pytest.raises(ImageError, match="has 8 frames at that rate; expected at most 5"):
        read_video(file, fps=2, limits=limits)


def test_decoding_stops_when_nobody_waits(file: Path) -> None:
    with pytest.raises(ImageError, match="its decoder ended"):
        read_video(file, stop=lambda: True)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi", ".ts", ".mpg", ".3gp"])
def test_videos_are_recognized_by_their_content(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"film{suffix}", 30, 25)
    assert is_video(path.read_bytes()[:1024])
    with pytest.raises(ImageError, match="is a video, not an image; 'granite4v ask --video' takes videos"):
        load_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".gif", ".bmp", ".avif"])
def test_images_are_not_taken_for_videos(tmp_path: Path, suffix: str) -> None:
    noise_picture((40, 30)).save(tmp_path / f"a{suffix}")
    assert not is_video((tmp_path / f"a{suffix}").read_bytes()[:1024])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"frames": 0}, "expected 1 to 1,024"), ({"fps": -1.0}, "above 0"), ({"frames": 1, "fps": 1.0}, "not both")],
)
def test_numbers_out_of_range(file: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_video(file, **options)  # type: ignore[arg-type]


def test_a_video_has_frames() -> None:
    with pytest.raises(ValueError, match="no frames"):
        Video(())
