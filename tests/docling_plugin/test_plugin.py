"""How docling finds the plugin, and the message without docling."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from docling.models.factories.picture_description_factory import PictureDescriptionFactory
from docling.models.factories.table_factory import TableStructureFactory

import granite4v.docling_plugin as plugin
from granite4v.docling_plugin import options
from scripts.nano.documents import draw_document
from scripts.nano.truth import HELD_OUT_SEEDS
from tests.helpers.pdfs import pdf_bytes, scan_pdf

ROOT = Path(__file__).resolve().parents[2]


def test_the_entry_point_leads_to_it() -> None:
    """As in pyproject.toml; an installation from before the plugin has none."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (name, module) = re.search(r'\[project\.entry-points\.docling\]\n(\w+) = "(.*)"', text).groups()  # type: ignore[union-attr]
    assert (name, module) == ("granite4v", plugin.__name__)
    installed = [one.value for one in entry_points(group="docling") if one.name == "granite4v"]
    assert installed in ([], [module])


def test_the_factories_make_its_stages_from_their_options() -> None:
    tables, pictures = TableStructureFactory(), PictureDescriptionFactory()
    tables.process_plugin(plugin.table_structure_engines(), "granite4v", plugin.__name__)
    pictures.process_plugin(plugin.picture_description(), "granite4v", plugin.__name__)
    assert tables.classes == {plugin.Granite4vTableOptions: plugin.Granite4vTableModel}
    assert pictures.classes == {plugin.Granite4vPictureOptions: plugin.Granite4vPictureModel}
    chosen = tables.create_options("granite4v_table", model="x", scale=3)
    assert isinstance(chosen, options.Granite4vTableOptions) and (chosen.model, chosen.scale) == ("x", 3)
    made = tables.create_instance(chosen, enabled=False, artifacts_path=None, accelerator_options=None)
    assert isinstance(made, plugin.Granite4vTableModel)


def test_its_names_are_those_of_the_package() -> None:
    assert {name: getattr(plugin, name).__name__ for name in dir(plugin)} == {name: name for name in plugin.__all__}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = plugin.nothing


def test_without_docling_there_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs docling; install it with pip install 'granite4v\[docling\]'"):
        from granite4v.docling_plugin import Granite4vTableOptions  # noqa: F401


# docling's factory imports every engine, one of which imports torchvision, which must match the installed torch
WITHOUT_TORCHVISION = """
import sys, types
import transformers
assert not transformers.utils.is_torchvision_available()
sys.modules["torchvision"] = types.ModuleType("torchvision")
sys.modules["torchvision.transforms"] = sys.modules["torchvision"].transforms = types.ModuleType("transforms")
"""


def test_the_lines_of_the_documentation_convert_a_pdf(tmp_path: Path) -> None:
    """Runs in docling's own pipeline. Its layout and classification models are not available here, so its stage for
    images of tables replaces the layout stage."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "granite4v.docling_plugin" in block)
    changes = {
        '"out/"': "None",
        "do_picture_classification=True": (
            "do_ocr=False, layout_options=TableCropsLayoutOptions(keep_empty_clusters=True)"
        ),
    }
    layout = "from docling.experimental.datamodel.table_crops_layout_options import TableCropsLayoutOptions\n"
    for old, new in changes.items():
        assert example.count(old) == 1
        example = example.replace(old, new)
    document = draw_document(HELD_OUT_SEEDS, "table", 0.5, "Aileron")
    (tmp_path / "report.pdf").write_bytes(pdf_bytes(scan_pdf(document.picture, document.picture, dpi=144)))
    code = f"{WITHOUT_TORCHVISION}\n{layout}{example}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    first, second = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert first == second and len(first) == document.truth.n_rows + 1
    found = {cell.strip() for line in first for cell in line.strip("|").split("|")}
    expected = {cell.text for cell in document.truth.cells}
    assert len(found & expected) > len(expected) / 2
