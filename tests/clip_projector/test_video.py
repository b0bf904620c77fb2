"""Frames of videos: which are taken, from what, and what is said of files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from granite4v.clip_projector import Image, Video, load_video
from granite4v.clip_projector.video_decoding import spread
from granite4v.errors import ImageError, ImageWarning
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
