"""In: /v1/chat/completions' documents. Out: their shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from openlpu.engine.logprobs import MOST
from openlpu.serve.schema.base import (
    MOST_CHOICES,
    Body,
    Controls,
    Many,
    Shown,
    StreamOptions,
    Table,
    Usage,
    XGroq,
)


class TextPart(Body):
    """The only kind of content that a text model reads."""

    type: Literal["text"]
    text: str
    cache_control: Table[str] | None = None
    """Equal beginnings are found without it."""


class CalledFunction(Body):
    """arguments: JSON text."""

    name: str
    arguments: str


class GivenCall(Body):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None
    """Its place among the calls of a stream."""


class Message(Body):
    """One turn of the conversation. The last fields are what answers carry, and must be empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[TextPart] | None = None
    name: str | None = None
    tool_calls: Many[GivenCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    reasoning_content: None = None
    provider_specific_fields: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing_content", "content is missing")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("calls_of_others", "only the assistant has tool_calls")
        return self

    def plain(self) -> dict[str, Any]:
        """As templates read it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        told: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",
        }
        if self.name is not None:
            told["name"] = self.name
        if self.tool_calls:
            told["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        if self.tool_call_id is not None:
            told["tool_call_id"] = self.tool_call_id
        return told


class Function(Body):
    """parameters: a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    """A function that may be called."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """Which one."""

    name: str


class ToolChoice(Body):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class NamedSchema(Body):
    """A JSON schema that the answer fits, always: strict has no weaker form here."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Body):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class ChatRequest(Controls):
    """What OpenAI's clients send."""

    model: str
    messages: Annotated[Many[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[Many[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: Many[Literal["text"]] | None = None
    store: Literal[False] | None = None
    prompt_cache_key: str | None = None
    """Equal beginnings are found without it."""
    safety_identifier: str | None = None
    # What cannot be had may be given as nothing, as some clients do.
    reasoning_effort: None = None
    verbosity: Literal["medium"] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None
    prompt_cache_retention: None = None


class TopLogprob(Shown):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    """A token of the answer and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Shown):
    """One for each token."""

    content: list[TokenLogprobs] | None
    refusal: None = None


class MadeCall(Shown):
    """A call that the answer makes."""

    id: str
    type: Literal["function"]
    function: dict[str, str]


class AnswerMessage(Shown):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[MadeCall] | None = None


class ChatChoice(Shown):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Shown):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str | None = None
    choices: list[ChatChoice]
    usage: Usage
    x_groq: XGroq | None = None
    lpu_receipt: dict[str, Any] | None = None
