"""Hugging Face checkpoint to GGUF: plan, merge, quantize, write."""

from granite4v.converter.conversion import Options, Progress, Summary, check_options, convert, plan_conversion
from granite4v.converter.plan import Plan, describe
from granite4v.converter.requantize import requantize

__all__ = [
    "Options",
    "Plan",
    "Progress",
    "Summary",
    "check_options",
    "convert",
    "describe",
    "plan_conversion",
    "requantize",
]
