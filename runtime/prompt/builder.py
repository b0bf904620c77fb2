"""Builds prompts from messages and images for one model, with its tokenizer and chat template, opened on first use.

Any thread may build prompts; a lock serializes them.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from granite4v import clip_projector
from granite4v import gguf_keys as keys
from granite4v.errors import ContextOverflowError, ModelFileError, PromptError
from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.prompt.messages import Prompt as PromptLike
from granite4v.runtime.prompt.messages import VideoOf, normalize
from granite4v.runtime.prompt.spans import (
    Prompt,
    TextSpan,
    build_prompt,
    check_length,
    image_token,
    image_token_text,
    video_token,
)
from granite4v.runtime.prompt.template import ChatTemplate
from granite4v.runtime.prompt.tokenizer import Tokenizer, load_tokenizer, special_tokens, stop_tokens, token_id

if TYPE_CHECKING:
    from granite4v.clip_projector import Image, ImageSource, Video, View


class PromptBuilder:
    """Turns messages into the spans that the decoder takes."""

    def __init__(self, files: ModelFiles, n_ctx: int, check: Callable[[Callable[[], None]], None]) -> None:
        """`check(report)` raises if the files cannot be used, and calls `report` if checking takes a while."""
        self._files, self._n_ctx, self._check = files, n_ctx, check
        self._lock = threading.RLock()
        config = files.vision_config
        framed = None if config is None else config.frame
        # for an image with tokens around its tiles, templates write one of these tokens
        self.placeholder = token_id(files.text, framed.image) if framed else image_token(files.text, files.vision)
        self.video_placeholder = video_token(files.text)
        self._placeholder_text = image_token_text(files.text, self.placeholder)
        self.stop_tokens = stop_tokens(files.text)
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        self._longest_token = 0  # bytes; not known yet
        self._pieces: tuple[bytes, ...] | None = None

    def tokenizer(self, report: Callable[[], None] | None = None) -> Tokenizer:
        """The tokenizer. `report` is called before a trial of the files, which takes a while. Raises ModelFileError."""
        with self._lock:
            if self._tokenizer is None:
                self._check(report or _nothing)
                self._tokenizer = load_tokenizer(self._files.text, self._files.text.path)
            return self._tokenizer

    def token_pieces(self) -> tuple[bytes, ...]:
        """The bytes that each token of the vocabulary writes, UTF-8 if they are complete characters; for tokens that
        write nothing (special and unused ones), their names."""
        with self._lock:
            if self._pieces is None:
                pieces = self.tokenizer().vocabulary().pieces
                names = self._files.text.texts(keys.TOKENS, [])
                padded = itertools.zip_longest(pieces, names)
                self._pieces = tuple(piece or (name or "").encode() for piece, name in padded)
            return self._pieces

    def template(self) -> ChatTemplate:
        with self._lock:
            if self._template is None:
                source = self._files.text.text(keys.CHAT_TEMPLATE)
                self._template = ChatTemplate(source, special_tokens(self._files.text))
            return self._template

    def build(
        self,
        prompt: PromptLike,
        images: Sequence[ImageSource],
        variables: Mapping[str, Any],
        report: Callable[[], None] | None = None,
    ) -> Prompt:
        """Builds a prompt; `variables` go to the chat template, `report` to `tokenizer`.

        Raises PromptError, ImageError, ContextOverflowError, ModelFileError.
        """
        with self._lock:
            conversation = normalize(prompt, images, self._placeholder_text)
            _check_unicode(conversation.messages)
            if len(conversation.messages) > self._n_ctx:  # a template takes seconds for thousands of messages
                raise ContextOverflowError(
                    f"the prompt has {len(conversation.messages):,} messages, each of a token or more, but the context "
                    f"size is {self._n_ctx:,}; raise it (--ctx-size, n_ctx), or leave messages out."
                )
            if conversation.images:
                self._files.need_vision()
            views = self._views(conversation.images)
            tokenizer = self.tokenizer(report)
            return build_prompt(
                conversation,
                views,
                self.template(),
                tokenizer,
                {"image": self.placeholder, "video": self.video_placeholder},
                self._parts,
                self._check_length,
                **variables,
            )

    def plain(self, text: str, *, add_special: bool = True) -> Prompt:
        """The prompt of a text as it is, without the chat template. `add_special`: encode as `Tokenizer.encode` does,
        otherwise as `encode_plain`. Raises PromptError, ContextOverflowError, ModelFileError."""
        with self._lock:
            _check_unicode(text)
            self._check_length(text)
            tokenizer = self.tokenizer()
            tokens = tokenizer.encode(text) if add_special else tokenizer.encode_plain(text)
            if self._files.is_cross_attending and self.placeholder in tokens:
                raise PromptError(f"the text holds the image token '{self._placeholder_text}'; remove it.")
        return Prompt(text, (TextSpan(tuple(tokens)),), ())

    def _views(self, sources: Sequence[ImageSource | VideoOf]) -> list[View]:
        """The model's views of the images and videos of one prompt."""
        if not sources:
            return []
        config = self._files.vision_config
        assert config is not None
        if not config.takes_video and any(isinstance(source, VideoOf) for source in sources):
            raise PromptError("this model takes no video, only images; ask about single frames, or use another model.")
        return clip_projector.views_of([_opened(source) for source in sources], config)

    def _parts(self, view: View) -> list[int | tuple[int, ...]]:
        """The parts of an image or a video: numbers of embeddings, and tokens between them."""
        config = self._files.vision_config
        assert config is not None
        return [part if isinstance(part, int) else (self._token(part),) for part in view.parts(config)]

    def _token(self, text: str) -> int:
        """The id of a token that surrounds an image's tiles. Raises ModelFileError."""
        found = token_id(self._files.text, text)
        if found is None:
            raise ModelFileError(
                f"the text file's vocabulary has no token '{text}', which stands around images; use the text file that "
                "belongs to the vision file."
            )
        return found

    def _check_length(self, text: str) -> None:
        """Raises ContextOverflowError for a text that is certain to overflow the context, before it is tokenized."""
        if len(text) > self._n_ctx:
            if not self._longest_token:
                tokens = self._files.text.texts(keys.TOKENS, [])
                self._longest_token = max((len(token.encode()) for token in tokens), default=1)
            check_length(text, self._longest_token, self._n_ctx)

    def close(self) -> None:
        with self._lock:
            if self._tokenizer is not None:
                self._tokenizer.close()


def _opened(source: ImageSource | VideoOf) -> Image | Video:
    if isinstance(source, VideoOf):
        return clip_projector.load_video(source.source)
    return clip_projector.load_image(source)


def _check_unicode(messages: Any) -> None:
    """Raises PromptError for lone surrogates: tokenizers take UTF-8, and Python reads other bytes as surrogates."""
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt holds {error.object[error.start]!r}, which is not valid Unicode: it stands for bytes that are "
            "not UTF-8. Convert the prompt to UTF-8."
        ) from None


def _nothing() -> None:
    pass
