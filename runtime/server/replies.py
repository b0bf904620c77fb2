"""Reply bodies: those of OpenAI's API, with llama-server's `timings` and a few fields of our own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from granite4v.runtime.formats.tasks import Kind

FinishReason = Literal["stop", "length"]


class Reply(BaseModel):
    pass


# --- errors ---


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    error: ErrorDetail


# --- tokens and times of an answer ---


class PromptDetails(Reply):
    """Prompt tokens that were not computed, because they were cached or stored; and image tokens."""

    cached_tokens: int
    image_tokens: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(Reply):
    """Token counts and times, with llama-server's names and units. `encode_ms`: encoding of the images into embeddings,
    not part of `prompt_ms`. `stored_n`: cached tokens that came from the page store."""

    cache_n: int
    stored_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float
    encode_ms: float
    load_ms: float
    forced_n: int
    draft_n: int
    draft_n_accepted: int


# --- probabilities ---


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(Reply):
    content: list[TokenLogprob]
    refusal: None = None


class Confidence(Reply):
    """Confidence of a field (keyed by its JSON pointer) or a cell (keyed by 'table/row/column', each from 0): the mean
    and the least probability of its tokens."""

    mean: float
    least: float


# --- chat completions ---


class Headed(Reply):
    """The first fields of each reply and event of completions."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatMessage(Reply):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """`stopped_by`: what ended the answer, if `finish_reason` does not say: 'repetition', when it was stopped for
    looping, or 'closed', when the grammar closed it at the token limit.

    For an answer to a JSON schema: `warnings` says what in the schema is not enforced during generation, and
    `schema_error` why the answer is not an instance of the complete schema; null if it is. `warnings` is null without
    a schema."""

    index: int
    message: ChatMessage
    logprobs: Logprobs | None = None
    finish_reason: FinishReason
    stopped_by: str | None = None
    warnings: list[str] | None = None
    schema_error: str | None = None
    confidence: dict[str, Confidence] | None = None


class ChatCompletion(Headed):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class ChatDelta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Reply):
    index: int
    delta: ChatDelta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stopped_by: str | None = None
    warnings: list[str] | None = None
    schema_error: str | None = None
    confidence: dict[str, Confidence] | None = None


class ChatChunk(Headed):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None


# --- completions ---


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None
    stopped_by: str | None = None
    warnings: list[str] | None = None
    schema_error: str | None = None


class Completion(Headed):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Timings | None = None


# --- the rest ---


class ModelEntry(Reply):
    """`meta`: the model's context size, number of parallel requests, and capabilities."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    meta: dict[str, Any]


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class InputTokens(Reply):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
    image_tokens: int


class TokenPiece(Reply):
    """`piece`: the text of the token; None for a token that is not text."""

    id: int
    piece: str | None


class Tokens(Reply):
    tokens: list[int] | list[TokenPiece]


class Parsed(Reply):
    """`value`: fields, code or prose. `tables`: tables, including the data of a chart; `csv`: each table as CSV (None
    if it would be too long). `is_cut`: whether something may be missing. `error`: what is wrong with the answer."""

    kind: Kind
    value: Any = None
    tables: list[dict[str, Any]] | None = None
    csv: list[str | None] | None = None
    is_cut: bool
    error: str | None = None


class Health(Reply):
    status: Literal["ok"] = "ok"


# --- responses ---


class OutputText(Reply):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(Reply):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class CachedTokens(Reply):
    cached_tokens: int


class ReasoningTokens(Reply):
    reasoning_tokens: int = 0


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int


class Incomplete(Reply):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseReply(Reply):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage | None
    error: None = None
    incomplete_details: Incomplete | None
    instructions: str | None
    metadata: dict[str, str]
    temperature: float
    top_p: float
    text: dict[str, Any]
    max_output_tokens: int | None
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: Literal[False] = False
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
    timings: Timings | None = None
    confidence: dict[str, Confidence] | None = None
    stopped_by: str | None = None
    warnings: list[str] | None = None
    schema_error: str | None = None
