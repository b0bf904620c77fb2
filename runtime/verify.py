"""Compares a model's results with those of the checkpoint it was converted from, computed by transformers.

The reference runs first and is freed before our files are loaded, so that the two are never in memory together. Needs
torch and transformers (the `verify` extra), which nothing else in the product imports.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from granite4v.clip_projector.cross_features import CrossFeatures
from granite4v.clip_projector.grid_canvas import canvas_layout
from granite4v.clip_projector.images import load_image, open_rgb
from granite4v.clip_projector.pixels import normalize
from granite4v.clip_projector.tiles_canvas import cut_canvas
from granite4v.clip_projector.views import View
from granite4v.errors import CheckpointError, DeviceError, Granite4vError
from granite4v.families.registry import Family, family_named, family_of_checkpoint
from granite4v.families.text import text_architecture, text_section
from granite4v.runtime.model import Model

Report = Callable[[str], None]
INSTALL = "Install what 'verify' needs with \"pip install 'granite4v[verify]'\"."


@dataclass
class StreamDifference:
    """Difference of one stream of image embeddings: the decoder layer it is added before, |ours - reference| /
    |reference|."""

    layer: int
    relative_l2: float


@dataclass
class Comparison:
    """Comparison of one image (None: text only) at the positions of the reference's own greedy answer.

    `kl`: divergence of our distribution from the reference's, KL(reference || ours), in nats, mean and maximum over the
    positions. `same_top`: fraction of the positions where both rank the same token first. `logits_max`: the largest
    absolute difference of any logit.
    """

    image: str | None
    same_prompt_tokens: bool
    n_image_tokens: int
    n_image_tokens_reference: int
    streams: list[StreamDifference] = field(default_factory=list)
    n_positions: int = 0
    logits_relative_l2: float = math.nan
    logits_max: float = math.nan
    kl_mean: float = math.nan
    kl_max: float = math.nan
    same_top: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Expected:
    """The reference's results for one image."""

    name: str | None
    image: Image | None
    ids: list[int]
    n_image: int
    streams: dict[int, np.ndarray]
    answer: list[int]
    logits: np.ndarray  # (n_positions, n_vocab)


def verify(
    model: Model,
    reference: Path,
    images: Sequence[Path] = (),
    *,
    prompt: str,
    n_positions: int = 32,
    dtype: str = "float32",
    adapter: Path | None = None,
    report: Report | None = None,
) -> list[Comparison]:
    """Measures the differences for every image, then for the prompt alone.

    `model` should be freshly loaded: it reads its weights at its first request, after the reference is freed.
    `adapter`: a PEFT adapter that the reference merges into itself; a separate adapter on our side is then applied to
    text-only requests too. Raises DeviceError without the `verify` extra, CheckpointError for a checkpoint that
    transformers cannot read completely.
    """
    say = report or (lambda _: None)
    opened: list[tuple[str | None, Image | None]] = [(str(path), open_rgb(path, as_reference=True)) for path in images]
    say(f"reference: {reference} in {dtype}")
    model.engine.follow("transformers")
    runner = _reference(model, reference, dtype, adapter)
    expected = []
    for name, image in [*opened, (None, None)]:
        say(f"reference: {name or 'text only'}")
        with runner.transformers("run"):
            expected.append(runner.run(name, image, prompt, n_positions))
    with_adapter = runner.has_adapter
    del runner
    results = []
    for item in expected:
        say(f"ours: {item.name or 'text only'}")
        results.append(_compare(model, item, prompt, lora=True if with_adapter and model.has_lora else None))
    return results


def _reference(model: Model, directory: Path, dtype: str, adapter: Path | None) -> _Reference:
    _check_origin(model, directory)
    config = model.files.vision_config
    if config is not None and config.frame is not None:
        return _PartsReference(directory, dtype, adapter, _family(model), config)
    return _Reference(directory, dtype, adapter, _family(model))


def _check_origin(model: Model, directory: Path) -> None:
    """Raises CheckpointError for a checkpoint of another family, or with another decoder, than the model's."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
        theirs, decoder = family_of_checkpoint(config).name, text_architecture(text_section(config)).arch
    except (OSError, ValueError, AttributeError, Granite4vError):  # reported when it is loaded
        return
    family, own = _family(model), model.files.architecture
    if decoder != own or (family is not None and theirs != family.name):
        raise CheckpointError(
            f"the model was not converted from '{directory}', whose family is {theirs} with the decoder {decoder}; "
            f"found {family.name if family else 'no vision file'} with {own} in the model. Give the checkpoint that "
            "it was converted from."
        )


def _family(model: Model) -> Family | None:
    """The family of the model's vision file; None for a text-only model."""
    config = model.files.vision_config
    return None if config is None else family_named(config.family)


def _compare(model: Model, expected: _Expected, prompt: str, *, lora: bool | None) -> Comparison:
    images = [] if expected.image is None else [expected.image]
    prepared = model.prepare(prompt, images)
    n_image = prepared.n_image_tokens
    result = Comparison(
        image=expected.name,
        same_prompt_tokens=list(prepared.text_tokens) == expected.ids,
        n_image_tokens=n_image,
        n_image_tokens_reference=expected.n_image,
        n_positions=len(expected.answer),
    )
    if images and n_image == expected.n_image:
        for layer, stream in _streams(model, images[0]).items():
            if layer in expected.streams:
                result.streams.append(StreamDifference(layer, relative_l2(stream, expected.streams[layer])))
    ours = model.score(prompt, images, tokens=expected.answer, lora=lora)
    if ours.shape != expected.logits.shape:
        raise CheckpointError(
            f"the reference has a vocabulary of {expected.logits.shape[1]:,} tokens and the model one of "
            f"{ours.shape[1]:,}; compare a model with the checkpoint it was converted from."
        )
    kl = divergence(expected.logits, ours)
    result.logits_relative_l2 = relative_l2(ours, expected.logits)
    result.logits_max = float(np.abs(ours - expected.logits).max())
    result.kl_mean, result.kl_max = float(kl.mean()), float(kl.max())
    result.same_top = float((ours.argmax(-1) == expected.logits.argmax(-1)).mean())
    return result


def _streams(model: Model, image: Image) -> dict[int, np.ndarray]:
    """Encodes an image. Returns its embeddings by the decoder layer before which they are added; for a decoder with
    cross-attention, the states it attends to, under the first layer that does."""
    features, config = model.encode_image(image), model.files.vision_config
    if isinstance(features, CrossFeatures):
        assert config is not None and config.cross_attention is not None
        return {config.cross_attention.layers[0]: features.states}
    return dict(zip(features.layers, features.streams, strict=True))


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected| over all values, in float64."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def divergence(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(expected || found) of each row of logits, in nats, float64 `(n_rows,)`."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(found)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


class _Reference:
    """The checkpoint in transformers, with eager attention."""

    def __init__(self, directory: Path, dtype: str, adapter: Path | None, family: Family | None) -> None:
        self._family = family
        self._torch, transformers = _import_extra()
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"'{directory}' has no config.json; give the Hugging Face checkpoint's directory.")
        options = {"dtype": getattr(self._torch, dtype), "attn_implementation": "eager", "output_loading_info": True}
        self._where = f"'{directory}'"
        with self.transformers("load"):
            model, info = transformers.AutoModelForImageTextToText.from_pretrained(directory, **options)
            self._processor = self._open_processor(directory, model)
        self.has_adapter = adapter is not None or (directory / "adapter_config.json").is_file()
        lost = [name for kind in ("missing_keys", "mismatched_keys") for name in info[kind] if "lora_" not in str(name)]
        if lost:
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot find {len(lost)} tensors in '{directory}', for "
                f"instance '{sorted(map(str, lost))[0]}'; it expects a different tensor layout for this family. Save "
                "the checkpoint with that version, or verify against one saved with it."
            )
        if adapter is not None:
            self._where = f"the adapter '{adapter}'"
            with self.transformers("load"):
                model = _merged(model, adapter)
            self._where = f"'{directory}'"
        self._model = model.eval()
        # transformers 5.24 calls it 'cache'; both names work until 5.40
        takes = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"
        self._divisor = 1.0 if family is None else family.reference_logits_divisor(model.config.to_dict())
        text = model.config.text_config
        self._cross_layers: list[int] = sorted(getattr(text, "cross_attention_layers", None) or [])
        self._prepare()

    def _open_processor(self, directory: Path, model: Any) -> Any:
        from transformers import AutoProcessor

        try:
            return AutoProcessor.from_pretrained(directory)
        except ImportError:  # torchvision is missing; it is needed for videos, which are not compared
            return _ImageProcessor(directory, model)

    def _prepare(self) -> None:
        """Completes the set-up once model and processor are loaded."""
        self._complete_processor()
        is_cross = bool(self._cross_layers)
        self._placeholder: int = self._model.config.image_token_index if is_cross else self._processor.image_token_id

    def _complete_processor(self) -> None:
        """Fills in what processors saved by older versions leave to the model."""
        processor, config = self._processor, self._model.config
        if getattr(processor, "patch_size", 0) is None:
            processor.patch_size = config.vision_config.patch_size
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy
            # 'default' drops a position, which must therefore be counted
            processor.num_additional_image_tokens = int(config.vision_feature_select_strategy == "default")
        if processor.chat_template is None:
            processor.chat_template = processor.tokenizer.chat_template

    @contextlib.contextmanager
    def transformers(self, verb: str) -> Iterator[None]:
        """Turns any exception that transformers raises on a checkpoint into an error that names the checkpoint."""
        try:
            yield
        except Granite4vError:
            raise
        except ImportError as error:
            raise DeviceError(f"transformers cannot {verb} {self._where}: {error} {INSTALL}") from error
        except Exception as error:
            import transformers

            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot {verb} {self._where}: {reason}"
            ) from error

    def run(self, name: str | None, image: Image | None, prompt: str, n_positions: int) -> _Expected:
        parts: list[dict[str, Any]] = [] if image is None else [{"type": "image"}]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True)
        # explicit: the processor would take an image that is 3 pixels high for one with channels first
        given = {} if image is None else {"images": [image], "input_data_format": "channels_last"}
        inputs = self._processor(text=text, return_tensors="pt", **given)
        placeholder = self._placeholder
        ids = inputs["input_ids"][0].tolist()
        streams: dict[int, np.ndarray] = {}
        with self._torch.inference_mode():
            if image is not None:
                inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
            if image is not None and self._cross_layers:
                streams = {self._cross_layers[0]: self._attended(inputs)}
            elif image is not None:
                features = self._model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
                if self._family is not None:
                    packed = self._family.reference_streams(features)
                    streams = {layer: rows.float().numpy() for layer, rows in packed.items()}
            answer, logits = self._greedy(inputs, n_positions)
        n_image = ids.count(placeholder)
        return _Expected(name, image, [i for i in ids if i != placeholder], n_image, streams, answer, logits)

    def _attended(self, inputs: Any) -> np.ndarray:
        """Computes what the decoder attends to of an image, `(tiles, positions, width)`, and replaces its pixels in
        `inputs`."""
        whole = self._model.model
        pixels = {name: inputs.pop(name) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        states = whole.multi_modal_projector(whole.vision_model(**pixels).last_hidden_state)[0, 0]
        inputs["cross_attention_states"] = states
        return np.asarray(states.float().numpy())

    def _greedy(self, inputs: Any, n_positions: int) -> tuple[list[int], np.ndarray]:
        from transformers import DynamicCache

        torch, rows, answer = self._torch, [], []
        cache = DynamicCache(config=self._model.config.get_text_config())  # not every model creates one itself
        kept = {self._cache_name: cache, "use_cache": True}
        if 0 in self._cross_layers:
            kept = {"use_cache": False}
        mask = inputs.get("cross_attention_mask")
        out = self._model(**inputs, **kept, logits_to_keep=1)
        while True:
            rows.append(out.logits[0, -1].float() / self._divisor)
            answer.append(int(rows[-1].argmax()))
            if len(answer) == n_positions:
                return answer, torch.stack(rows).numpy()
            token = torch.tensor([answer[-1:]])
            if 0 in self._cross_layers:  # transformers reads the length of its cache from layer 0
                inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                if mask is not None:
                    mask = inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:]], 1)
                out = self._model(**inputs, use_cache=False, logits_to_keep=1)
            else:
                more = {} if mask is None else {"cross_attention_mask": mask[:, -1:]}
                out = self._model(token, **more, **kept)


class _PartsReference(_Reference):
    """A checkpoint whose images are several runs of tokens, assembled from its parts because transformers 5.24's model
    of that kind raises on every input.

    Its image processor needs torchvision, so our own pixels are used; tests check that they are bit-identical.
    """

    def __init__(self, directory: Path, dtype: str, adapter: Path | None, family: Family | None, config: Any) -> None:
        """`config`: the model's VisionConfig."""
        self._config = config
        super().__init__(directory, dtype, adapter, family)

    def _open_processor(self, directory: Path, model: Any) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory)

    def _prepare(self) -> None:
        self._whole, self._model = self._model, self._model.language_model
        takes = inspect.signature(type(self._model).forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"

    def run(self, name: str | None, image: Image | None, prompt: str, n_positions: int) -> _Expected:
        torch, tokenizer, patch = self._torch, self._processor, self._whole.config.image_token_index
        said: list[dict[str, Any]] = [] if image is None else [{"type": "image"}]
        messages = [{"role": "user", "content": [*said, {"type": "text", "text": prompt}]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        streams: dict[int, np.ndarray] = {}
        with torch.inference_mode():
            if image is not None:
                view = View((load_image(image),))
                place = ids.index(tokenizer.convert_tokens_to_ids(self._config.frame.image))
                ids[place : place + 1] = self._tokens(view, patch)
                embeddings = self._embeddings(view)
                streams = {0: embeddings.float().numpy()}
            rows = self._model.get_input_embeddings()(torch.tensor([ids]))
            if image is not None:
                rows[0, [i for i, token in enumerate(ids) if token == patch]] = embeddings
            answer, logits = self._greedy({"inputs_embeds": rows}, n_positions)
        text_ids = [token for token in ids if token != patch]
        return _Expected(name, image, text_ids, ids.count(patch), streams, answer, logits)

    def _tokens(self, view: View, patch: int) -> list[int]:
        """The tokens of an image in a prompt, with `patch` in place of each embedding."""
        found: list[int] = []
        for part in view.parts(self._config):
            found += [patch] * part if isinstance(part, int) else [self._processor.convert_tokens_to_ids(part)]
        return found

    def _embeddings(self, view: View) -> Any:
        tiling, picture = self._config.tiling, view.images[0]
        tiles = cut_canvas(picture.pillow, canvas_layout(picture.size, tiling), tiling)
        pixels = self._torch.from_numpy(normalize(tiles, tiling)).permute(0, 3, 1, 2).to(self._model.dtype)
        return self._whole.multi_modal_projector(self._whole.vision_model(pixels).last_hidden_state).flatten(0, 1)


class _ImageProcessor:
    """A checkpoint's processor assembled from its parts, for one image per prompt.

    The image goes through transformers' image processor. In the text, the image placeholder is repeated once for each
    feature that the model computes for the image.
    """

    def __init__(self, directory: Path, model: Any) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin

        self._image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
        self._model, self.tokenizer = model, AutoTokenizer.from_pretrained(directory)
        self.chat_template = ProcessorMixin.get_processor_dict(directory)[0].get("chat_template")
        self.image_token_id = model.config.image_token_id

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        template = self.chat_template
        return str(self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))

    def __call__(self, text: str, images: Sequence[Image] = (), **options: Any) -> dict[str, Any]:
        import torch

        inputs = dict(self._image_processor(list(images), **options)) if images else {}
        ids = self.tokenizer(text).input_ids
        if images:
            with torch.inference_mode():
                pixels = inputs["pixel_values"].to(self._model.dtype)
                (rows,) = self._model.get_image_features(pixels, inputs["image_sizes"]).pooler_output
            place = ids.index(self.image_token_id)
            ids[place : place + 1] = [self.image_token_id] * len(rows)
        return {**inputs, "input_ids": torch.tensor([ids])}


def _import_extra() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DeviceError(
            f"'verify' runs the checkpoint through transformers, and {error.name!r} is not installed. {INSTALL}"
        ) from None
    return torch, transformers


def _merged(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise DeviceError(f"'--adapter' needs peft. {INSTALL}") from None
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
