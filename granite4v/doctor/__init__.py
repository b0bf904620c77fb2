"""What this machine offers, what the installed llama-cpp-python makes of it, and what to do about the difference.

A check never raises: what it finds is a section of the report. Native code that may end its process runs in a child.
"""

from granite4v.doctor.report import Problem, Report, Section, examine

__all__ = ["Problem", "Report", "Section", "examine"]
