"""Draws tests/data/invoice.png, a letter page at 200 dpi: the document that the demo and the benchmarks read.

    python -m scripts.draw_page [OUT.png]

Everything on it is invented. Drawn with Pillow's own font, so it needs no font files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH_PX, HEIGHT_PX = 1700, 2200
MARGIN_PX = 150
GREYS = 16
ITEMS = (
    ("A4 paper, 80 g, 500 sheets", 40, 5.20),
    ("Toner cartridge, black, 6,000 pages", 4, 81.50),
    ("Toner cartridge, cyan, 4,500 pages", 2, 96.00),
    ("Desk lamp, adjustable, warm white", 6, 34.90),
    ("Folders, assorted colours, box of 50", 10, 12.75),
    ("Whiteboard 120 x 90 cm, enamelled", 1, 148.00),
    ("Whiteboard markers, set of 8", 12, 7.95),
    ("Cable channel, 2 m, self-adhesive", 15, 4.40),
    ("Label printer, network", 1, 219.00),
    ("Labels 62 mm, continuous, 30 m", 20, 9.60),
    ("Shredder, cross cut, 12 sheets", 1, 129.90),
    ("Delivery and installation", 1, 65.00),
)
QUARTERS = (("Q1", 4120), ("Q2", 3875), ("Q3", 5240), ("Q4", 4690))


def draw_page() -> Image.Image:
    """Draws the page as an 8-bit greyscale image."""
    page = Image.new("L", (WIDTH_PX, HEIGHT_PX), 255)
    pen = ImageDraw.Draw(page)
    right = WIDTH_PX - MARGIN_PX
    _text(pen, MARGIN_PX, 130, "Harbour Lane Office Supplies Ltd.", 54)
    _text(pen, MARGIN_PX, 200, "17 Harbour Lane, Northport NP4 2AB  |  accounts@harbourlane.example", 28)
    _text(pen, right, 130, "INVOICE", 64, anchor="ra")
    pen.line((MARGIN_PX, 255, right, 255), fill=0, width=3)
    address = ("Bill to", "Meridian Survey Group", "Attn. Accounts Payable", "220 Quarry Road", "Eastfield EF1 9QT")
    for i, line in enumerate(address):
        _text(pen, MARGIN_PX, 300 + 40 * i, line, 30)
    for i, (label, value) in enumerate(
        (("Invoice no.", "HL-2024-00317"), ("Date", "14 March 2024"), ("Due", "13 April 2024"), ("Customer", "M-20481"))
    ):
        _text(pen, 1020, 300 + 40 * i, label, 30)
        _text(pen, right, 300 + 40 * i, value, 30, anchor="ra")
    bottom = _draw_items(pen, 560)
    _draw_chart(pen, bottom + 90)
    _text(pen, MARGIN_PX, 2060, "Payable within 30 days. Please state the invoice number with your payment.", 28)
    _text(pen, WIDTH_PX // 2, 2125, "Page 1 of 1", 24, anchor="ma")
    return page


def _draw_items(pen: ImageDraw.ImageDraw, top: int) -> int:
    """The table of items and the sums under it; returns where it ends, in pixels."""
    columns = (MARGIN_PX, 240, 1090, 1220, 1380, WIDTH_PX - MARGIN_PX)  # left edges, and the right one
    row_px = 58
    subtotal = sum(round(count * price, 2) for _, count, price in ITEMS)
    tax = round(0.2 * subtotal, 2)
    pen.rectangle((columns[0], top, columns[-1], top + row_px), fill=214)
    _row(pen, columns, top, ("No.", "Description", "Qty", "Price", "Amount"))
    for i, (name, count, price) in enumerate(ITEMS, start=1):
        cells = (str(i), name, str(count), f"{price:,.2f}", f"{count * price:,.2f}")
        _row(pen, columns, top + i * row_px, cells)
    end = top + (len(ITEMS) + 1) * row_px
    for y in range(top, end + 1, row_px):
        pen.line((columns[0], y, columns[-1], y), fill=96, width=2)
    for x in columns:
        pen.line((x, top, x, end), fill=96, width=2)
    for i, (label, value) in enumerate((("Subtotal", subtotal), ("Tax 20%", tax), ("Total GBP", subtotal + tax))):
        y = end + 22 + i * 46
        _text(pen, columns[3], y, label, 34 if i == 2 else 30)
        _text(pen, columns[-1] - 14, y, f"{value:,.2f}", 34 if i == 2 else 30, anchor="ra")
    return end + 22 + 3 * 46


def _row(pen: ImageDraw.ImageDraw, columns: Sequence[int], top: int, cells: Sequence[str]) -> None:
    for i, cell in enumerate(cells):
        if i < 2:
            _text(pen, columns[i] + 14, top + 14, cell, 28)
        else:
            _text(pen, columns[i + 1] - 14, top + 14, cell, 28, anchor="ra")


def _draw_chart(pen: ImageDraw.ImageDraw, top: int) -> None:
    base, bar_px = top + 330, 150
    _text(pen, MARGIN_PX, top - 10, "Your orders by quarter, 2023 (GBP)", 32)
    pen.line((MARGIN_PX, base, 1200, base), fill=0, width=3)
    for i, (name, value) in enumerate(QUARTERS):
        left = MARGIN_PX + 60 + i * 250
        height = value * 230 // max(amount for _, amount in QUARTERS)
        pen.rectangle((left, base - height, left + bar_px, base), fill=150 - 30 * (i % 2), outline=0, width=2)
        _text(pen, left + bar_px // 2, base - height - 38, f"{value:,}", 26, anchor="ma")
        _text(pen, left + bar_px // 2, base + 12, name, 28, anchor="ma")


def _text(pen: ImageDraw.ImageDraw, x: int, y: int, text: str, size_px: int, anchor: str = "la") -> None:
    pen.text((x, y), text, fill=16, font=ImageFont.load_default(size_px), anchor=anchor)


def main() -> None:
    default = Path(__file__).resolve().parent.parent / "tests" / "data" / "invoice.png"
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    target.parent.mkdir(parents=True, exist_ok=True)
    draw_page().quantize(GREYS).save(target, optimize=True, dpi=(200, 200))
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
