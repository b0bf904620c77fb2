"""Documents in, data out: a batch of pages and tasks to records that survive whatever happens on the way."""

from granite4v.runtime.extraction.questions import ArgumentError
from granite4v.runtime.extraction.record import Record
from granite4v.runtime.extraction.run import Extraction, State, extract

__all__ = ["ArgumentError", "Extraction", "Record", "State", "extract"]
