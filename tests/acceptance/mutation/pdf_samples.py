"""Small sound PDFs: text, scans, and a page with many features."""

from __future__ import annotations

import io

import pikepdf
from pikepdf import Array, Dictionary, Name, Stream

from tests.helpers.pdfs import add_page

from .samples import page_image

SIZE = (120, 90)


def plain() -> pikepdf.Pdf:
    pdf = pikepdf.new()
    add_page(pdf, "BT /F 12 Tf 10 60 Td (Total 12.50) Tj ET 1 0 0 rg 10 10 30 20 re f", SIZE)
    add_page(
        pdf,
        "BT /F 9 Tf 10 60 Td [(Item) -500 (Price)] TJ T* (Tea) ' ET",
        SIZE,
        Rotate=90,
        CropBox=Array([10, 10, 110, 80]),
    )
    return pdf


def _image(pdf: pikepdf.Pdf) -> Stream:
    image = Stream(pdf, page_image((24, 16)).tobytes())
    image.Type, image.Subtype, image.ColorSpace = Name.XObject, Name.Image, Name.DeviceRGB
    image.Width, image.Height, image.BitsPerComponent = 24, 16, 8
    return image


def scan() -> pikepdf.Pdf:
    pdf = pikepdf.new()
    page = add_page(pdf, "q 120 0 0 90 0 0 cm /I Do Q q 20 0 0 20 5 5 cm /J Do Q q 9 0 0 9 50 5 cm /M Do Q", SIZE)
    jpeg = io.BytesIO()
    page_image((24, 16)).save(jpeg, "JPEG")
    photo = Stream(pdf, jpeg.getvalue())
    photo.Type, photo.Subtype, photo.ColorSpace, photo.Filter = Name.XObject, Name.Image, Name.DeviceRGB, Name.DCTDecode
    photo.Width, photo.Height, photo.BitsPerComponent = 24, 16, 8
    photo.SMask = Stream(pdf, bytes(range(24)) * 16)
    photo.SMask.Type, photo.SMask.Subtype, photo.SMask.ColorSpace = Name.XObject, Name.Image, Name.DeviceGray
    photo.SMask.Width, photo.SMask.Height, photo.SMask.BitsPerComponent = 24, 16, 8
    mask = Stream(pdf, b"\xaa\x55" * 8)
    mask.Type, mask.Subtype, mask.ImageMask, mask.Width, mask.Height = Name.XObject, Name.Image, True, 8, 16
    mask.BitsPerComponent, mask.Decode = 1, Array([1, 0])
    page.Resources.XObject = Dictionary(I=_image(pdf), J=photo, M=mask)
    return pdf


def _type3_font(pdf: pikepdf.Pdf) -> Dictionary:
    glyph = Stream(pdf, b"600 0 0 0 500 500 d1 0 0 500 500 re f")
    return Dictionary(
        Type=Name.Font,
        Subtype=Name.Type3,
        FontBBox=Array([0, 0, 500, 500]),
        FontMatrix=Array([0.001, 0, 0, 0.001, 0, 0]),
        CharProcs=Dictionary(a=glyph, b=glyph),
        FirstChar=97,
        LastChar=98,
        Widths=Array([600, 600]),
        Resources=Dictionary(),
        Encoding=Dictionary(Type=Name.Encoding, Differences=Array([97, Name.a, Name.b])),
    )


def rich() -> pikepdf.Pdf:
    """Returns a page with forms, patterns, shadings, functions, a Type 3 font, transparency, annotations, fields,
    outlines, labels."""
    pdf = pikepdf.new()
    page = add_page(
        pdf,
        "/G gs /Pattern cs /P scn 0 0 60 40 re f q 1 0 0 1 60 0 cm /S sh Q /X Do BT /T 8 Tf 5 70 Td (ab) Tj ET "
        "/Sep cs 0.5 scn 70 50 20 20 re f BI /W 2 /H 2 /CS /G /BPC 8 ID abcd EI 0 0 m 10 10 20 10 30 0 c [3 2] 0 d S",
        SIZE,
    )
    function = Dictionary(FunctionType=2, Domain=Array([0, 1]), C0=Array([1, 0, 0]), C1=Array([0, 0, 1]), N=1)
    sampled = Stream(pdf, bytes(range(12)))
    sampled.FunctionType, sampled.Domain, sampled.Range = 0, Array([0, 1]), Array([0, 1, 0, 1, 0, 1])
    sampled.Size, sampled.BitsPerSample = Array([4]), 8
    calculator = Stream(pdf, b"{ dup 2 mul exch 0.5 sub 1 }")
    calculator.FunctionType, calculator.Domain, calculator.Range = 4, Array([0, 1]), Array([0, 1, 0, 1, 0, 1])
    stitched = Dictionary(
        FunctionType=3,
        Domain=Array([0, 1]),
        Functions=Array([function, sampled]),
        Bounds=Array([0.5]),
        Encode=Array([0, 1, 0, 1]),
    )
    shading = Dictionary(ShadingType=2, ColorSpace=Name.DeviceRGB, Coords=Array([0, 0, 60, 0]), Function=stitched)
    tile = Stream(pdf, b"1 0 0 rg 0 0 4 4 re f")
    tile.PatternType, tile.PaintType, tile.TilingType, tile.BBox = 1, 1, 1, Array([0, 0, 8, 8])
    tile.XStep, tile.YStep, tile.Resources = 8, 8, Dictionary()
    form = Stream(pdf, b"0 1 0 rg 0 0 9 9 re f /Y Do")
    form.Type, form.Subtype, form.BBox = Name.XObject, Name.Form, Array([0, 0, 20, 20])
    form.Group = Dictionary(S=Name.Transparency, CS=Name.DeviceRGB, I=True)
    form.Resources = Dictionary(XObject=Dictionary(Y=_image(pdf)))
    page.Resources.Font.T = _type3_font(pdf)
    page.Resources.Pattern, page.Resources.Shading = Dictionary(P=tile), Dictionary(S=shading)
    page.Resources.XObject = Dictionary(X=form)
    page.Resources.ExtGState = Dictionary(G=Dictionary(CA=0.5, ca=0.5, BM=Name.Multiply, SMask=Name("/None")))
    page.Resources.ColorSpace = Dictionary(Sep=Array([Name.Separation, Name.Spot, Name.DeviceRGB, calculator]))
    field = pdf.make_indirect(Dictionary(
        Type=Name.Annot, Subtype=Name.Widget, FT=Name.Tx, T="field", V="value", Rect=Array([5, 50, 60, 65]),
        DA="/F 8 Tf 0 g", F=4, P=page.obj,
    ))  # fmt: skip
    note = Dictionary(Type=Name.Annot, Subtype=Name.Square, Rect=Array([60, 60, 80, 80]), C=Array([1, 0, 0]), F=4)
    page.Annots = Array([field, note])
    fonts = Dictionary(Font=Dictionary(F=page.Resources.Font.F))
    pdf.Root.AcroForm = Dictionary(Fields=Array([field]), DA="/F 8 Tf 0 g", NeedAppearances=True, DR=fonts)
    pdf.Root.PageLabels = Dictionary(Nums=Array([0, Dictionary(S=Name.r)]))
    layer = pdf.make_indirect(Dictionary(Type=Name.OCG, Name="layer"))
    pdf.Root.OCProperties = Dictionary(OCGs=Array([layer]), D=Dictionary(ON=Array([layer])))
    with pdf.open_outline() as outline:
        outline.root.append(pikepdf.OutlineItem("one", 0))
    return pdf
