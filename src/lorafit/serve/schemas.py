"""OpenAI's requests and answers, as far as they are served here.

What a request may hold is listed; all else is refused by its name, since an option that is silently ignored is an
answer that nobody asked for. Fields that steer nothing of the answer and that OpenAI's clients send (`user`,
`metadata`, ...) are taken and left alone. A field that would steer it, and that is not served, may have the value that
says so: `logprobs: false`, `tools: []`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lorafit.errors import nearest

UNKNOWN = "unknown_field"
MOST_CHOICES = 8
MOST_PROMPTS = 32

Ids: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, min_length=1)]
Texts: TypeAlias = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
Rows: TypeAlias = Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
Zero: TypeAlias = Annotated[float, Field(ge=0, le=0)]
Empty: TypeAlias = Annotated[list[None], Field(fail_fast=True, max_length=0)]
Free: TypeAlias = Annotated[str, Field(description="Taken, and without effect.")]


class Body(BaseModel):
    """A JSON object of a request: no type is converted to another, and no field is ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, json_schema_extra={"additionalProperties": False})

    @model_validator(mode="before")
    @classmethod
    def known(cls, value: Any) -> Any:
        """Refuses the first field that is not served. One error for any number of them: bodies come from strangers."""
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    near = nearest(str(key)[:100], cls.model_fields)
                    raise PydanticCustomError(
                        UNKNOWN,
                        "'{key}' is not served here{near}",
                        {"key": str(key)[:100], "near": f"; did you mean {' or '.join(near)}?" if near else ""},
                    )
        return value


class TextPart(Body):
    """A part of a message; only text is served."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A turn of a conversation. `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=1024)]
    refusal: None = None
    annotations: Empty | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Empty | None = None

    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Body):
    """The one format of answers."""

    type: Literal["text"]


class Asking(Body):
    """What both kinds of requests have in common."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Free | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def agree(self) -> Asking:
        """Options of a stream are for a stream."""
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is for stream: true alone")
        return self

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatCompletionRequest(Asking):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    metadata: Annotated[dict[str, Any], Field(description="Taken, and without effect.")] | None = None
    store: bool | None = None
    service_tier: Free | None = None
    safety_identifier: Free | None = None
    prompt_cache_key: Free | None = None
    prompt_cache_retention: Free | None = None
    parallel_tool_calls: bool | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, max_length=1)] | None = None

    @model_validator(mode="after")
    def one_length(self) -> ChatCompletionRequest:
        """Two lengths have to be the same."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens differ: give one of them")
        return self

    def length(self) -> int | None:
        """Tokens of the longest answer; None for as many as the context holds."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class CompletionRequest(Asking):
    """The body of /v1/completions."""

    prompt: str | Texts | Ids | Rows
    suffix: None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        whole: list[Any] = list(self.prompt)
        return [whole] if isinstance(whole[0], int) else whole

    def length(self) -> int:
        """Tokens of the longest answer."""
        return 16 if self.max_tokens is None else self.max_tokens


class LoadRequest(Body):
    """The body of /v1/load_lora_adapter, in vLLM's words."""

    lora_name: str
    lora_path: str
    load_inplace: Literal[False] | None = None


class UnloadRequest(Body):
    """The body of /v1/unload_lora_adapter, in vLLM's words."""

    lora_name: str
    lora_int_id: None = None


# Answers -----------------------------------------------------------------------


class Usage(BaseModel):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answered(BaseModel):
    """What the assistant said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: Answered
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None = None


class TextChoice(BaseModel):
    """One way in which a text goes on."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: None = None


class ModelCard(BaseModel):
    """A model of the server: the base, or an adapter on it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lorafit"
    parent: str | None = Field(description="The base of an adapter; null for the base itself.")
    max_model_len: int = Field(description="Tokens of a prompt and its answer together.")


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail


class Health(BaseModel):
    """The answer of /health."""

    status: Literal["ok"] = "ok"
