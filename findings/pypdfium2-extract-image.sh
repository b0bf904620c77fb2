#!/usr/bin/env bash
# pypdfium2: PdfImage.extract() writes other pixels than the page shows, without a warning
#
# Expected: extract() saves an embedded image as a file that shows what the page shows, as
#   get_bitmap() does. Its documentation says that it goes another way than get_bitmap() to preserve
#   higher bit depths.
# Observed (pypdfium2 5.15.2, PDFium 159.0.8149), for images that are not stored as JPEG:
#   - /Decode [1 0] is ignored, so the extracted scan is a negative. get_bitmap() applies it.
#   - 16 bits a component: the two bytes of each sample are taken for two 8-bit samples, and the
#     second half of the data is lost. get_bitmap() reduces such samples to 8 bits properly.
#   In both cases the file is well formed and has the right size.
# Output (rows of four pixels):
#   pypdfium2 5.15.2, PDFium 159.0.8149.0
#   8 bit:                page [0, 100, 200, 255], extract [0, 100, 200, 255]
#   8 bit, Decode [1 0]:  page [255, 155, 55, 0], extract [0, 100, 200, 255]
#   1 bit, Decode [1 0]:  page [0, 255, 0, 255], extract [255, 0, 255, 0]
#   16 bit:               page [0, 99, 199, 255], extract [0, 0, 100, 0]
# Why it matters: taking the scan out of a PDF at its own resolution, instead of rendering the page,
#   is what OCR and archiving tools do. Inverted bilevel scans are common, and white text on black
#   degrades a vision model quietly. Use get_bitmap(), or compare both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    'pypdfium2==5.15.2' 'pikepdf==10.18.0' 'numpy==2.4.6' 'pillow==13.0.0'
"$work/venv/bin/python" - <<'PYTHON'
import io

import pikepdf
import pypdfium2
from pikepdf import Array, Dictionary, Name, Stream
from PIL import Image


def three_ways(data, bits, decode=None):
    """The four pixels of one image as rendered, by get_bitmap() and by extract()."""
    pdf = pikepdf.new()
    page = pdf.add_blank_page(page_size=(4, 4)).obj
    scan = Stream(pdf, data, Type=Name.XObject, Subtype=Name.Image, Width=4, Height=1)
    scan.ColorSpace, scan.BitsPerComponent = Name.DeviceGray, bits
    if decode:
        scan.Decode = Array(decode)
    page.Resources = Dictionary(XObject=Dictionary(I=pdf.make_indirect(scan)))
    page.Contents = Stream(pdf, b"q 4 0 0 4 0 0 cm /I Do Q")
    file = io.BytesIO()
    pdf.save(file)
    opened = pypdfium2.PdfDocument(file.getvalue())[0]
    image = next(opened.get_objects())
    bitmap = image.get_bitmap()
    rendered = opened.render(scale=1, grayscale=True).to_pil()
    extracted = io.BytesIO()
    image.extract(extracted)
    return [
        [picture.convert("L").getpixel((x, 0)) for x in range(4)]
        for picture in (rendered, bitmap.to_pil(), Image.open(extracted))
    ]


print(f"pypdfium2 {pypdfium2.PYPDFIUM_INFO.version}, PDFium {pypdfium2.PDFIUM_INFO.version.split('@')[0]}")
grey = bytes([0, 100, 200, 255])
for label, arguments, shown, saved in (
    ("8 bit:               ", (grey, 8), [0, 100, 200, 255], [0, 100, 200, 255]),
    ("8 bit, Decode [1 0]: ", (grey, 8, [1, 0]), [255, 155, 55, 0], [0, 100, 200, 255]),
    ("1 bit, Decode [1 0]: ", (b"\xa0", 1, [1, 0]), [0, 255, 0, 255], [255, 0, 255, 0]),
    ("16 bit:              ", (bytes([0, 0, 100, 0, 200, 0, 255, 255]), 16), [0, 99, 199, 255], [0, 0, 100, 0]),
):
    rendered, bitmap, extracted = three_ways(*arguments)
    print(f"{label} page {rendered}, extract {extracted}")
    assert rendered == bitmap == shown, (rendered, bitmap)
    assert extracted == saved, extracted
PYTHON
