#!/usr/bin/env bash
# PDFium: text extraction replaces a hyphen at the end of a line by U+FFFE and joins the lines
#
# Expected: the extracted text has the characters that the page shows: a hyphen, then a line break.
#   A reader that wants to undo hyphenation does so itself.
# Observed (pypdfium2 5.15.2, PDFium 159.0.8149): a "-" between a letter and the letter or digit that
#   begins the next line comes out as the noncharacter U+FFFE, and the line break is gone. This is
#   done for printed, real hyphens too ("INV-" / "2024"), since the page cannot tell them apart. A
#   hyphen after a digit ("20-" / "30") or at the end of the text stays, with its line break.
# Output:
#   pypdfium2 5.15.2, PDFium 159.0.8149.0
#   'The docu-' / 'ment ends'  -> 'The docu\ufffement ends'
#   'Invoice INV-' / '2024 due' -> 'Invoice INV\ufffe2024 due'
#   'pages 20-' / '30 only'     -> 'pages 20-\r\n30 only'
# Why it matters: a search for the invoice number that stands on the page finds nothing, comparing a
#   model's answer with the text layer fails on exactly these words, and U+FFFE is not a legal XML
#   character. Deleting it is right for "document" and wrong for "INV-2024"; keep both readings.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'pypdfium2==5.15.2' 'pikepdf==10.18.0'
"$work/venv/bin/python" - <<'PYTHON'
import io

import pikepdf
import pypdfium2
from pikepdf import Dictionary, Name, Stream


def extracted(*lines):
    """Text that PDFium finds on a page with these lines in Helvetica."""
    pdf = pikepdf.new()
    page = pdf.add_blank_page(page_size=(200, 200)).obj
    font = Dictionary(Type=Name.Font, Subtype=Name.Type1, BaseFont=Name.Helvetica, Encoding=Name.WinAnsiEncoding)
    page.Resources = Dictionary(Font=Dictionary(F1=pdf.make_indirect(font)))
    shown = " 0 -14 Td ".join(f"({line}) Tj" for line in lines)
    page.Contents = Stream(pdf, f"BT /F1 12 Tf 20 150 Td {shown} ET".encode())
    file = io.BytesIO()
    pdf.save(file)
    return pypdfium2.PdfDocument(file.getvalue())[0].get_textpage().get_text_range()


print(f"pypdfium2 {pypdfium2.PYPDFIUM_INFO.version}, PDFium {pypdfium2.PDFIUM_INFO.version.split('@')[0]}")
for first, second, expected in (
    ("The docu-", "ment ends", "The docu\ufffement ends"),
    ("Invoice INV-", "2024 due", "Invoice INV\ufffe2024 due"),
    ("pages 20-", "30 only", "pages 20-\r\n30 only"),
):
    text = extracted(first, second)
    print(f"{first!r} / {second!r} -> {text!r}")
    assert text == expected, text
assert extracted("ends with A-") == "ends with A-"
PYTHON
