"""The errors a caller can expect. One base, so that one `except` at the door is enough.

Every message says what was found, what was expected and what to do next. Anything that is not a
`Granite4vError` is a bug and keeps its traceback.
"""


class Granite4vError(Exception):
    """Base of every error that a user or a file can cause."""


class CheckpointError(Granite4vError):
    """A Hugging Face checkpoint or adapter that cannot be converted as it is."""


class ModelFileError(Granite4vError):
    """A GGUF file or model directory that cannot be read or does not fit its partner."""


class ImageError(Granite4vError):
    """A picture that cannot be opened or is unsafe to open."""


class ImageWarning(UserWarning):
    """A picture that is read, but not as a person would expect."""


class DocumentError(Granite4vError):
    """Something to read that is missing, damaged, locked or not a document, or a page that it does not have."""


class PromptError(Granite4vError):
    """Messages that the chat template cannot render faithfully."""


class ContextOverflowError(PromptError):
    """A request that needs more tokens than the context holds."""


class AnswerError(Granite4vError):
    """An answer that is not in the form its task asks for, or a table that a form cannot carry."""


class SchemaError(Granite4vError):
    """A schema of wanted fields that is none, or that asks for what no answer can be held to."""


class ConstraintError(Granite4vError):
    """A schema that is none, or a form that answers cannot be held to."""


class DeviceError(Granite4vError):
    """A device or a native library that is missing, unfit or out of memory."""


class OutputError(Granite4vError):
    """A target that exists already or cannot be written."""
