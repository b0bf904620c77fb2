"""Reports what this machine offers, how much of it the installed llama-cpp-python uses, and how to get the rest.

A check never raises; its findings are a section of the report. Native code that may end its process runs in a child
process.
"""

from granite4v.doctor.report import Problem, Report, Section, examine

__all__ = ["Problem", "Report", "Section", "examine"]
