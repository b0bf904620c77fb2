"""Documents in, data out: a batch of pages and tasks to records that survive whatever happens on the way."""

from granite4v.runtime.extraction.record import Record

__all__ = ["Record"]
