"""LLaVA-OneVision compared with transformers in float32, with one image, several images, and videos.

Tolerances are those of the other families' tests (observed 6e-7 for embeddings, 2e-6 for logits).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaOnevisionConfig
from typer.testing import CliRunner

import granite4v
from granite4v.cli.main import app
from granite4v.clip_projector import View, load_image, load_video
from granite4v.clip_projector.pixels import normalize
from granite4v.clip_projector.tiles_anyres import cut_view
from granite4v.converter import Options, convert
from granite4v.errors import CheckpointError, PromptError
from granite4v.families.llava_onevision import DEFAULTS
from granite4v.runtime.chat import Chat
from granite4v.runtime.engine.page_store import PageStore
from granite4v.runtime.prompt.spans import TextSpan
from tests.helpers.chats import ask
from tests.helpers.pictures import SIZES, noise_picture
from tests.helpers.served import data_url, png, served
from tests.helpers.videos import write_video
from tests.peers.onevision import OnevisionReference
from tests.peers.reference import relative_l2
from tests.toy.checkpoint import PRESETS, CheckpointSpec

EMBEDDINGS, LOGITS = 2e-5, 1e-4
TINY, REAL_TILES = PRESETS["tiny-onevision"], PRESETS["tiny-onevision-real-tiles"]
# below the limit on image tokens, just below, above; wide, tall and square
ALONE = ((42, 42), (100, 60), (126, 126), (130, 126), (168, 168), (250, 170), (120, 252), (210, 147), (1, 1))
SEVERAL = ((100, 60), (31, 90), (42, 42))
Pair = tuple[OnevisionReference, granite4v.Model]


@pytest.fixture(scope="module")
def pair(make_checkpoint: Callable[..., Path], make_model: Callable[..., Path]) -> Iterator[Callable[..., Pair]]:
    opened: dict[CheckpointSpec, Pair] = {}

    def get(spec: CheckpointSpec = TINY) -> Pair:
        if spec not in opened:
            model = granite4v.load(make_model(spec), n_ctx=8192, device="cpu")
            opened[spec] = OnevisionReference(make_checkpoint(spec)), model
        return opened[spec]

    yield get
    for _, model in opened.values():
        model.close()


def pictures(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    return [noise_picture(size, seed) for seed, size in enumerate(sizes)]


def parts(*kinds: str, text: str = "What is this?") -> list[dict[str, Any]]:
    return [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]


def turn(*kinds: str, text: str = "What is this?") -> dict[str, Any]:
    return {"role": "user", "content": parts(*kinds, text=text)}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def tiles_of(model: granite4v.Model, view: View) -> np.ndarray:
    """Returns the tower's input, (tiles, 3, px, px)."""
    tiling = model.engine.encoder().config.tiling
    return normalize(cut_view(view, tiling), tiling).transpose(0, 3, 1, 2)


def in_order(messages: list[dict[str, Any]], images: Iterable[Any], videos: Iterable[Any]) -> list[Any]:
    """Returns images and videos in the order in which the messages name them."""
    given = {"image": iter(images), "video": iter(videos)}
    kinds = [part["type"] for message in messages for part in message["content"]]
    return [next(given[kind]) for kind in kinds if kind in given]


def check_answer(
    pair: Pair,
    messages: list[dict[str, Any]],
    images: Sequence[Image.Image] = (),
    videos: Sequence[list[Image.Image]] = (),
) -> None:
    """Compares the prompt's tokens, its embeddings, the logits after it, and the answer."""
    reference, model = pair
    given = in_order(messages, images, map(load_video, videos))
    prompt = model.prepare(messages, given)
    placeholders = {"video": reference.model.config.video_token_index}
    found: list[int] = []
    for span in prompt.spans:
        if isinstance(span, TextSpan):
            found += span.tokens
        else:
            form = prompt.images[span.index].form
            found += [placeholders.get(form, model.prompts.placeholder)] * span.n_tokens
    assert found == reference.ids(messages, images, videos)
    features = reference.features(images) if images else []
    expected = in_order(messages, features, map(reference.video_features, videos))
    for view, rows in zip(prompt.images, expected, strict=True):
        assert relative_l2(model.engine.encode(view).streams[0], rows) <= EMBEDDINGS
    logits, tokens = reference.answer(messages, images, videos)
    ours = model.logits(prompt)
    assert relative_l2(ours, logits) <= LOGITS and ours.argmax() == logits.argmax()
    answer = model.generate(prompt, max_tokens=32)
    assert answer.tokens == [token for token in tokens if token not in model.prompts.stop_tokens]


# --- one image ---


@pytest.mark.parametrize("size", ALONE)
def test_one_image(pair: Callable[..., Pair], size: tuple[int, int]) -> None:
    reference, model = pair()
    picture = noise_picture(size)
    tiles = tiles_of(model, View((load_image(picture),)))
    np.testing.assert_array_equal(tiles, reference.pixels_of([picture])["pixel_values"][0].numpy())
    check_answer(pair(), [turn("image")], [picture])


def test_the_limit_on_tokens_is_met_from_both_sides(pair: Callable[..., Pair]) -> None:
    """Nine tiles have 81 tokens; a window with more than 1.21 times that number is reduced."""
    config = pair()[1].engine.encoder().config
    layouts = [View((load_image(noise_picture(size)),)).layout(config) for size in ALONE]
    assert {layout.reduced is None for layout in layouts} == {True, False}
    assert {layout.n_tokens for layout in layouts if layout.reduced == (9, 9)} == {9 + 9 * 10}


@pytest.mark.parametrize("size", SIZES)
def test_the_published_tiles(pair: Callable[..., Pair], size: tuple[int, int]) -> None:
    reference, model = pair(REAL_TILES)
    picture = noise_picture(size)
    view = View((load_image(picture),))
    tiles = tiles_of(model, view)
    np.testing.assert_array_equal(tiles, reference.pixels_of([picture])["pixel_values"][0].numpy())
    assert [view.layout(model.engine.encoder().config).n_tokens] == reference.counts([picture])


def test_published_numbers_of_tokens(pair: Callable[..., Pair]) -> None:
    config = pair(REAL_TILES)[1].engine.encoder().config
    counts = {(384, 384): 1485, (640, 480): 2929, (1700, 2200): 7353}
    for size, n_tokens in counts.items():
        assert View((load_image(Image.new("RGB", size)),)).layout(config).n_tokens == n_tokens
    image = load_image(Image.new("RGB", (640, 480)))
    assert View((image,), "square").layout(config).n_tokens == 730
    assert View((image,) * 32, "video").layout(config).n_tokens == 32 * 196 + 1


def test_an_answer_about_published_tiles(pair: Callable[..., Pair]) -> None:
    check_answer(pair(REAL_TILES), [turn("image")], [noise_picture((640, 480))])


# --- several images ---


def test_several_images(pair: Callable[..., Pair]) -> None:
    reference, model = pair()
    images = pictures(SEVERAL)
    pixels = reference.pixels_of(images)["pixel_values"].numpy()
    for picture, expected in zip(images, pixels, strict=True):
        np.testing.assert_array_equal(tiles_of(model, View((load_image(picture),), "square")), expected)
    check_answer(pair(), [turn("image", "image", "image")], images)


def test_an_image_in_a_later_turn_changes_an_earlier_one(pair: Callable[..., Pair]) -> None:
    """The first image is asked about alone, then next to another, then alone: the caches of embeddings and of the
    decoder's rows distinguish the two."""
    first, second = pictures(SEVERAL[:2])
    alone = [turn("image")]
    both = [turn("image"), said("A cat."), turn("image", text="And now?")]
    for messages, images in ((alone, [first]), (both, [first, second]), (alone, [first])):
        check_answer(pair(), messages, images)


def test_the_same_image_twice(pair: Callable[..., Pair]) -> None:
    picture = noise_picture((100, 60))
    check_answer(pair(), [turn("image", "image")], [picture, picture])


# --- video ---


@pytest.mark.parametrize("n_frames", [1, 8, 32])
def test_video(pair: Callable[..., Pair], n_frames: int) -> None:
    reference, model = pair()
    frames = pictures([(70, 50)] * n_frames)
    tiles = tiles_of(model, View(tuple(map(load_image, frames)), "video"))
    np.testing.assert_array_equal(tiles, reference.frames_of(frames)[0].numpy())
    check_answer(pair(), [turn("video")], videos=[frames])


def test_published_frames(pair: Callable[..., Pair]) -> None:
    check_answer(pair(REAL_TILES), [turn("video")], videos=[pictures([(64, 48)] * 2)])


def test_videos_and_images_in_one_prompt(pair: Callable[..., Pair]) -> None:
    """The template puts images before videos; one image next to a video is cut into tiles as if it were alone."""
    image, *others = pictures([(100, 60), (31, 90), (70, 50), (70, 50)])
    check_answer(pair(), [turn("video", "image")], [image], [others])
    check_answer(pair(), [turn("image", "image"), said("Yes."), turn("video")], [image, others[0]], [others[1:]])


# --- commands ---


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with images, and with frames in a subdirectory."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "frames").mkdir()
    for i, frame in enumerate(pictures([(70, 50)] * 5)):
        frame.save(folder / "frames" / f"{i}.png")
        frame.save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(("text_type", "vision_type"), [("Q8_0", "Q8_0"), ("Q4_0", "Q4_0"), ("F32", "F32")])
def test_every_command(
    text_type: str, vision_type: str, files: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model(TINY, text_type, vision_type)
    asked = ("ask", "--model", model, "--max-tokens", 3, "--json")
    one = json.loads(run(*asked, files / "0.png", "What?").stdout)["timings"]
    two = json.loads(run(*asked, files / "0.png", files / "1.png", "What?").stdout)["timings"]
    film = json.loads(run(*asked, "--video", files / "frames", "--frames", 3, "What?").stdout)["timings"]
    assert (two["n_image"], film["n_image"]) == (2 * 10, 3 * 4 + 1) and one["n_image"] > 10
    described = run("inspect", model).stdout
    assert "llava_onevision" in described and "one tile a frame, tokens 1:4" in described
    benched = run("bench", "--model", model, "--image", files / "0.png", "--max-tokens", 2, "--repeat", 1)
    assert benched.exit_code == 0, benched.stderr
    extracted = run(
        "extract", files / "0.png", "--model", model, "--prompt", "What?", "--max-tokens", 3, "--out", tmp_path / "out"
    )
    assert "1 page of 1 document, 1 record, 1 truncated" in extracted.stderr


@pytest.mark.parametrize(("kind", "limit"), [("F32", 1e-4), ("Q8_0", 5e-2), ("Q4_0", 1.0)])
def test_verify_shows_what_a_type_costs(
    kind: str, limit: float, files: Path, make_model: Callable[..., Path], make_checkpoint: Callable[..., Path]
) -> None:
    model = make_model(TINY, kind, kind)
    result = run("verify", model, "--reference", make_checkpoint(TINY), "--image", files / "0.png", "--json")
    assert result.exit_code == 0, result.stderr
    for comparison in json.loads(result.stdout)["comparisons"]:
        assert comparison["same_prompt_tokens"]
        assert comparison["n_image_tokens"] == comparison["n_image_tokens_reference"]
        assert limit / 1e3 < comparison["logits_relative_l2"] < limit
        assert all(limit / 1e3 < stream["relative_l2"] < limit for stream in comparison["streams"])


def test_videos_in_ask(files: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model(TINY)
    film = write_video(tmp_path / "film.mp4", 12, 4)
    base = ("ask", "--model", model, "--max-tokens", 2, "--json")
    by_rate = run(*base, "--video", film, "--fps", 2, "What?")
    assert json.loads(by_rate.stdout)["timings"]["n_image"] == 6 * 4 + 1
    both = run(*base, files / "0.png", "--video", film, "--video", files / "frames", "--frames", 2, "What?")
    assert json.loads(both.stdout)["timings"]["n_image"] > 2 * (2 * 4 + 1)
    for wrong in (("--frames", 2), ("--video", film, "--frames", 2, "--fps", 1)):
        assert run(*base, *wrong, "What?").exit_code == 2
    missing = run(*base, "--video", tmp_path / "none.mp4", "What?")
    assert missing.exit_code != 0 and missing.stdout == ""


def test_a_model_without_video_says_so(make_model: Callable[..., Path]) -> None:
    video = load_video(pictures([(70, 50)] * 2))
    with (
        granite4v.load(make_model(PRESETS["tiny"]), device="cpu") as model,
        pytest.raises(PromptError, match="takes no video, only images"),
    ):
        model.prepare("What?", [video])


def test_messages_with_their_own_videos(pair: Callable[..., Pair], files: Path) -> None:
    _, model = pair()
    frames = sorted((files / "frames").iterdir())
    ways: list[Any] = [files / "frames", str(files / "frames"), frames, load_video(frames)]
    prompts = [model.prepare([{"role": "user", "content": [{"type": "video", "video": way}]}]) for way in ways]
    assert len({prompt.spans for prompt in prompts}) == 1
    with pytest.raises(PromptError, match="a video came where the messages have an image part"):
        model.prepare([turn("image")], [load_video(frames)])


def test_pages_of_a_chat_are_counted_beside_each_other(make_model: Callable[..., Path], files: Path) -> None:
    """The first page alone has more tokens than both pages together."""
    with granite4v.load(make_model(TINY), device="cpu", n_ctx=190) as model:
        chat = Chat(model, max_tokens=4)
        chat.attach(str(files / "0.png"))
        (page,) = chat.conversation.pages
        alone = chat.n_tokens(page)
        assert model.prepare("?", [page.image]).n_image_tokens == alone > 20
        kept = ask(chat, "What?", f"/attach {files / '1.png'}", "And now?", "/pages")
        assert [chat.n_tokens(page) for page in chat.conversation.pages] == [10, 10]
        assert len(kept.answers) == 2 and all("1 tile, 10 tokens" in text for _, text in kept.listed)
        for i in range(2, 5):
            ask(chat, f"/attach {files / f'{i}.png'}")
        assert len(chat.conversation.pages) == 5  # three of them would not fit with the token counts of single pages
        assert chat.usage().used + 5 * (alone - 10) > 190


def test_the_server_takes_several_images(make_model: Callable[..., Path]) -> None:
    images = pictures(SEVERAL[:2])
    content = [*({"type": "image_url", "image_url": data_url(png(image))} for image in images), *parts()]
    with granite4v.load(make_model(TINY), device="cpu") as model:
        own = model.generate([turn("image", "image")], images, max_tokens=8)
        with served(model) as server:
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
            reply = server.post("/v1/chat/completions", body).json
    assert reply["choices"][0]["message"]["content"] == own.text
    assert reply["usage"]["prompt_tokens_details"]["image_tokens"] == 2 * 10


def test_stored_pages_know_the_form(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """The first of two images is stored as encoded next to another, not as encoded alone."""
    first, second = pictures(SEVERAL[:2])
    store = PageStore(tmp_path / "store")
    with granite4v.load(make_model(TINY), device="cpu", page_store=store) as model:
        fresh = {n: model.generate("What?", [first, second][:n], max_tokens=8) for n in (2, 1)}
    assert fresh[1].timings.n_stored == 0
    for n in (2, 1):
        with granite4v.load(make_model(TINY), device="cpu", page_store=store) as model:
            again = model.generate("What?", [first, second][:n], max_tokens=8)
        assert again.timings.n_stored > 0 and again.tokens == fresh[n].tokens


# --- what is refused ---


@pytest.mark.parametrize("value", ["anyres", "square", "anyres_max_0", 9])
def test_other_aspect_ratios_are_refused(make_checkpoint: Callable[..., Path], tmp_path: Path, value: Any) -> None:
    source = shutil.copytree(make_checkpoint(TINY), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vision_aspect_ratio": value}))
    with pytest.raises(CheckpointError, match="expected 'anyres_max_N'"):
        convert(source, tmp_path / "out", Options("F32", "F32"))


def test_what_config_json_leaves_out_is_transformers_default() -> None:
    config = LlavaOnevisionConfig()
    assert {key: getattr(config, key) for key in DEFAULTS} == DEFAULTS
