"""Bodies of requests and responses: OpenAI's completion and chat objects with vLLM's and Tandem's extra fields.

An optional field that is null means the same as one left out. Ranges of sampling fields are SamplingParams'.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from tandem.api.backend import ServingDetails
from tandem.wire.messages import CacheSalt, KvTransferParams
from tandem.wire.sampling import MAX_COUNT, MAX_LOGPROBS

MAX_N = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_PARTS = 1024
MAX_TOOLS = 128
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 128

N = Annotated[int, Meta(ge=1, le=MAX_N)]
LogprobCount = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
BadWord = Annotated[str, Meta(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

# --- bodies of requests -------------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`continuous_usage_stats` (vLLM): the usage so far in every event; `include_obfuscation`: only false."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields that both APIs have."""

    model: str | None = None
    n: N | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: dict[int, float] | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: LogprobCount | None = None
    bad_words: Annotated[list[BadWord], Meta(max_length=MAX_BAD_WORDS)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=MAX_COUNT)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    cache_salt: CacheSalt | None = None
    return_token_ids: bool | None = None
    kv_transfer_params: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | bool | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


Body = TypeVar("Body", bound=GenerateBody)


class CompletionBody(GenerateBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: LogprobCount | None = None
    best_of: N | None = None


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`strict` may say what it likes: arguments that are forced always fit."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class CalledFunction(msgspec.Struct, frozen=True):
    """`arguments`: JSON."""

    name: str
    arguments: str


class MessageToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call, in a conversation as in an answer."""

    id: str
    type: Annotated[str, Meta(pattern="^function$")] = "function"
    function: CalledFunction


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str | Annotated[list[dict[str, Any]], Meta(max_length=MAX_PARTS)]
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1)]


class ChatBody(GenerateBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    messages: Messages
    max_completion_tokens: int | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's /tokenize: `prompt`, or `messages` as a chat makes its prompt of them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[int]


# --- bodies of responses ------------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """One entry a token, in parallel lists. `text_offset`: characters of the choice's text before the token.

    With `echo` the prompt's tokens come first, the first of them with null.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class RankedLogprob(msgspec.Struct, frozen=True):
    """How likely one token was in the prompt's place; `rank` 1 is the most likely (vLLM)."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]
"""For each token of a prompt what could have stood there, by token id; null for the first."""


class TopLogprob(msgspec.Struct, frozen=True):
    """`bytes`: the UTF-8 bytes of the token, of which `token` shows the characters."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]
    refusal: None = None


class TokenizeResponse(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(msgspec.Struct, frozen=True):
    prompt: str


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """`stop_reason` (vLLM): the stop string or stop token id; null after end-of-sequence or at the length."""

    index: int
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(Choice, frozen=True, kw_only=True):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[MessageToolCall] | UnsetType = UNSET


class ChatChoice(Choice, frozen=True, kw_only=True):
    message: AssistantMessage
    logprobs: ChatLogprobs | None


class FunctionDelta(msgspec.Struct, frozen=True):
    name: str | UnsetType
    arguments: str


class ToolCallDelta(msgspec.Struct, frozen=True):
    """More of a call; `id`, `type` and the function's name are in the first event that has some of it."""

    index: int
    id: str | UnsetType
    type: str | UnsetType
    function: FunctionDelta


class ChatDelta(msgspec.Struct, frozen=True):
    content: str | UnsetType | None = UNSET
    role: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Choice, frozen=True, kw_only=True):
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ResponseBody(msgspec.Struct, frozen=True, kw_only=True):
    """A whole response or one event of a stream.

    Attributes:
        usage: null in the events before the usage event, if that was asked for.
        tandem: how the response was made: an object, or for several choices a list in the order of their index; in a
            stream in the event that finishes a choice (of that choice), and in the usage event.
        prompt_token_ids, prompt_logprobs: of a chat; completions have them in each choice.
    """

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET
    tandem: ServingDetails | list[ServingDetails | None] | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    kv_transfer_params: KvTransferParams | UnsetType = UNSET
