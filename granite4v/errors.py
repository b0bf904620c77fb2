"""The errors that callers can expect, with one base class, so that one `except` catches them all.

Every message says what was found, what was expected and what to do next.
"""


class Granite4vError(Exception):
    """Base class of all errors that a user, a file or the machine can cause."""


class ArgumentError(Granite4vError, ValueError):
    """Invalid or contradictory arguments: wrong usage, while other errors are about files, models or the machine."""


class CheckpointError(Granite4vError):
    """A Hugging Face checkpoint or adapter that cannot be converted."""


class HubError(Granite4vError):
    """A model that the Hugging Face hub does not have or refuses, or whose download fails."""


class ModelFileError(Granite4vError):
    """A GGUF file or model directory that cannot be read, or files that do not belong together."""


class ImageError(Granite4vError):
    """An image that cannot be opened or is unsafe to open."""


class ImageWarning(UserWarning):
    """An image that is read, but not as its author may expect."""


class SpeedWarning(UserWarning):
    """A model that runs much slower than this machine could run it; the message says what to do about it."""


class PageStoreWarning(UserWarning):
    """A stored page that is damaged, or a page that cannot be stored; it is computed again, as without a store."""


class DocumentError(Granite4vError):
    """A document that is missing, damaged, encrypted or of an unknown type, or that lacks a requested page."""


class PasswordError(DocumentError):
    """An encrypted document without its password, or with a wrong one."""


class PromptError(Granite4vError):
    """Messages that the chat template cannot render, or renders without some of their content."""


class ContextOverflowError(PromptError):
    """A request that needs more tokens than the context holds."""


class AnswerError(Granite4vError):
    """An answer that does not match the format of its task, or a table that a format cannot represent."""


class SchemaError(Granite4vError):
    """An extraction schema that is invalid, or that no answer can satisfy."""


class ConstraintError(Granite4vError):
    """An invalid JSON Schema, or a format that answers cannot be constrained to.

    `advice`: the end of the message that only callers in Python and on the command line can follow; `problem`: the
    rest.
    """

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(f"{problem} {advice}".rstrip())
        self.problem, self.advice = problem, advice


class DeviceError(Granite4vError):
    """A device or native library that is missing, unsuitable or out of memory."""


class OutputError(Granite4vError):
    """An output file or directory that exists already or cannot be written."""
