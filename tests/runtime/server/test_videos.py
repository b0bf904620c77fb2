"""Tests of videos in requests: how they are sent, how they are sampled and answered, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import granite4v
from granite4v.clip_projector import load_video
from granite4v.runtime.server.options import Limits, ServerOptions
from tests.helpers.pictures import noise_picture
from tests.helpers.served import Reply, Served, data_url, image, png, served, text
from tests.helpers.videos import write_video
from tests.toy.checkpoint import PRESETS

N_FRAMES, SIZE = 12, 64 * 48
TOKENS_PER_FRAME = 4  # 3x3 patches, halved to 2x2


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny-onevision"]), device="cpu", n_ctx=2048, page_store=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("films") / "film.mp4", N_FRAMES, 4)


@pytest.fixture(scope="module")
def server(model: granite4v.Model, film: Path) -> Iterator[Served]:
    limits = Limits(n_frames=16, n_pixels=14 * SIZE, n_images=3)
    with served(model, ServerOptions(limits=limits, media_paths=(film.parent,))) as running:
        yield running


def url(film: Path) -> str:
    return data_url(film.read_bytes(), "video/mp4")


def n_image_tokens(reply: Reply) -> int:
    assert reply.status == 200, reply.body
    count: int = reply.json["usage"]["prompt_tokens_details"]["image_tokens"]
    return count


def test_a_video_is_answered_as_the_library_answers_it(server: Served, model: granite4v.Model, film: Path) -> None:
    own = model.generate("What?", [load_video(film, frames=8)], max_tokens=8)
    part = {"type": "video_url", "video_url": {"url": url(film)}, "frames": 8}
    reply = server.chat(part, text("What?"), max_tokens=8)
    assert n_image_tokens(reply) == 8 * TOKENS_PER_FRAME + 1
    assert reply.json["choices"][0]["message"]["content"] == own.text
    body = {"input": [{"role": "user", "content": [part, {"type": "input_text", "text": "What?"}]}]}
    answered = server.post("/v1/responses", {**body, "max_output_tokens": 8}).json
    assert answered["output"][0]["content"][0]["text"] == own.text


@pytest.mark.parametrize(
    ("fields", "n_frames"),
    [({}, N_FRAMES), ({"frames": 3}, 3), ({"fps": 2}, 6), ({"frames": None, "fps": None}, N_FRAMES)],
)
def test_frames_are_sampled_as_asked(server: Served, film: Path, fields: dict[str, Any], n_frames: int) -> None:
    for part in (
        {"type": "video_url", "video_url": url(film)},
        {"type": "input_video", "video_url": {"url": str(film)}},
        {"type": "video", "video": film.as_uri()},
    ):
        reply = server.chat({**part, **fields}, text("What?"), max_tokens=1)
        assert n_image_tokens(reply) == n_frames * TOKENS_PER_FRAME + 1


def test_frames_may_be_sent_themselves(server: Served, model: granite4v.Model) -> None:
    """As a list, or joined by commas as vLLM takes them."""
    frames = [noise_picture((60, 40), seed) for seed in range(3)]
    own = model.generate("What?", [load_video(frames)], max_tokens=8)
    urls = [data_url(png(frame)) for frame in frames]
    joined = "data:video/jpeg;base64," + ",".join(one.partition(",")[2] for one in urls)
    for part in ({"type": "video", "video": urls}, {"type": "video_url", "video_url": {"url": joined}}):
        reply = server.chat(part, text("What?"), max_tokens=8)
        assert n_image_tokens(reply) == 3 * TOKENS_PER_FRAME + 1
        assert reply.json["choices"][0]["message"]["content"] == own.text


def test_images_and_videos_in_one_conversation(server: Served, model: granite4v.Model, film: Path) -> None:
    """Each of two images is one tile, so the first one's tokens differ from those that it had alone."""
    first, second = noise_picture((100, 60), 1), noise_picture((31, 90), 2)
    video = {"type": "video_url", "video_url": url(film), "frames": 2}
    alone = [{"role": "user", "content": [image(png(first)), text("A?")]}]
    both = [
        *alone,
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [image(png(second)), video, text("B?")]},
    ]
    given = [{"type": "image"}, {"type": "image"}, {"type": "video"}]
    own = [
        {"role": "user", "content": [given[0], {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [*given[1:], {"type": "text", "text": "B?"}]},
    ]
    replies = [
        server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 8}) for messages in (alone, both)
    ]
    assert n_image_tokens(replies[1]) == 2 * 10 + 2 * TOKENS_PER_FRAME + 1 and n_image_tokens(replies[0]) > 20
    fresh = model.generate(own, [first, second, load_video(film, frames=2)], max_tokens=8)
    assert replies[1].json["choices"][0]["message"]["content"] == fresh.text
    again = server.post("/v1/chat/completions", {"messages": alone, "max_tokens": 8})
    assert again.json["choices"][0]["message"] == replies[0].json["choices"][0]["message"]


def test_what_is_too_much_or_no_video(server: Served, film: Path) -> None:
    def code(*parts: Any) -> str:
        reply = server.chat(*parts, text("What?"), max_tokens=1)
        assert reply.status == 400, reply.body
        assert reply.error["param"].startswith("messages[0].content[") and len(reply.error["message"]) > 20
        return str(reply.error["code"])

    part = {"type": "video_url", "video_url": url(film)}
    frame = data_url(png(noise_picture((60, 40))))
    assert code({**part, "frames": 17}) == "too_many_frames"
    assert code({**part, "frames": 8}, {**part, "frames": 7}) == "invalid_video"  # more pixels than are left
    assert code({**part, "frames": 10}, {**part, "frames": 7}) == "too_many_frames"
    assert code({"type": "video", "video": [frame] * 17}) == "too_many_frames"
    assert code({**part, "frames": 2, "fps": 1.0}) == "invalid_sampling"
    assert code({**part, "fps": 0}) == "greater_than"
    assert code({**part, "video_url": data_url(png(noise_picture((9, 9))), "video/mp4")}) == "invalid_video"
    assert code({**part, "video_url": data_url(b"#EXTM3U\n/etc/passwd\n", "video/mp4")}) == "invalid_video"
    assert code({**part, "video_url": "https://example.com/film.mp4"}) == "no_fetch"
    assert code({**part, "video_url": "/etc/passwd"}) == "no_path"
    assert code({**part, "video_url": "data:video/mp4,abc"}) == "invalid_data_url"
    assert code({"type": "video", "video": []}) == "too_short"
    assert code(*[part] * 4) == "too_many_images"
    server.wait_until_idle()
    assert n_image_tokens(server.chat({**part, "frames": 1}, text("What?"), max_tokens=1)) == TOKENS_PER_FRAME + 1
