"""In: /v1/responses' documents. Out: their shapes, and the conversation that a request means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from openlpu.engine.logprobs import MOST
from openlpu.serve.schema.base import Body, Controls, Many, Shown
from openlpu.serve.schema.chat import Function, JsonObjectFormat, NamedSchema, TextFormat


class InputText(Body):
    """Text of a message. The last fields are what answers carry."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Body):
    """One turn; those of earlier answers may be given as they came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Many[InputText]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: None = None


class InputCall(Body):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class InputResult(Body):
    """What the function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Many[InputText]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


def _kind(value: Any) -> str:
    found = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "")
    return found if isinstance(found, str) else ""


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")],
    Discriminator(_kind),
]


class ResponseTool(Function):
    """A function that may be called. OpenAI's own tools are not here."""

    type: Literal["function"]


class ResponseToolChoice(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class ResponseJsonSchema(NamedSchema):
    """JSON that fits a schema."""

    type: Literal["json_schema"]


class TextOptions(Body):
    """What form the text has."""

    format: (
        Annotated[TextFormat | JsonObjectFormat | ResponseJsonSchema, Field(discriminator="type")]
        | None
    ) = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(Body):
    """Nothing is ever obfuscated here."""

    include_obfuscation: Literal[False] | None = None


class NoReasoning(Body):
    """No model here has settings for it."""

    effort: None = None
    summary: None = None


class ResponseRequest(Controls):
    """What OpenAI's clients send. No response is kept: store is false, whatever OpenAI's default,
    and previous_response_id is refused; send the conversation."""

    model: str
    input: str | Annotated[Many[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    tools: Annotated[Many[ResponseTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: Many[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST)] | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # What cannot be had may be given as nothing, as some clients do.
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    reasoning: NoReasoning | None = None
    max_tool_calls: None = None

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as templates read it."""
        told: list[dict[str, Any]] = []
        if self.instructions is not None:
            told.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*told, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, InputMessage):
                role = "system" if item.role == "developer" else item.role
                told.append({"role": role, "content": _text(item.content)})
            elif isinstance(item, InputResult):
                content = _text(item.output)
                told.append({"role": "tool", "content": content, "tool_call_id": item.call_id})
            else:
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                # Calls of one turn, and what was said before them, are one message.
                if not (told and told[-1]["role"] == "assistant"):
                    told.append({"role": "assistant", "content": ""})
                told[-1].setdefault("tool_calls", []).append(call)
        return told

    def structure(self) -> dict[str, Any]:
        """What constrains the answer, in the words of chat completions."""
        found: dict[str, Any] = {}
        form = self.text.format if self.text is not None else None
        if isinstance(form, ResponseJsonSchema):
            schema = form.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
            found["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form is not None:
            found["response_format"] = {"type": form.type}
        if self.tools is not None:
            found["tools"] = [
                {
                    "type": "function",
                    "function": tool.model_dump(exclude={"type"}, exclude_none=True),
                }
                for tool in self.tools
            ]
        if isinstance(self.tool_choice, ResponseToolChoice):
            name = {"name": self.tool_choice.name}
            found["tool_choice"] = {"type": "function", "function": name}
        elif self.tool_choice is not None:
            found["tool_choice"] = self.tool_choice
        plain = {"parallel_tool_calls", "regex", "grammar"}
        return found | self.model_dump(include=plain, exclude_none=True)


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class InputDetails(Shown):
    """cached_tokens: those of the prompt whose K/V were there already."""

    cached_tokens: int


class OutputDetails(Shown):
    """Nothing is thought in secret."""

    reasoning_tokens: int


class ResponseUsage(Shown):
    """Tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ModelResponse(Shown):
    """The whole answer. output: messages and function calls, in order."""

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["completed", "incomplete"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage
    lpu_receipt: dict[str, Any] | None = None
