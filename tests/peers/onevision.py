"""The reference for models with several images and videos: transformers in float32, with its PIL image processor.

transformers reads videos only with torchvision. Therefore the processor is assembled from its parts here, and frames go
through the steps of the image processor, which are the same as the video processor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.image_utils import SizeDict
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from tests.peers.reference import Messages, Reference

Frames = Sequence[Image.Image]


class OnevisionReference(Reference):
    """Takes images and videos in the order of their placeholders; those of one prompt are processed together."""

    def _load_processor(self) -> Any:
        processor = object.__new__(LlavaOnevisionProcessor)
        processor.image_processor = AutoImageProcessor.from_pretrained(self.directory, backend="pil")
        processor.tokenizer = AutoTokenizer.from_pretrained(self.directory)
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        processor.num_image_tokens, processor.patch_size = side**2, side
        processor.vision_aspect_ratio = self.model.config.vision_aspect_ratio
        processor.image_token, processor.video_token = "<image>", "<video>"
        processor.chat_template = None
        return processor

    def prompt_text(self, prompt: str | Messages, n_images: int = 0) -> str:
        assert not isinstance(prompt, str)
        return self.processor.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)

    def pixels_of(self, pictures: Frames) -> dict[str, torch.Tensor]:
        """Returns the model's inputs for the images of one prompt."""
        return dict(self.processor.image_processor([list(pictures)], return_tensors="pt"))

    def frames_of(self, video: Frames) -> torch.Tensor:
        """Returns (1, n_frames, 3, px, px) float32."""
        steps, side = self.processor.image_processor, self.model.config.vision_config.image_size
        found = []
        for frame in video:
            values = np.asarray(frame).transpose(2, 0, 1)
            values = steps.resize(image=values, size=SizeDict(height=side, width=side), resample=steps.resample)
            values = steps.rescale(image=values, scale=steps.rescale_factor)
            found.append(steps.normalize(image=values, mean=steps.image_mean, std=steps.image_std))
        return torch.from_numpy(np.stack(found))[None].float()

    def counts(self, pictures: Frames) -> list[int]:
        """Returns the tokens of each image of one prompt, as the processor counts them."""
        if len(pictures) > 1:
            return [self.processor.num_image_tokens + 1] * len(pictures)
        side = self.model.config.vision_config.image_size
        return [self.processor._get_number_of_features(p.height, p.width, side, side) for p in pictures]

    def count_of(self, video: Frames) -> int:
        inputs = {"pixel_values_videos": self.frames_of(video)}
        return self.processor.replace_video_token(inputs, 0).count(self.processor.video_token)

    @torch.inference_mode()
    def features(self, pictures: Frames) -> list[np.ndarray]:
        """Returns (n_tokens, n_embd) for each image of one prompt."""
        return [rows.numpy() for rows in self.model.get_image_features(**self.pixels_of(pictures)).pooler_output]

    @torch.inference_mode()
    def video_features(self, video: Frames) -> np.ndarray:
        return self.model.model.get_video_features(self.frames_of(video)).pooler_output[0].numpy()

    def ids(self, messages: Messages, pictures: Frames = (), videos: Sequence[Frames] = ()) -> list[int]:
        text = self.prompt_text(messages)
        for token, counts in (
            (self.processor.image_token, self.counts(pictures)),
            (self.processor.video_token, [self.count_of(video) for video in videos]),
        ):
            pieces = text.split(token)
            assert len(pieces) == len(counts) + 1
            text = pieces[0] + "".join(token * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
        return self.processor.tokenizer(text, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def answer(
        self, messages: Messages, pictures: Frames = (), videos: Sequence[Frames] = (), n: int = 32
    ) -> tuple[np.ndarray, list[int]]:
        """Returns the logits of the answer's first token, and greedy tokens up to the end-of-text token or `n`."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor([self.ids(messages, pictures, videos)])}
        if pictures:
            inputs |= self.pixels_of(pictures)
        if videos:
            inputs["pixel_values_videos"] = torch.cat([self.frames_of(video) for video in videos])
        return self._answer(inputs, n)
