"""`granite4v verify`: how far a model directory is from the checkpoint it was made of."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from granite4v.cli.options import DeviceOption, JsonOption, MmprojOption, ThreadsOption
from granite4v.cli.streams import to_json

if TYPE_CHECKING:
    from granite4v.runtime.verify import Comparison


class Dtype(str, Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def verify(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Model directory, or a text GGUF file.")],
    reference: Annotated[Path, typer.Option(metavar="HF_DIR", help="The checkpoint it was made of.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="An image to compare on; may be repeated.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The question put to both.")] = "What is shown here?",
    positions: Annotated[int, typer.Option(min=1, help="Tokens of the reference's answer to compare at.")] = 32,
    dtype: Annotated[Dtype, typer.Option(help="What the reference computes in.")] = Dtype.FLOAT32,
    adapter: Annotated[
        Path | None, typer.Option(metavar="PATH", help="PEFT adapter that the reference merges into itself.")
    ] = None,
    mmproj: MmprojOption = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Float32 cache and plain attention on our side, whatever the weights; F32 files always so."
        ),
    ] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a model with its Hugging Face checkpoint, through transformers.

    Reports each stream of image embeddings, the logits, the KL divergence and how often both put the same token
    first, for every image and for the prompt alone. Needs the 'verify' extra.
    """
    from granite4v.runtime import Model
    from granite4v.runtime.verify import verify as run_verify

    with Model.load(model, n_threads=threads, device=device, mmproj=mmproj, exact=exact or None) as loaded:
        results = run_verify(
            loaded,
            reference,
            image or [],
            prompt=prompt,
            n_positions=positions,
            dtype=dtype.value,
            adapter=adapter,
            report=lambda line: typer.echo(line, err=True),
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
            "as the reference"
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
