"""Documents in, data out: a batch of pages and tasks to records that survive whatever happens on the way."""

from granite4v.runtime.extraction.batch import Extraction
from granite4v.runtime.extraction.questions import ArgumentError
from granite4v.runtime.extraction.record import Record
from granite4v.runtime.extraction.run import extract
from granite4v.runtime.extraction.state import State

__all__ = ["ArgumentError", "Extraction", "Record", "State", "extract"]
