#!/usr/bin/env bash
# PDFium: a layer that is off is hidden in three different ways, depending on who asks
#
# Expected: an optional content group that the document's default configuration turns off is not
#   there for the reader: nothing of it is rendered, whether it is page content or an annotation
#   with an /OC entry, and a text layer taken for the rendered page does not contain it.
# Observed (pypdfium2 5.15.2, PDFium 159.0.8149): page content in the group is not rendered, but its
#   text is extracted as if it were visible. An annotation in the same group is rendered all the
#   same: /OC of annotations is ignored.
# Output:
#   pypdfium2 5.15.2, PDFium 159.0.8149.0
#   layer on:  content inked, text 'DRAFT', stamp inked
#   layer off: content blank, text 'DRAFT', stamp inked
# Why it matters: watermarks, translations, print-only and superseded variants of a form live in
#   layers. A page image and the text layer of the same page then contradict each other, and a stamp
#   ("PAID", "CANCELLED") that no viewer shows is read by a vision model. Check /OC of annotations
#   before rendering, and do not treat extracted text as what the page shows.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'pypdfium2==5.15.2' 'pikepdf==10.18.0' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
import io

import pikepdf
import pypdfium2
from pikepdf import Array, Dictionary, Name, Stream, String


def page_of(is_on, as_stamp):
    """First page of a document with one layer, which holds a word or a filled stamp annotation."""
    pdf = pikepdf.new()
    page = pdf.add_blank_page(page_size=(200, 200)).obj
    layer = pdf.make_indirect(Dictionary(Type=Name.OCG, Name=String("Layer 1")))
    state = {"ON" if is_on else "OFF": Array([layer])}
    pdf.Root.OCProperties = Dictionary(OCGs=Array([layer]), D=Dictionary(Order=Array([layer]), **state))
    font = Dictionary(Type=Name.Font, Subtype=Name.Type1, BaseFont=Name.Helvetica, Encoding=Name.WinAnsiEncoding)
    page.Resources = Dictionary(Font=Dictionary(F1=pdf.make_indirect(font)), Properties=Dictionary(L1=layer))
    if as_stamp:
        look = Stream(pdf, b"0 0 100 50 re f", Type=Name.XObject, Subtype=Name.Form, BBox=Array([0, 0, 100, 50]))
        stamp = Dictionary(Type=Name.Annot, Subtype=Name.Stamp, Rect=Array([20, 20, 120, 70]), F=4, OC=layer)
        stamp.AP = Dictionary(N=pdf.make_indirect(look))
        page.Annots = Array([pdf.make_indirect(stamp)])
    else:
        page.Contents = Stream(pdf, b"/OC /L1 BDC BT /F1 12 Tf 20 150 Td (DRAFT) Tj ET EMC")
    file = io.BytesIO()
    pdf.save(file)
    return pypdfium2.PdfDocument(file.getvalue())[0]


def is_inked(page):
    return bool((page.render(scale=1).to_numpy() < 128).any())


print(f"pypdfium2 {pypdfium2.PYPDFIUM_INFO.version}, PDFium {pypdfium2.PDFIUM_INFO.version.split('@')[0]}")
for is_on in (True, False):
    content, stamp = page_of(is_on, as_stamp=False), page_of(is_on, as_stamp=True)
    text = content.get_textpage().get_text_range()
    inked = {True: "inked", False: "blank"}
    print(
        f"layer {'on: ' if is_on else 'off:'} content {inked[is_inked(content)]}, text {text!r}, stamp {inked[is_inked(stamp)]}"
    )
    assert is_inked(content) is is_on
    assert text == "DRAFT"
    assert is_inked(stamp)
PYTHON
