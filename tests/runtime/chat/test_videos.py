"""Tests of videos in a chat: attached, asked about, listed, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import granite4v
from granite4v.clip_projector import load_video
from granite4v.errors import DocumentError
from granite4v.runtime.chat import Chat, Conversation, complete
from granite4v.runtime.chat.line import split_files
from tests.helpers.chats import ask
from tests.helpers.pictures import noise_picture
from tests.helpers.videos import write_video
from tests.toy.checkpoint import PRESETS

TOKENS_PER_FRAME = 4  # 3x3 patches, halved to 2x2


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny-onevision"]), device="cpu", n_ctx=1024, page_store=False) as loaded:
        yield loaded


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return write_video(tmp_path / "my film.mp4", 12, 4)


def test_a_video_is_attached_and_asked_about(model: granite4v.Model, film: Path) -> None:
    chat = Chat(model, frames=8, max_tokens=8)
    kept = ask(chat, f"/attach {film}", "What happens?", "/pages", "And then?")
    assert kept.said[0] == f"attached my film.mp4: 64x48 px, 8 frames, {8 * TOKENS_PER_FRAME + 1} tokens"
    assert kept.listed == [("1 my film.mp4", f"current, 64x48 px, 8 frames, {8 * TOKENS_PER_FRAME + 1} tokens")]
    video = load_video(film, frames=8)
    first = model.generate("What happens?", [video], max_tokens=8)
    assert kept.answers[0] == first.text
    stats = chat.conversation.turns[1].stats
    assert stats is not None and stats.n_encoded == 0 and stats.n_reused > 8 * TOKENS_PER_FRAME


def test_a_rate_and_the_default(model: granite4v.Model, film: Path) -> None:
    for chat, n_frames in ((Chat(model, fps=1), 3), (Chat(model), 12)):
        (page,), _ = chat.attach(str(film))
        assert page.n_frames == n_frames and chat.n_tokens(page) == n_frames * TOKENS_PER_FRAME + 1


def test_an_image_that_comes_later_changes_the_first_one(model: granite4v.Model, film: Path, tmp_path: Path) -> None:
    """With everything cached, the answer equals that of a fresh model that never saw the first image alone."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(paths):
        noise_picture((100, 60), seed).save(path)
    chat = Chat(model, frames=2, max_tokens=8)
    kept = ask(chat, f"/attach {paths[0]}", "A?", f"/attach {film}", f"/attach {paths[1]}", "B?")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": kept.answers[0]},
        {"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "B?"}]},
    ]
    images = [paths[0], load_video(film, frames=2), paths[1]]
    prompt = model.prepare(messages, images)
    assert prompt.n_image_tokens == 10 + 10 + 2 * TOKENS_PER_FRAME + 1
    with granite4v.load(model.files.text.path.parent, device="cpu", n_ctx=1024, page_store=False) as fresh:
        assert fresh.generate(messages, images, max_tokens=8).text == kept.answers[1]
    after = ask(chat, "/detach 3", "/undo", "/undo", "/detach 2", "A?")
    assert after.answers == [kept.answers[0]]  # the only image again, so it is cut into tiles again


def test_saved_and_loaded(model: granite4v.Model, film: Path, tmp_path: Path) -> None:
    chat = Chat(model, fps=1, max_tokens=8)
    ask(chat, f"/attach {film}", "What?", f"/save {tmp_path / 'talk.json'}")
    other = Chat(model, max_tokens=8)
    ask(other, f"/load {tmp_path / 'talk.json'}")
    (page,) = other.conversation.pages
    assert page.n_frames == 3 and page.digest == chat.conversation.pages[0].digest


def test_what_cannot_be_attached(
    model: granite4v.Model, film: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    chat = Chat(model)
    with pytest.raises(DocumentError, match="is a video, which has no pages"):
        chat.attach(f"{film}#2-3")
    with (
        granite4v.load(make_model(PRESETS["tiny"]), device="cpu", page_store=False) as other,
        pytest.raises(DocumentError, match="is a video, and this model takes none"),
    ):
        Chat(other).attach(str(film))
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[:400])
    with pytest.raises(granite4v.Granite4vError, match="cut.mp4' cannot be read as a video"):
        chat.attach(str(tmp_path / "cut.mp4"))
    long = write_video(tmp_path / "long.mp4", 250, 10)
    with pytest.raises(granite4v.Granite4vError, match="no room for 250 frames of 'long.mp4'"):
        Chat(model, frames=250).attach(str(long))
    assert not chat.conversation.pages


def test_videos_are_offered_and_dropped(film: Path) -> None:
    assert split_files(f"'{film}' What?").files == (str(film),)
    offered = complete(f"/attach {film.parent}/", Conversation())
    assert [one.text for one in offered] == [str(film).replace(" ", "\\ ")]
