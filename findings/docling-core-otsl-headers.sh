#!/usr/bin/env bash
# docling-core: reading OTSL forgets which cells are headers, and an empty header cell becomes text
#
# Expected: OTSL marks column headers with <ched> and row headers with <rhed>. docling-core writes
#   these tags from TableCell.column_header and .row_header, so reading them sets the flags again. A
#   header cell without text (the corner above the row labels) reads as an empty cell.
# Observed (docling-core 2.104.0): parse_otsl_table_content(), which also serves
#   DoclingDocument.load_from_doctags(), recognizes the tags but leaves both flags False: <ched> and
#   <fcel> give equal cells, and the HTML export has no <th>. For <ched> directly before another
#   tag it takes that tag as the cell's text. docling-core's second OTSL parser, the one behind the
#   DocLang format, sets the flags and reads the corner as empty.
# Output:
#   docling-core 2.104.0
#   OTSL parser: [('<ched>', False), ('2024', False), ('Rent', False), ('120', False)]
#   DocLang parser: [('', True), ('2024', True), ('Rent', False), ('120', False)]
#   HTML after OTSL: 0 header cells
# Why it matters: models that read tables emit exactly this OTSL, with the empty corner in most
#   tables that have row labels. Anything derived from the parsed table (Markdown, HTML, chunks with
#   header context, table metrics) loses the headers and shows "<ched>" to the reader.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'docling-core==2.104.0'
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from docling_core.transforms.deserializer.doclang import DocLangDocDeserializer
from docling_core.types.doc import DoclingDocument
from docling_core.types.doc.document import DocTagsDocument, DocTagsPage
from docling_core.types.doc.utils import parse_otsl_table_content

otsl = "<otsl><ched><ched>2024<nl><rhed>Rent<fcel>120<nl></otsl>"
doclang = '<doclang version="0.8"><table><ched/><ched/>2024<nl/><rhed/>Rent<fcel/>120<nl/></table></doclang>'


def cells(table):
    return [(cell.text, cell.column_header) for cell in table.table_cells]


print("docling-core", version("docling-core"))
first = parse_otsl_table_content(otsl)
assert cells(first) == [("<ched>", False), ("2024", False), ("Rent", False), ("120", False)], cells(first)
assert not any(cell.row_header for cell in first.table_cells)
print("OTSL parser:", cells(first))

second = DocLangDocDeserializer().deserialize_str(doclang).tables[0].data
assert cells(second) == [("", True), ("2024", True), ("Rent", False), ("120", False)], cells(second)
assert [cell.row_header for cell in second.table_cells] == [False, False, True, False]
print("DocLang parser:", cells(second))

document = DoclingDocument.load_from_doctags(DocTagsDocument(pages=[DocTagsPage(tokens=f"<doctag>{otsl}</doctag>")]))
html = document.tables[0].export_to_html(doc=document)
assert html.count("<th") == 0 and "&lt;ched&gt;" in html, html
print("HTML after OTSL:", html.count("<th"), "header cells")
PYTHON
