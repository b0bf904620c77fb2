"""Extracts data from documents: turns pages and tasks into records that survive crashes, kills and power cuts."""

from granite4v.errors import ArgumentError
from granite4v.runtime.extract.batch import Extraction
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.run import begin, extract
from granite4v.runtime.extract.state import State

__all__ = ["ArgumentError", "ExtractOptions", "Extraction", "Record", "State", "begin", "extract"]
