"""Each extra installs and imports alone, and is all that its option needs; without it the option says what to install.

    python -m tests.acceptance.extras --work build/extras
    python -m tests.acceptance.extras --work build/extras --extra xlsx --extra video

A base environment has the package without extras. For each extra it is copied with hard links, and pip installs the
extra into the copy, which is removed after its option was used. Takes some minutes and 3 GB; llama-cpp-python is
compiled unless pip has a wheel of it. Versions are those of scripts/constraints.txt.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from granite4v.converter import Options, convert
from tests.acceptance.harness import Result, tell
from tests.helpers.pictures import text_picture
from tests.helpers.source_tree import ROOT
from tests.helpers.videos import write_video
from tests.toy.checkpoint import PRESETS, write_checkpoint

PIP = (sys.executable, "-m", "pip")
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
IMPORT_ALL = """
import importlib, pkgutil, sys
import granite4v
for module in pkgutil.walk_packages(granite4v.__path__, "granite4v."):
    if not module.name.endswith("__main__") and (sys.argv[1] == "docling" or "docling_plugin." not in module.name):
        importlib.import_module(module.name)
"""
DOCLING = "from granite4v.docling_plugin import Granite4vPictureModel, Granite4vTableModel"
FONTS = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts' / 'nano')!r}); import drawing; drawing.held_out_font()"
FSSPEC = """
import fsspec, granite4v
with open("page.png", "rb") as page:
    fsspec.filesystem("memory").pipe("/page.png", page.read())
with granite4v.extract(["memory://page.png"], ["tables_html"]) as run:
    [record] = run
assert record.error is None, record.error
"""
TABLE = "from granite4v.runtime.formats import Cell, Table; Table(1, 1, 0, (Cell(0, 0, ''),)).to_pandas()"


@dataclass(frozen=True)
class Use:
    """A use of an extra: arguments of `granite4v`, or `code`. {out}: a directory in which it `writes` files of this
    pattern."""

    extra: str
    imports: str
    arguments: str = ""
    code: str = ""
    writes: str = ""
    advice: str = ""  # expected in the message without the extra; by default `granite4v[EXTRA]`

    def command(self, python: Path, out: Path) -> list[str]:
        if self.code:
            return [str(python), "-c", self.code]
        return [str(python), "-m", "granite4v", *(word.format(out=out) for word in self.arguments.split())]


READ = "extract page.png --task tables_html --out {out}"
USES = (
    Use("pandas", "pandas", code="import granite4v; print(granite4v.read_results('results'))"),
    Use("pandas", "pandas", code=TABLE),
    Use("arrow", "pyarrow", code="import granite4v; print(granite4v.read_results('results', arrow=True))"),
    Use("parquet", "pyarrow.parquet", f"{READ} --format parquet", writes="*.parquet"),
    Use("parquet", "pyarrow.parquet", "export results --format parquet --out {out}", writes="*.parquet"),
    Use("xlsx", "openpyxl", f"{READ} --format xlsx", writes="*.xlsx"),
    Use("xlsx", "openpyxl", "export results --format xlsx --out {out}", writes="*.xlsx"),
    Use("docling", "docling_core", f"{READ} --format docling", writes="*.docling.json"),
    Use("docling", "docling.document_converter", code=DOCLING),
    Use("llvm", "granite4v.ggml.compiled.nodes", f"{READ} --parallel 2", writes="results.jsonl"),
    Use("onednn", "granite4v.ggml.onednn", "ask page.png Hm? --vision-compute BF16 --max-tokens 2"),
    Use("ray", "ray", f"{READ} --ray local", writes="results.jsonl"),
    Use("fsspec", "fsspec", code=FSSPEC),
    Use("video", "av", "ask --video video.mp4 Hm? --frames 2 --max-tokens 2 --model videos"),
    Use("fonts", "matplotlib", code=FONTS, advice="pip install font-hanken-grotesk"),
    Use("verify", "peft", "verify model --reference checkpoint --image page.png --positions 2"),
)  # fmt: skip
EXTRAS = tuple(dict.fromkeys(use.extra for use in USES))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", action="append", choices=EXTRAS, help="only this one; may be repeated")
    parser.add_argument("--work", type=Path, required=True, help="a directory that does not exist yet")
    options = parser.parse_args(arguments)
    work = options.work.absolute()
    work.mkdir(parents=True)
    return Check(work, tuple(options.extra or EXTRAS)).run().print()


class Check:
    def __init__(self, work: Path, extras: Sequence[str]) -> None:
        self._work, self._extras = work, extras
        self._files = make_files(work / "files")
        self._result = Result("extras", {"extras": list(extras), "n_uses": 0, "megabytes": {}})

    def run(self) -> Result:
        [wheel] = self._wheel()
        base = self._work / "base"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base)], check=True)
        self._install(base, str(wheel))
        self._expect(base, "no extra", [python_of(base), "-c", IMPORT_ALL, ""])
        results = ["extract", "page.png", "--task", "tables_html", "--out", "results"]
        self._expect(base, "no extra", [python_of(base), "-m", "granite4v", *results])
        for use in self._uses(self._extras):
            self._refuse(base, use)
        for extra in self._extras:
            self._try(base, extra, wheel)
        return self._result

    def _uses(self, extras: Sequence[str]) -> Iterator[Use]:
        return (use for use in USES if use.extra in extras)

    def _wheel(self) -> list[Path]:
        folder = self._work / "wheel"
        command = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
        subprocess.run(command, check=True)
        return list(folder.glob("*.whl"))

    def _install(self, environment: Path, what: str) -> None:
        command = [*PIP, "--python", str(python_of(environment)), "install", "--quiet", "--no-compile"]
        subprocess.run([*command, "--constraint", str(CONSTRAINTS), what], check=True)
        subprocess.run([*PIP, "--python", str(python_of(environment)), "check"], check=True, stdout=sys.stderr)

    def _try(self, base: Path, extra: str, wheel: Path) -> None:
        """Checks an environment with one extra."""
        environment = self._work / extra
        shutil.copytree(base, environment, symlinks=True, copy_function=os.link)
        self._install(environment, f"{wheel}[{extra}]")
        self._result.figures["megabytes"][extra] = megabytes(environment) - megabytes(base)
        self._expect(environment, extra, [python_of(environment), "-c", IMPORT_ALL, extra])
        for number, use in enumerate(self._uses([extra])):
            self._expect(environment, extra, [python_of(environment), "-c", f"import {use.imports}"])
            out = self._work / f"out-{extra}-{number}"
            self._expect(environment, extra, use.command(python_of(environment), out))
            if use.writes and not list(out.glob(use.writes)):
                self._result.broken.append(f"{extra}: no {use.writes} in {out}")
        shutil.rmtree(environment)

    def _expect(self, environment: Path, extra: str, command: Sequence[object]) -> None:
        done = self._run(command)
        if done.returncode:
            self._result.broken.append(f"{extra}: {shown(command)} ended with {done.returncode}: {done.stderr[-2000:]}")

    def _refuse(self, base: Path, use: Use) -> None:
        """Checks that without the extra there is one message that names it, and that no work was started. Skipped if
        another package brings the same import."""
        if not self._run([python_of(base), "-c", f"import {use.imports}"]).returncode:
            self._result.lines.append(f"{use.imports}: there without {use.extra}")
            return
        out = self._work / f"refused-{use.extra}"
        command = use.command(python_of(base), out)
        done = self._run(command)
        advice = use.advice or f"granite4v[{use.extra}]"
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode != 1 or advice not in last or (not use.code and "Traceback" in done.stderr) or out.exists():
            self._result.broken.append(
                f"without {use.extra}: {shown(command)}: {done.returncode}: {done.stderr[-2000:]}"
            )
        self._result.lines.append(f"without {use.extra}: {last}")

    def _run(self, command: Sequence[object]) -> subprocess.CompletedProcess[str]:
        tell(shown(command))
        self._result.figures["n_uses"] += 1
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GRANITE4V"))}
        quiet = {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1", "GRANITE4V_CONFIG": os.devnull}
        return subprocess.run(
            list(map(str, command)),
            cwd=self._files,
            env={**own, **quiet, "GRANITE4V_CACHE": str(self._work / "cache")},
            capture_output=True,
            text=True,
            timeout=600,
        )


def make_files(folder: Path) -> Path:
    """Writes what the options read: a page, a video, a model with its checkpoint, and a model that takes videos."""
    folder.mkdir()
    text_picture((150, 100)).save(folder / "page.png")
    write_video(folder / "video.mp4", 8, rate=4)
    for name, spec in (("checkpoint", "tiny"), ("videos-checkpoint", "tiny-onevision")):
        write_checkpoint(folder / name, PRESETS[spec])
    for name, checkpoint in (("model", "checkpoint"), ("videos", "videos-checkpoint")):
        convert(folder / checkpoint, folder / name, Options(text_type="F32", vision_type="F32"))
    return folder


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def megabytes(folder: Path) -> int:
    sizes = (path.lstat().st_size for path in folder.rglob("*"))
    return round(sum(sizes) / 1e6)


def shown(command: Sequence[object]) -> str:
    return shlex.join(map(str, command)).replace("\n", " ")[:300]


if __name__ == "__main__":
    sys.exit(main())
