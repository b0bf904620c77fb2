"""The reference: transformers in float32 with eager attention, on the same checkpoint.

Imported by tests only. Images are Pillow images; results are NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

Message = dict[str, Any]
Messages = list[Message]


def user_turn(text: str, n_images: int = 0) -> Message:
    """Returns one user message with the images first, in the parts that chat templates know."""
    return {"role": "user", "content": [{"type": "image"}] * n_images + [{"type": "text", "text": text}]}


def as_messages(prompt: str | Messages, n_images: int) -> Messages:
    return [user_turn(prompt, n_images)] if isinstance(prompt, str) else prompt


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns |found - expected| / |expected| over all values."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Reference:
    """A checkpoint loaded by transformers. Every method takes images in the order of their placeholders."""

    def __init__(
        self,
        directory: Path | str,
        adapter: Path | str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = "eager",
        vision_only: bool = False,
    ) -> None:
        """`vision_only`: loads no decoder layers, so that only `streams` is of use and memory stays small."""
        from transformers import AutoConfig, AutoModelForImageTextToText

        self.directory = Path(directory)
        config = AutoConfig.from_pretrained(self.directory)
        self._n_layers = config.text_config.num_hidden_layers
        if vision_only:
            config.text_config.num_hidden_layers = 0
        model, info = AutoModelForImageTextToText.from_pretrained(
            self.directory, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
        wrong = {kind: names for kind, names in info.items() if names}
        if vision_only:
            wrong.pop("unexpected_keys", None)
        assert not wrong, f"transformers did not read all of {directory}: {wrong}"
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        self.model = model.eval()
        self.processor = self._load_processor()
        self._last_pixels: tuple[Any, Any] = (None, None)  # a test asks several things about an image
        if self.processor.patch_size is None:  # older checkpoints leave it to the model
            self.processor.patch_size = model.config.vision_config.patch_size
            self.processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
            class_token = model.config.vision_config.model_type == "clip_vision_model"
            self.processor.num_additional_image_tokens = int(class_token)

    def _load_processor(self) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self.directory)

    def tiles(self, picture: Image.Image) -> np.ndarray:
        """Returns float32 (n_tiles, 3, tile_px, tile_px), the overview first."""
        return self.pixels(picture)[0][0].numpy()

    def n_tokens(self, picture: Image.Image) -> int:
        """Returns the number of image tokens in the prompt, as the processor counts them."""
        width, height = ImageOps.exif_transpose(picture).size
        side = self.model.config.vision_config.image_size
        n = int(self.processor._get_number_of_features(height, width, side, side))
        return n - (self.processor.vision_feature_select_strategy == "default")

    def streams(self, picture: Image.Image) -> dict[int, np.ndarray]:
        """Maps each decoder layer to float32 (n_tokens, n_embd), packed, including newlines."""
        return self.encoded(*self.pixels(picture))

    @torch.inference_mode()
    def encoded(self, pixels: torch.Tensor, sizes: torch.Tensor) -> dict[int, np.ndarray]:
        """Returns the `streams` of what `pixels` returns."""
        output = self.model.get_image_features(pixels, sizes)
        if self.model.config.model_type in ("llava_next", "llava_onevision"):
            return {0: output.pooler_output[0].float().numpy()}
        return {
            layer: packed[0].float().numpy() for layer, packed in output.deepstack_features if layer < self._n_layers
        }

    def prompt_text(self, prompt: str | Messages, n_images: int = 0) -> str:
        """Returns the rendered chat template, with one `<image>` for each image."""
        template = self.processor.chat_template or self.processor.tokenizer.chat_template
        return self.processor.apply_chat_template(
            as_messages(prompt, n_images), chat_template=template, add_generation_prompt=True
        )

    def prompt_ids(self, prompt: str | Messages, pictures: Sequence[Image.Image] = ()) -> list[int]:
        """Returns the token ids, with each image's placeholder repeated for each of its tokens."""
        pieces = self.prompt_text(prompt, len(pictures)).split(self.processor.image_token)
        assert len(pieces) == len(pictures) + 1, (pieces, len(pictures))
        text = pieces[0]
        for picture, piece in zip(pictures, pieces[1:], strict=True):
            text += self.processor.image_token * self.n_tokens(picture) + piece
        bos = self.processor.tokenizer.bos_token
        return self.processor.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids

    def logits(self, prompt: str | Messages, pictures: Sequence[Image.Image] = ()) -> np.ndarray:
        """Returns float32 (n_vocab,) for the token after the chat prompt."""
        return self.logits_after(self.prompt_ids(prompt, pictures), pictures)

    @torch.inference_mode()
    def logits_after(self, ids: list[int], pictures: Sequence[Image.Image] = ()) -> np.ndarray:
        """Returns float32 (n_vocab,) for the token after `ids`, which contain the images' placeholders."""
        logits = self.model(**self._inputs(ids, pictures)).logits[0, -1].numpy()
        return logits / self.logits_divisor

    @torch.inference_mode()
    def all_logits(self, prompt: str | Messages, pictures: Sequence[Image.Image] = ()) -> np.ndarray:
        """Returns float32 (n_prompt_tokens, n_vocab)."""
        logits = self.model(**self._inputs(self.prompt_ids(prompt, pictures), pictures)).logits[0].numpy()
        return logits / self.logits_divisor

    @property
    def logits_divisor(self) -> float:
        """The divisor for logits that the text model needs and transformers does not apply.

        `GraniteForCausalLM` divides by `logits_scaling`. transformers 5's LLaVA-NeXT has its own head, which does not.
        """
        config = self.model.config
        return getattr(config.text_config, "logits_scaling", 1.0) if config.model_type == "llava_next" else 1.0

    def greedy(self, prompt: str | Messages, pictures: Sequence[Image.Image] = (), n: int = 32) -> list[int]:
        """Returns the next `n` greedy tokens; ends early after the end-of-text token."""
        return self.logits_and_greedy(prompt, pictures, n)[1]

    def logits_and_greedy(
        self, prompt: str | Messages, pictures: Sequence[Image.Image] = (), n: int = 32
    ) -> tuple[np.ndarray, list[int]]:
        """Returns the results of `logits` and `greedy`, with one computation of the prompt."""
        first, tokens = self._answer(self._inputs(self.prompt_ids(prompt, pictures), pictures), n)
        return first / self.logits_divisor, tokens

    @torch.inference_mode()
    def _answer(self, inputs: dict[str, Any], n: int) -> tuple[np.ndarray, list[int]]:
        from transformers import DynamicCache

        cache = DynamicCache()  # the model does not make one: without it each step would forget the prompt
        out = self.model(**inputs, past_key_values=cache, use_cache=True)
        first, tokens = out.logits[0, -1].numpy(), []
        while True:
            tokens.append(int(out.logits[0, -1].argmax()))
            if len(tokens) == n or tokens[-1] == self.processor.tokenizer.eos_token_id:
                return first, tokens
            out = self.model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)

    def _inputs(self, ids: list[int], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if pictures:
            found = [self.pixels(picture) for picture in pictures]
            n_most = max(pixels.shape[1] for pixels, _ in found)
            inputs["pixel_values"] = torch.cat(
                [torch.nn.functional.pad(pixels, (0,) * 7 + (n_most - pixels.shape[1],)) for pixels, _ in found]
            )
            inputs["image_sizes"] = torch.cat([size for _, size in found])
        return inputs

    def pixels(self, picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (1, n_tiles, 3, px, px) float32 and (1, 2) height and width.

        The image is rotated upright first, as our loader does. The channel axis is given explicitly, because the
        processor would take an image of 3 rows for one with its channels first.
        """
        last, known = self._last_pixels
        if last is not picture:
            upright = ImageOps.exif_transpose(picture)
            out = self.processor.image_processor([upright], return_tensors="pt", input_data_format="channels_last")
            known = out["pixel_values"], out["image_sizes"]
            self._last_pixels = picture, known
        return known
