"""Turns files into pages: images, PDFs, folders and globs in, one upright RGB image per page out, one at a time.

Importing this package loads neither PDFium nor NumPy: the process that reads pages has to stay small.
"""

from granite4v.runtime.documents.opening import Page, PageFailure, PageSkipped, Totals, count_pages, open_pages
from granite4v.runtime.documents.reader import ReaderEnded
from granite4v.runtime.documents.selection import Crop, PageRanges, SelectionError, parse_crop, parse_pages

__all__ = [
    "Crop",
    "Page",
    "PageFailure",
    "PageRanges",
    "PageSkipped",
    "ReaderEnded",
    "SelectionError",
    "Totals",
    "count_pages",
    "open_pages",
    "parse_crop",
    "parse_pages",
]
