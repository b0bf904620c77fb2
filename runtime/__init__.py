"""From messages and pictures to answers: chat template, tokens, llama.cpp's decode loop, sampling.

Importing this package loads no library and reads no file.
"""

from granite4v.runtime.generate import Answer, Timings
from granite4v.runtime.model import AnswerStream, Model
from granite4v.runtime.sampling import Sampling

__all__ = ["Answer", "AnswerStream", "Model", "Sampling", "Timings"]
