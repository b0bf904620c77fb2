"""Converts a Hugging Face checkpoint to GGUF: plan, merge, quantize, write."""

from granite4v.converter.conversion import Options, Progress, Summary, check_options, convert, plan_conversion
from granite4v.converter.hub import Location
from granite4v.converter.plan import Plan, describe
from granite4v.converter.requantize import requantize
from granite4v.converter.vision_type import AUTO, fastest_vision_type

__all__ = [
    "AUTO",
    "Location",
    "Options",
    "Plan",
    "Progress",
    "Summary",
    "check_options",
    "convert",
    "describe",
    "fastest_vision_type",
    "plan_conversion",
    "requantize",
]
