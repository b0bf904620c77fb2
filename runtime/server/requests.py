"""Request bodies: those of OpenAI's API, with a few fields of our own. Unknown fields are ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Json: TypeAlias = dict[str, Any]
_INT64 = 1 << 63
Seed = Annotated[int, Field(ge=-_INT64, lt=_INT64)]
Probability = Annotated[float, Field(gt=0, le=1)]
StopText = Annotated[str, Field(min_length=1)]
# for requests that do not wait for a turn, so that any number of them may be in memory at once
LongText = Annotated[str, Field(max_length=1_000_000)]


class Body(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


def _kind(value: object) -> str | None:
    kinds: dict[type, str] = {str: "text", list: "list", dict: "object", ImageUrl: "object"}
    return kinds.get(type(value))


def _one_of(expected: str, kind: Callable[[object], str | None] = _kind) -> Discriminator:
    """Discriminator for a field of several types: only the alternative of the value's own type is validated.

    Error messages then say what is wrong with a list, and not also that a list is not a text. `expected`: what the
    error message names if the value has none of the types.
    """
    return Discriminator(kind, custom_error_type="wrong_type", custom_error_message=f"expected {expected}")


Stop: TypeAlias = Annotated[
    Annotated[StopText, Tag("text")] | Annotated[list[StopText], Field(max_length=16), Tag("list")],
    _one_of("a text, or a list of at most 16 texts"),
]


# --- content ---


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: str


class ImageUrl(Body):
    url: str


class ImagePart(Body):
    """`image_url`: a data URL, alone or as `{"url": ...}`; or a file below a directory that the server allows."""

    type: Literal["image_url", "input_image"]
    image_url: Annotated[
        Annotated[ImageUrl, Tag("object")] | Annotated[str, Tag("text")],
        _one_of("a data URL, alone or as {'url': ...}"),
    ]


class VideoFields(Body):
    """Fields of our own: the number of evenly spread `frames` to take, or how many per second (`fps`); by default 32
    frames."""

    frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[float, Field(gt=0)] | None = None


class VideoUrlPart(VideoFields):
    """`video_url`: a data URL, alone or as `{"url": ...}`; or a file below a directory that the server allows.
    'data:video/jpeg;base64,A,B' holds the frames themselves, as JPEGs."""

    type: Literal["video_url", "input_video"]
    video_url: Annotated[
        Annotated[ImageUrl, Tag("object")] | Annotated[str, Tag("text")],
        _one_of("a data URL, alone or as {'url': ...}"),
    ]


class VideoPart(VideoFields):
    """`video`: a URL as in `video_url`, or a list of the frames, each as in `image_url`."""

    type: Literal["video"]
    video: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[str], Field(min_length=1), Tag("list")],
        _one_of("a data URL, or a list of those of the frames"),
    ]


class FileContent(Body):
    """`file_data`: a PDF or an image as a data URL, or only its base64. `pages`: such as '1-3,7'; all by default."""

    file_data: str
    filename: str = ""
    pages: str | None = None
    password: str | None = None


class FilePart(Body):
    type: Literal["file"]
    file: FileContent


class InputFilePart(FileContent):
    type: Literal["input_file"]


Part: TypeAlias = Annotated[
    TextPart | ImagePart | FilePart | InputFilePart | VideoUrlPart | VideoPart, Field(discriminator="type")
]


Content: TypeAlias = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Tag("list")], _one_of("a text, or a list of parts")
]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[Json] | None = None
    tool_call_id: str | None = None


# --- the form of an answer ---


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    """`schema`: an optional JSON Schema, as clients of llama.cpp's server send it."""

    type: Literal["json_object"]
    schema_: Json | None = Field(default=None, alias="schema")


class NamedSchema(Body):
    """With or without `strict`, answers are constrained by what a grammar can express of the schema, and validated
    against the complete schema: the reply has `warnings` and `schema_error`."""

    name: str | None = None
    strict: bool | None = None
    schema_: Json | None = Field(default=None, alias="schema")


class JsonSchemaFormat(Body):
    """The schema is in `json_schema`, as in chat completions, or in `schema`, as in responses."""

    type: Literal["json_schema"]
    json_schema: NamedSchema | None = None
    name: str | None = None
    strict: bool | None = None
    schema_: Json | None = Field(default=None, alias="schema")


ResponseFormat: TypeAlias = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


# --- requests ---


class Sampled(Body):
    """Fields shared by all requests for answers; the default is greedy decoding.

    Fields of our own: `top_k`, `min_p`, `repeat_penalty`, `lora` (whether a separate adapter is applied; by default for
    requests with images), `drafting` (speculative decoding of text that the answer may repeat), `ignore_eos` (generate
    as many tokens as allowed, for measurements) and `confidence` (whether an answer to a task or a schema comes with
    the probabilities of its cells or fields; by default it does).

    Other servers' fields for constraints and penalties are refused, as they would have no effect: `grammar`,
    `json_schema`, `guided_...`, `structured_outputs`, `repetition_penalty` and `best_of`.
    """

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    lora: bool | None = None
    drafting: bool | None = None
    ignore_eos: bool | None = None
    confidence: bool | None = None
    grammar: Any = None
    json_schema: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    repetition_penalty: Any = None
    best_of: Any = None
    tool_choice: Any = None


class StreamOptions(Body):
    include_usage: bool | None = None


class CompletionFields(Sampled):
    """`frequency_penalty`, `presence_penalty` and `logit_bias` are refused unless they have no effect."""

    seed: Seed | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


class ChatRequest(CompletionFields):
    """Fields of our own: `format` ('json' or a JSON Schema, as Ollama's clients send it), `chat_template_kwargs`, and
    `unconstrained`: do not constrain the answer to a task tag to the format of that task."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    format: (
        Annotated[
            Annotated[Literal["json"], Tag("text")] | Annotated[Json, Tag("object")],
            _one_of("'json', or a JSON Schema"),
        ]
        | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: Json | None = None
    unconstrained: bool | None = None
    tools: list[Json] | None = None
    functions: list[Json] | None = None


def _prompt_kind(value: object) -> str | None:
    if not isinstance(value, list):
        return "text" if isinstance(value, str) else None
    known = {str: "texts", int: "tokens", list: "lists of tokens"}
    return known.get(type(value[0])) if value else "texts"


class CompletionRequest(CompletionFields):
    """`prompt`: a text or a list of tokens, or a list that holds one of them. It is used without the chat template."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Tag("texts")]
        | Annotated[list[int], Tag("tokens")]
        | Annotated[list[list[int]], Tag("lists of tokens")],
        _one_of("a text, or a list of tokens", _prompt_kind),
    ]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None


class InputItem(Body):
    """A message of a conversation. The client keeps the conversation; the server stores none."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class TextOptions(Body):
    format: ResponseFormat | None = None


class ResponseRequest(Sampled):
    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[InputItem], Field(min_length=1), Tag("list")],
        _one_of("a text, or a list of messages"),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: TextOptions | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    seed: Seed | None = None
    chat_template_kwargs: Json | None = None
    unconstrained: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    tools: list[Json] | None = None
    metadata: dict[str, str] | None = None


class ParseRequest(Body):
    """The text of an answer to a task ('tables_html', 'kvp', ...; 'prompt' for a question of the client's own).
    `ended`: whether the answer ended by itself; otherwise only its complete parts are read."""

    task: str
    text: LongText
    ended: bool = True


class TokenizeRequest(Body):
    """`add_special`: include the tokens that the tokenizer puts around a text. `with_pieces`: return the text of each
    token."""

    content: LongText
    add_special: bool = False
    with_pieces: bool = False
