"""Files to pages: pictures, PDFs, folders and globs in, one upright RGB picture a page out, one at a time.

Importing this package loads no library and reads no file.
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
