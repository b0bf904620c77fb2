"""The reference for Llama 4: transformers in float32, assembled from its parts.

Its image processor needs torchvision, but only three functions of it. They are written here as in torchvision 0.28 (72
images gave the same bits with it), because torchvision needs another build of torch. Everything else is the
processor's.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import json
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL.Image import Image
from transformers import AutoTokenizer, DynamicCache, Llama4ForConditionalGeneration, image_processing_backends
from transformers.models.llama4.processing_llama4 import Llama4Processor


class InterpolationMode(enum.Enum):
    BILINEAR = "bilinear"
    LANCZOS = "lanczos"


def _resize(image: torch.Tensor, size: Sequence[int], interpolation: InterpolationMode, antialias: bool) -> Any:
    """On CPUs with vector instructions torch gets 8-bit values unchanged."""
    if tuple(size) == tuple(image.shape[-2:]):
        return image
    mode = interpolation.value
    return torch.nn.functional.interpolate(image, list(size), mode=mode, align_corners=False, antialias=antialias)


def _pad(image: torch.Tensor, padding: Sequence[int], fill: Sequence[int]) -> torch.Tensor:
    assert not any(fill)
    left, top, right, bottom = map(int, padding)
    return torch.nn.functional.pad(image, [left, right, top, bottom])


def _normalize(image: torch.Tensor, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> torch.Tensor:
    shaped = [torch.as_tensor(values, dtype=image.dtype).view(-1, 1, 1) for values in (mean, std)]
    return image.sub(shaped[0]).div_(shaped[1])


FUNCTIONS = types.ModuleType("torchvision.transforms.v2.functional")
vars(FUNCTIONS).update(resize=_resize, pad=_pad, normalize=_normalize, InterpolationMode=InterpolationMode)


@functools.cache
def processing() -> Any:
    """Returns transformers' image processor module."""
    packages = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    parts = {name: types.ModuleType(name) for name in packages}
    vars(parts[packages[-1]]).update(functional=FUNCTIONS)
    with mock.patch.dict(sys.modules, {**parts, FUNCTIONS.__name__: FUNCTIONS}):
        return importlib.import_module("transformers.models.llama4.image_processing_llama4")


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    filters = {2: InterpolationMode.BILINEAR}
    with (
        mock.patch.object(image_processing_backends, "tvF", FUNCTIONS, create=True),
        mock.patch.object(image_processing_backends, "pil_torch_interpolation_mapping", filters),
    ):
        yield


def cut(picture: Image, **settings: Any) -> tuple[tuple[int, int], np.ndarray]:
    """Returns (rows, columns) of the canvas, and the tower's input, float32 `(tiles, height, width, 3)`."""
    module = processing()
    with _torchvision():
        found = module.Llama4ImageProcessor(**settings)(picture, return_tensors="pt", input_data_format="channels_last")
    rows, columns = found["aspect_ratios"].reshape(-1).tolist()
    pixels: np.ndarray = found["pixel_values"].float().permute(0, 2, 3, 1).numpy()
    return (rows, columns), pixels


def prompt_of_image(canvas: tuple[int, int], n_each: int) -> str:
    """Returns the text that the processor writes for an image with a canvas of (rows, columns) tiles of `n_each`
    tokens."""
    return str(vars(Llama4Processor)["_prompt_split_image"](None, canvas, n_each))


class Llama4Reference:
    """One checkpoint in float32. Prompts are text with one '<|image|>' for each image."""

    def __init__(self, directory: Path) -> None:
        self.model, info = Llama4ForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        self.model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        settings = json.loads((directory / "preprocessor_config.json").read_text())
        wanted = ("size", "max_patches", "image_mean", "image_std", "rescale_factor", "resample")
        self._settings = {name: settings[name] for name in wanted}
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        self.n_each = int(side**2 * vision.pixel_shuffle_ratio**2)
        self.patch = self.model.config.image_token_index

    def ids(self, text: str, pictures: Sequence[Image] = ()) -> list[int]:
        """Returns the tokens of a prompt, `patch` for each embedding."""
        pieces = text.split("<|image|>")
        assert len(pieces) == 1 + len(pictures)
        images = [prompt_of_image(cut(picture, **self._settings)[0], self.n_each) for picture in pictures]
        whole = pieces[0] + "".join(image + piece for image, piece in zip(images, pieces[1:], strict=True))
        ids: list[int] = self.tokenizer(whole, add_special_tokens=False).input_ids
        return ids

    def embeddings(self, picture: Image) -> np.ndarray:
        """Returns float32 (n, text width), tile by tile."""
        pixels = torch.from_numpy(cut(picture, **self._settings)[1]).permute(0, 3, 1, 2)
        with torch.inference_mode():
            states = self.model.vision_model(pixels).last_hidden_state
            found: np.ndarray = self.model.multi_modal_projector(states).flatten(0, 1).numpy()
        return found

    def greedy(self, ids: Sequence[int], pictures: Sequence[Image], n: int) -> tuple[list[int], np.ndarray]:
        """Returns the first `n` tokens of an answer, and the logits before each."""
        text = self.model.language_model
        given = torch.tensor([list(ids)])
        with torch.inference_mode():
            rows = text.get_input_embeddings()(given).clone()
            images = [torch.from_numpy(self.embeddings(picture)) for picture in pictures]
            if images:
                rows[given == self.patch] = torch.cat(images)
            cache = DynamicCache(config=self.model.config.text_config)
            out = text(inputs_embeds=rows, past_key_values=cache, use_cache=True)
            answer: list[int] = []
            logits = []
            while True:
                logits.append(out.logits[0, -1].numpy())
                answer.append(int(logits[-1].argmax()))
                if len(answer) == n:
                    return answer, np.stack(logits)
                out = text(input_ids=torch.tensor([answer[-1:]]), past_key_values=cache, use_cache=True)
