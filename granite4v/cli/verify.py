"""`granite4v verify`: measures how much a model differs from the checkpoint it was converted from."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from granite4v.cli import options
from granite4v.cli.progress import Progress
from granite4v.cli.streams import to_json

if TYPE_CHECKING:
    from granite4v.runtime.verify import Comparison


class Dtype(str, Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def verify(
    model: options.ModelArgument,
    reference: options.ReferenceOption,
    image: options.ImagesOption = None,
    prompt: options.ComparedPromptOption = "What is shown here?",
    positions: options.PositionsOption = 32,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Data type that the reference computes in.")] = Dtype.FLOAT32,
    adapter: options.ReferenceAdapterOption = None,
    mmproj: options.MmprojOption = None,
    exact: options.ExactOption = False,
    cache_type: options.CacheTypeOption = None,
    threads: options.ThreadsOption = None,
    device: options.DeviceOption = "auto",
    as_json: options.JsonOption = False,
) -> None:
    """Compare a model with its Hugging Face checkpoint.

    Runs the checkpoint in transformers. For each image, and for the prompt without an image, reports the error of
    every stream of image embeddings and of the logits, the KL divergence, and how often both models rank the same
    token first. Needs the 'verify' extra.
    """
    from granite4v.runtime import Model
    from granite4v.runtime.verify import verify as run_verify

    if exact and cache_type is not None:
        raise typer.BadParameter("--exact computes with a float32 KV cache.", param_hint="--cache-type")
    with (
        Progress() as progress,
        Model.load(
            model, n_threads=threads, device=device, mmproj=mmproj, exact=exact or None, cache_type=cache_type
        ) as loaded,
    ):
        results = run_verify(
            loaded,
            reference,
            image or [],
            prompt=prompt,
            n_positions=positions,
            dtype=dtype.value,
            adapter=adapter,
            report=progress.note,
        )
    if as_json:
        comparisons = [result.as_dict() for result in results]
        print(to_json({"model": str(model), "reference": str(reference), "comparisons": comparisons}, indent=2))
    else:
        typer.echo("\n\n".join(_table(result) for result in results))


def _table(result: Comparison) -> str:
    lines = [result.image or "text only"]
    if result.image:
        same = (
            "same as the reference"
            if result.n_image_tokens == result.n_image_tokens_reference
            else (f"the reference has {result.n_image_tokens_reference}")
        )
        lines.append(f"  image tokens             {result.n_image_tokens} ({same})")
    lines.append(f"  prompt tokens            {'equal' if result.same_prompt_tokens else 'DIFFERENT'}")
    lines += [
        f"  {f'stream of layer {stream.layer}':<24} {stream.relative_l2:.2e} relative L2" for stream in result.streams
    ]
    lines += [
        f"  logits                   {result.logits_relative_l2:.2e} relative L2, {result.logits_max:.2e} at most",
        f"  KL divergence            {result.kl_mean:.2e} nats on average, {result.kl_max:.2e} at most",
        f"  same top token           {result.same_top:.1%} of {result.n_positions} positions",
    ]
    return "\n".join(lines)
