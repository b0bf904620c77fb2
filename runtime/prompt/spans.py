"""Turns messages and images into spans for the decoder: runs of token ids, and runs of image positions between them.

The chat template leaves one placeholder token for each image. transformers repeats it once per embedding of the image;
here, a span of that length replaces it. If the model puts tokens of its own between the embeddings, they are positions
of that span, so that an image is decoded in large batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from granite4v import gguf_keys as keys
from granite4v.errors import ContextOverflowError, ModelFileError, PromptError
from granite4v.families.hf_fields import MAX_VOCABULARY
from granite4v.ggml.metadata import GgufMetadata
from granite4v.runtime.prompt.messages import Conversation, counted
from granite4v.runtime.prompt.template import ChatTemplate, task_tags
from granite4v.runtime.prompt.tokenizer import Tokenizer, added_token, token_id

if TYPE_CHECKING:
    from granite4v.clip_projector import View

IMAGE_TOKEN = "<image>"  # the placeholder in files that lack our key for it


@dataclass(frozen=True)
class TextSpan:
    tokens: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ImageSpan:
    """`n_tokens` positions of the image or video `index`; `digest` is `View.digest`.

    `between`: the tokens between its embeddings, as (place in the span, token), ascending.
    """

    index: int
    n_tokens: int
    digest: bytes
    between: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens between its embeddings."""
        return tuple(token for _, token in self.between)

    @property
    def n_embeddings(self) -> int:
        return self.n_tokens - len(self.between)


Span = TextSpan | ImageSpan


@dataclass(frozen=True)
class Prompt:
    """What is decoded before the answer. `images`: the views, including videos, that `ImageSpan.index` refers to."""

    text: str
    spans: tuple[Span, ...]
    images: tuple[View, ...]

    @property
    def n_tokens(self) -> int:
        return sum(span.n_tokens for span in self.spans)

    @property
    def text_tokens(self) -> tuple[int, ...]:
        """All tokens, without the embeddings."""
        return tuple(token for span in self.spans for token in span.tokens)

    @property
    def n_image_tokens(self) -> int:
        return sum(span.n_embeddings for span in self.spans if isinstance(span, ImageSpan))


def image_token(metadata: GgufMetadata, vision: GgufMetadata | None = None) -> int | None:
    """The id of the image token; None if there is none.

    A vision file that sets it takes precedence, and its id may lie outside the text file's vocabulary.
    """
    if vision is not None and keys.IMAGE_TOKEN_ID in vision:
        return int(vision.integer(keys.IMAGE_TOKEN_ID, 0, MAX_VOCABULARY - 1))
    if keys.IMAGE_TOKEN_ID in metadata:
        return int(metadata.integer(keys.IMAGE_TOKEN_ID, 0, metadata.n_texts(keys.TOKENS) - 1))
    return token_id(metadata, IMAGE_TOKEN)


def video_token(metadata: GgufMetadata) -> int | None:
    """The id of the placeholder token for a video; None for a model that takes no video."""
    if keys.VIDEO_TOKEN_ID not in metadata:
        return None
    return int(metadata.integer(keys.VIDEO_TOKEN_ID, 0, metadata.n_texts(keys.TOKENS) - 1))


def image_token_text(metadata: GgufMetadata, token: int | None) -> str | None:
    """The text of a text file's image token; None without one, or if it is unknown to the tokenizer."""
    if token is None:
        return None
    if token < metadata.n_texts(keys.TOKENS):
        return str(metadata.texts(keys.TOKENS)[token])
    return added_token(metadata, token)


def build_prompt(
    conversation: Conversation,
    images: Sequence[View],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    placeholders: Mapping[str, int | None],
    parts_of: Callable[[View], Sequence[int | tuple[int, ...]]],
    check_text: Callable[[str], None] | None = None,
    /,
    **variables: Any,
) -> Prompt:
    """Builds the prompt of a conversation with these `images` (opened, in reading order, including videos).

    `placeholders`: the placeholder tokens for an 'image' and for a 'video', if the vocabulary has any.
    `parts_of` returns what replaces a view's placeholder: numbers of embeddings, and tokens between them.
    `check_text` gets the text before it is rendered and again before it is tokenized, and may raise. `variables` go to
    the template. Raises PromptError when the template leaves more or fewer placeholders than there are images, and
    ModelFileError for a vocabulary without the placeholder that is needed.
    """
    if check_text is not None:
        check_text("".join(written(conversation)))
    text = template.render(conversation.messages, **variables)
    if check_text is not None:
        check_text(text)
    tokens = tokenizer.encode(text)
    spans: list[Span] = []
    start = 0
    for place, index in _places(tokens, images, placeholders, conversation):
        spans += [TextSpan(tuple(tokens[start:place])), *_image_spans(index, images[index], parts_of(images[index]))]
        start = place + 1
    spans.append(TextSpan(tuple(tokens[start:])))
    return Prompt(text, tuple(_joined(spans)), tuple(images))


def _image_spans(index: int, view: View, parts: Sequence[int | tuple[int, ...]]) -> Iterator[Span]:
    """The spans of one image. Tokens before the first embedding and after the last become text spans.

    For example, the parts (5,), 3, (7,), 2, (6,) give a text span of 5, an image span of 6 positions with `between`
    ((3, 7),), and a text span of 6.
    """
    numbers = [i for i, part in enumerate(parts) if isinstance(part, int)]
    first, behind = numbers[0], numbers[-1] + 1
    n_tokens, between = 0, list[tuple[int, int]]()
    for part in parts[first:behind]:
        if isinstance(part, int):
            n_tokens += part
        else:
            between += enumerate(part, n_tokens)
            n_tokens += len(part)
    yield from (TextSpan(part) for part in parts[:first] if isinstance(part, tuple))
    yield ImageSpan(index, n_tokens, view.digest, tuple(between))
    yield from (TextSpan(part) for part in parts[behind:] if isinstance(part, tuple))


def _joined(spans: Sequence[Span]) -> Iterator[Span]:
    """Merges consecutive text spans and leaves out empty ones."""
    for is_text, run in itertools.groupby(spans, lambda span: isinstance(span, TextSpan)):
        if not is_text:
            yield from run
        elif tokens := tuple(token for span in run if isinstance(span, TextSpan) for token in span.tokens):
            yield TextSpan(tokens)


def _places(
    tokens: Sequence[int], images: Sequence[View], placeholders: Mapping[str, int | None], conversation: Conversation
) -> list[tuple[int, int]]:
    """The place of each image, ascending: (position of its placeholder, index of the image). Templates may put all
    images before all videos, so each kind is counted separately."""
    found: list[tuple[int, int]] = []
    for kind, key in (("image", keys.IMAGE_TOKEN_ID), ("video", keys.VIDEO_TOKEN_ID)):
        wanted = [index for index, view in enumerate(images) if (view.form == "video") == (kind == "video")]
        if wanted and placeholders.get(kind) is None:
            raise ModelFileError(
                f"the text file's vocabulary has no {kind} placeholder ('{key}' or '<{kind}>'); "
                "use the text file that belongs to the vision file."
            )
        places = [i for i, token in enumerate(tokens) if token == placeholders.get(kind)]
        if len(places) != len(wanted):
            raise PromptError(_mismatch(kind, len(places), len(wanted), conversation))
        found += zip(places, wanted, strict=True)
    return sorted(found)


def written(conversation: Conversation) -> Iterator[str]:
    """The text of all messages, part by part."""
    for message in conversation.messages:
        yield from (part["text"] for part in message["content"] if part["type"] == "text")


def check_length(text: str, longest_token: int, n_ctx: int) -> None:
    """Raises ContextOverflowError for a text that overflows the context whatever its tokens are.

    `longest_token`: in bytes. Tokenizing takes seconds per megabyte, so a file pasted by mistake would take minutes.
    """
    least = -(-len(text) // max(longest_token, 1))
    if least > n_ctx:
        raise ContextOverflowError(
            f"the prompt has {len(text):,} characters, at least {least:,} tokens, but the context size "
            f"is {n_ctx:,}; raise it (--ctx-size, n_ctx), or shorten the prompt."
        )


def check_fits(prompt: Prompt, max_tokens: int, n_ctx: int) -> None:
    """Raises ContextOverflowError when prompt and answer together exceed the context."""
    needed = prompt.n_tokens + max_tokens
    if needed <= n_ctx:
        return
    n_image = prompt.n_image_tokens
    raise ContextOverflowError(
        f"the request needs {needed:,} tokens ({n_image:,} for {counted(len(prompt.images), 'image')}, "
        f"{prompt.n_tokens - n_image:,} of text, {max_tokens:,} for the answer), but the context size is {n_ctx:,}; "
        f"raise the context (--ctx-size, n_ctx) to {needed:,} or ask for a shorter answer."
    )


def _mismatch(kind: str, n_places: int, n_images: int, conversation: Conversation) -> str:
    for number, message in enumerate(conversation.messages, 1):
        n_parts = sum(part["type"] == kind for part in message["content"])
        tags = task_tags(message)
        if n_parts > 1 and tags and n_places < n_images:
            return (
                f"message {number} has {n_parts} {kind}s and the task tag '{tags[0]}', for which the model's chat "
                f"template keeps only one {kind}; ask about one {kind} at a time."
            )
    if n_places > n_images:
        return (
            f"the prompt has {counted(n_places, f'{kind} placeholder')} for {counted(n_images, kind)}; remove the "
            "placeholder from the text."
        )
    return (
        f"the model's chat template leaves {counted(n_places, f'{kind} placeholder')} for "
        f"{counted(n_images, kind)}; put every {kind} into a user message as a separate content part."
    )
