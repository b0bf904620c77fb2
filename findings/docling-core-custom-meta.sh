#!/usr/bin/env bash
# docling-core: custom metadata of an item is printed into Markdown, text and HTML
#
# Expected: `meta` of an item is for data about the item (docling-core asks for namespaced names of
#   custom fields, such as my_tool__score, set with BaseMeta.set_custom_field). Exports show the
#   document's content; a number that a tool keeps about a table does not appear in the text.
# Observed (docling-core 2.104.0): the Markdown, text and HTML exports print every custom field of every
#   item as a paragraph after it, a dict as Python's repr. Only a caller who knows the field's name can
#   leave it out, with `blocked_meta_names`; whoever writes the document cannot.
# Output:
#   docling-core 2.104.0
#   without: '|   a |   b |\n|-----|-----|\n|   1 |   2 |'
#   with: "|   a |   b |\n|-----|-----|\n|   1 |   2 |\n\n{'mean': 0.98}"
#   text: ends in {'mean': 0.98}
#   HTML: holds mean
#   with the name blocked: as without
# Why it matters: confidences, sources or hashes that a converter attaches to items end up between
#   the paragraphs of a document, and so in chunks for retrieval and in front of readers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'docling-core==2.104.0'
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from docling_core.types.doc import DoclingDocument, TableCell, TableData
from docling_core.types.doc.document import FloatingMeta

print("docling-core", version("docling-core"))


def document(with_meta):
    made = DoclingDocument(name="d")
    rows = [["a", "b"], ["1", "2"]]
    cells = [
        TableCell(
            text=text,
            start_row_offset_idx=i,
            end_row_offset_idx=i + 1,
            start_col_offset_idx=j,
            end_col_offset_idx=j + 1,
            column_header=i == 0,
        )
        for i, row in enumerate(rows)
        for j, text in enumerate(row)
    ]
    table = made.add_table(data=TableData(table_cells=cells, num_rows=2, num_cols=2))
    if with_meta:
        table.meta = FloatingMeta()
        table.meta.set_custom_field(namespace="my_tool", name="score", value={"mean": 0.98})
    return made


plain, marked = document(False), document(True)
print("without:", repr(plain.export_to_markdown()))
print("with:", repr(marked.export_to_markdown()))
assert marked.export_to_markdown() == plain.export_to_markdown() + "\n\n{'mean': 0.98}", marked.export_to_markdown()
assert marked.export_to_text().endswith("{'mean': 0.98}"), marked.export_to_text()
print("text: ends in {'mean': 0.98}")
assert "mean" in marked.export_to_html() and "mean" not in plain.export_to_html()
print("HTML: holds mean")
again = DoclingDocument.model_validate_json(marked.model_dump_json())
assert again.tables[0].meta.get_custom_part() == {"my_tool__score": {"mean": 0.98}}
assert marked.export_to_markdown(blocked_meta_names={"my_tool__score"}) == plain.export_to_markdown()
print("with the name blocked: as without")
PYTHON
