"""`granite4v models`: manages models of the Hugging Face hub in the models folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from granite4v.cli import options
from granite4v.cli.outcome import EXIT_FAILURE
from granite4v.cli.progress import Progress
from granite4v.cli.streams import to_json
from granite4v.cli.terminal import clean, date
from granite4v.cli.verbosity import note

if TYPE_CHECKING:
    from granite4v.models import HubName, Installed


def list_models(as_json: options.JsonOption = False) -> None:
    """List the models in the models folder, with their sizes and when they were last used."""
    from granite4v import models

    found, begun = models.installed(), models.incomplete()
    if as_json:
        shown = {
            "folder": str(models.models_folder()),
            "models": [_as_data(model) for model in found],
            "incomplete": [{"name": name, "bytes": n_bytes} for name, n_bytes in begun.items()],
        }
        print(to_json(shown, indent=2))
        return
    rows = [("NAME", "SIZE", "LAST USED", "COMMIT")] if found else []
    rows += [
        (str(model.name), models.size(model.manifest.n_bytes), date(model.used), model.manifest.commit[:12])
        for model in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        name, size, *rest = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(clean("  ".join([name, size.strip().rjust(widths[1]), *rest]).rstrip(), keep=""))
    if not found:
        note(f"there are no models in '{models.models_folder()}'; 'granite4v models pull HUB_ID' fetches one")
    for name, n_bytes in begun.items():
        note(f"incomplete: {models.size(n_bytes)} of '{name}'; 'models pull' goes on with it, 'models rm' removes it")


def pull(names: options.HubNamesArgument, revision: options.RevisionOption = None) -> None:
    """Fetch models, or newer versions of them, from the hub into the models folder.

    Interrupted downloads resume where they stopped. GGUF files are kept as they are; a checkpoint is converted, and the
    quantization in HUB_ID is the weight type of its text model. If a model fails, the others are still fetched.
    """
    from granite4v import default_model, models
    from granite4v.errors import Granite4vError

    failed: list[str] = []
    with Progress(delay_s=0.5) as progress:
        for text in names:
            try:
                name = default_model.hub_name(text)
                model = default_model.pull_model(
                    name, progress.note, progress.written, progress.pulled, revision=revision
                )
            except Granite4vError as error:
                if len(names) == 1:
                    raise
                failed.append(text)
                progress.clear()
                typer.echo(f"granite4v: '{text}': {clean(str(error))}", err=True)
                continue
            progress.clear()
            typer.echo(f"{model.name}  {models.size(model.manifest.n_bytes)}  {model.path}")
    if failed:
        typer.echo(f"granite4v: {len(failed)} of {len(names)} models failed: {', '.join(failed)}", err=True)
        raise typer.Exit(EXIT_FAILURE)


def remove(names: options.PulledNamesArgument) -> None:
    """Remove models from the models folder, including what interrupted downloads left of them."""
    from granite4v import models

    for text in names:
        name = _hub_name(text)
        begun = name.repository in models.incomplete()
        if not begun or models.find(name) is not None:
            model = _installed(name, sole=True)
            freed, text = models.remove(model), str(model.name)
        else:
            freed = 0
        if begun:
            freed += models.discard_downloads(name)
        note(f"removed {text}: {models.size(freed)} freed")


def path(name: options.HubNameArgument) -> None:
    """Print the directory of a model, for scripts. Fetches nothing."""
    typer.echo(_installed(_hub_name(name)).path)


def _hub_name(text: str) -> HubName:
    """Parses the name of a hub model. Raises ModelFileError for anything else, especially a path."""
    from granite4v.errors import ModelFileError
    from granite4v.models import models_folder, parse

    name = parse(text)
    if name is None:
        raise ModelFileError(
            f"'{text}' is not the name of a model in '{models_folder()}'; give one that 'granite4v models list' shows."
        )
    return name


def _installed(name: HubName, *, sole: bool = False) -> Installed:
    """Finds the installed model of that name. `sole`: the name must not fit several. Raises ModelFileError."""
    from granite4v import models
    from granite4v.errors import ModelFileError

    model = models.find(name)
    if model is None:
        raise ModelFileError(
            f"'{name}' is not in '{models.models_folder()}'; 'granite4v models list' shows what is, and 'granite4v "
            f"models pull {name}' fetches it."
        )
    others = [str(other.name) for other in models.installed() if other.name.repository == name.repository]
    if sole and name.variant is None and len(others) > 1:
        raise ModelFileError(f"there are several models of '{name}'; name one: {', '.join(others)}.")
    return model


def _as_data(model: Installed) -> dict[str, Any]:
    manifest = model.manifest
    return {
        "name": str(model.name),
        "repository": manifest.repository,
        "variant": manifest.variant,
        "commit": manifest.commit,
        "converted": manifest.is_converted,
        "path": str(model.path),
        "bytes": manifest.n_bytes,
        "pulled": date(manifest.pulled),
        "used": date(model.used),
        "files": [{"name": file.name, "bytes": file.n_bytes, "sha256": file.sha256} for file in manifest.files],
    }
