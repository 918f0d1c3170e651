"""In: tools, messages and answers. Out: proof that prompts declare tools, that calls are well-made
with valid arguments, and that they are read again from any cut of the text."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai.types.chat as openai_chat
import pytest
from constrained import CHECKED, NAMES, PARTS, accepts, json_format, nested, spoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_chat import TEMPLATE, write_tiny_chat

from openlpu.errors import TemplateError
from openlpu.load.checkpoint import open_checkpoint
from openlpu.load.template import ChatTemplate
from openlpu.load.tokenizer import Tokenizer
from openlpu.serve.structured import Grammars, StructureError
from openlpu.serve.tools import CallParser, ToolPrompts, parse_answer, read_tools


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_tiny_chat(tmp_path_factory.mktemp("model") / "tiny")
    return Tokenizer.from_source(open_checkpoint(str(folder)).tokenizer)


@pytest.fixture(scope="module")
def tiny(bytes_tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars(bytes_tokenizer, vocab_size=300)
    yield grammars
    grammars.close()


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_source(open_checkpoint(str(smollm2_path)).tokenizer)


@pytest.fixture(scope="module")
def smollm2(smollm2_tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars(smollm2_tokenizer)
    yield grammars
    grammars.close()


# -- tools --------------------------------------------------------------------------------------


def tool(name: str = "weather", **parameters: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
        **parameters,
    }
    about = {"name": name, "description": f"About {name}.", "parameters": schema, "strict": True}
    return {"type": "function", "function": about}


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo {[\\"<"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "time", "arguments": {"zone": "x"}}\n</tool_call>'
TIME = tool("time", properties={"zone": {"type": "string"}}, required=["zone"])


@pytest.mark.parametrize(
    ("choice", "parallel", "sound", "unsound"),
    [
        (
            "auto",
            True,
            ["", "Hi <tool", "a < b", CALL, f"Sure.\n{CALL}", f"{CALL}\n{OTHER}"],
            [
                f"{CALL} more",
                CALL[:-1],
                "x<tool_call>",
                CALL.replace("city", "town"),
                "<tool_call>y",
            ],
        ),
        (None, False, ["Hi", CALL], [f"{CALL}\n{CALL}", CALL.replace("weather", "other")]),
        ("required", True, [CALL, f"{OTHER}\n{CALL}"], ["", "Hi", f"Hi {CALL}"]),
        (
            {"type": "function", "function": {"name": "time"}},
            False,
            [OTHER],
            ["", CALL, f"{OTHER}\n{OTHER}"],
        ),
    ],
)
def test_calls_are_well_formed(
    tiny: Grammars,
    bytes_tokenizer: Tokenizer,
    choice: Any,
    parallel: bool,
    sound: list[str],
    unsound: list[str],
) -> None:
    use = read_tools([tool(), TIME], choice, parallel)
    assert use is not None
    for text in sound + unsound:
        assert accepts(use.constraint(tiny), bytes_tokenizer, text) is (text in sound), text


def test_a_call_or_an_answer_in_json(tiny: Grammars, bytes_tokenizer: Tokenizer) -> None:
    use = read_tools([tool()])
    assert use is not None
    form = json_format({"type": "object", "required": ["a"]})
    for text, sound in ((CALL, True), ('{"a": 1}', True), ("Hi", False), ("{}", False)):
        assert accepts(use.constraint(tiny, form), bytes_tokenizer, text) is sound


@settings(max_examples=60)
@given(
    schemas=st.lists(
        st.dictionaries(NAMES, PARTS, max_size=2),
        min_size=1,
        max_size=3,
    ),
    choice=st.sampled_from(["auto", "required"]),
    seed=st.integers(0, 2**32 - 1),
    cut=st.integers(1, 9),
)
def test_random_calls_have_valid_arguments(
    smollm2: Grammars,
    smollm2_tokenizer: Tokenizer,
    schemas: list[dict[str, Any]],
    choice: str,
    seed: int,
    cut: int,
) -> None:
    """And are read again, the same whole or in pieces."""
    tools = {
        f"f{i}": {"type": "object", "properties": s, "required": sorted(s)}
        for i, s in enumerate(schemas)
    }
    use = read_tools([tool(n, **s) for n, s in tools.items()], choice)
    assert use is not None
    rule = use.constraint(smollm2)
    if choice == "auto":
        for token in smollm2_tokenizer.encode("Well.\n<tool_call>"):
            rule.advance(token)
    text, whole = spoken(rule, smollm2_tokenizer, np.random.default_rng(seed), most=600)
    if choice == "auto":
        text = "Well.\n<tool_call>" + text
    if not whole:
        return
    content, calls = parse_answer(text)
    assert content == ("Well." if choice == "auto" else None)
    assert calls
    for call in calls:
        schema = {"additionalProperties": False, **tools[call.name]}
        CHECKED(schema).validate(json.loads(call.arguments))
    again = CallParser(iter([call.id for call in calls]).__next__)
    for at in range(0, len(text), cut):
        again.push(text[at : at + cut])
    again.flush()
    assert again.calls == calls
    assert again.content == (content or "")


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_calls_are_streamed_as_openai_does(cut: int) -> None:
    text = f"Let me see. <\n{CALL}\n{OTHER}"
    parser = CallParser()
    deltas = [d for at in range(0, len(text), cut) for d in parser.push(text[at : at + cut])]
    deltas += parser.flush()
    content, arguments, begun = "", {0: "", 1: ""}, []
    for delta in deltas:
        read = openai_chat.chat_completion_chunk.ChoiceDelta.model_validate(delta, strict=True)
        content += read.content or ""
        for part in read.tool_calls or ():
            assert part.function is not None
            if part.index == len(begun):
                begun.append(part)
                assert part.type == "function"
                assert part.id is not None
                assert len(part.id) == len("call_") + 24
                assert part.function.arguments == ""
            else:
                assert part.id is None
                assert part.index == len(begun) - 1
            arguments[part.index] += part.function.arguments or ""
    assert content == "Let me see. <"
    assert [part.function and part.function.name for part in begun] == ["weather", "time"]
    assert arguments == {0: '{"city": "Oslo {[\\"<"}', 1: '{"zone": "x"}'}
    whole, calls = parse_answer(text)
    assert whole == content
    assert [call.arguments for call in calls] == list(arguments.values())
    for call in calls:
        openai_chat.ChatCompletionMessageFunctionToolCall.model_validate(call.as_json())


@settings(max_examples=200)
@given(
    parts=st.lists(
        st.sampled_from([*'ab \n<{}"\\', "<tool_call>", "</tool_call>", '{"name": "f", ', CALL]),
        max_size=12,
    ),
    cut=st.integers(1, 20),
)
def test_any_text_is_read_without_loss(parts: list[str], cut: int) -> None:
    """However it is cut; and what has no call in it stays as it is."""
    text = "".join(parts)
    ids = [f"call_{i}" for i in range(12)]
    whole, pieces = CallParser(iter(ids).__next__), CallParser(iter(ids).__next__)
    whole.push(text)
    whole.flush()
    for at in range(0, len(text), cut):
        pieces.push(text[at : at + cut])
    pieces.flush()
    assert (whole.content, whole.calls) == (pieces.content, pieces.calls)
    if not whole.calls:
        content, all_text = ("".join(said.split()) for said in (whole.content, text))
        dropped = all_text.removeprefix(content)
        assert content + dropped == all_text
        assert not dropped or '<tool_call>{"name":"f",'.startswith(dropped)


def test_an_answer_cut_short_keeps_what_came() -> None:
    for end, name in ((len(CALL) - 20, "weather"), (len(CALL) - 4, "weather"), (20, None)):
        content, calls = parse_answer(CALL[:end])
        assert [call.name for call in calls] == ([name] if name else [])
        if calls:
            assert CALL.split('"arguments": ')[1].startswith(calls[0].arguments)
            assert content is None
            assert calls[0].whole == (end == len(CALL) - 4)
        else:
            assert content == ""  # the name has not come: there is nothing to tell
    assert parse_answer("<tool_call>\n{1")[0] == "<tool_call>\n{1"


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([tool()] * 2, None, "tools"),
        ([tool(f"f{i}") for i in range(129)], None, "tools"),
        (["weather"], None, "tools[0]"),
        ([{"type": "web_search"}], None, "tools[0]"),
        ([tool("has space")], None, "tools[0].function.name"),
        ([tool(), tool('x" | /.*/')], None, "tools[1].function.name"),
        ([{"type": "function", "function": {"name": "f", "extra": 1}}], None, "tools[0].function"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": [1]}}],
            None,
            "tools[0].function.parameters",
        ),
        ([tool(type="string")], None, "tools[0].function.parameters"),
        ([tool()], "always", "tool_choice"),
        ([tool()], {"type": "function", "function": {"name": "other"}}, "tool_choice"),
        ([tool()], {"type": "allowed_tools"}, "tool_choice"),
        (None, "required", "tool_choice"),
        ([], {"type": "function", "function": {"name": "f"}}, "tool_choice"),
    ],
)
def test_bad_tools_are_refused_by_name(tools: Any, choice: Any, param: str) -> None:
    with pytest.raises(StructureError) as caught:
        read_tools(tools, choice)
    assert caught.value.param == param


def test_bad_parameters_are_refused_by_name(tiny: Grammars) -> None:
    deep = nested(100, lambda s: {"items": s})
    use = read_tools([tool(), tool("deep", properties={"a": deep})])
    assert use is not None
    with pytest.raises(StructureError, match="64 levels") as caught:
        use.constraint(tiny)
    assert caught.value.param == "tools[1].function.parameters"
    hostile = {"type": "integer", "allOf": [{"multipleOf": p} for p in (97, 89, 83, 79)]}
    use = read_tools([tool(properties={"a": hostile}, required=[])])
    assert use is not None
    with pytest.raises(StructureError, match="too long"):
        use.constraint(tiny)


def test_what_cannot_be_enforced_is_refused_where_all_must_hold(tiny: Grammars) -> None:
    for part in ({"uniqueItems": True}, {"oneOf": [{"minItems": 1}, {"maxItems": 3}]}):
        items = {"type": "array", "items": {"type": "null"}, **part}
        loose = tool(properties={"a": items}, required=["a"])
        use = read_tools([{**loose, "function": {**loose["function"], "strict": None}}])
        assert use is not None
        assert use.constraint(tiny) is not None
        use = read_tools([{**loose, "function": {**loose["function"], "strict": True}}])
        assert use is not None
        with pytest.raises(StructureError):
            use.constraint(tiny)


def test_no_tools_no_constraint() -> None:
    assert read_tools(None) is None
    assert read_tools([], "auto") is None
    assert read_tools(None, "none") is None
    assert read_tools([tool()], "none") is None
    bare = read_tools([{"type": "function", "function": {"name": "f"}}])
    assert bare is not None
    assert bare.tools[0].parameters == {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }


# -- prompts ------------------------------------------------------------------------------------

CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Öst"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "3 °C"}]},
    {"role": "tool", "tool_call_id": "call_2", "content": "rain"},
]
SAID = '<tool_call>\n{"name": "weather", "arguments": {"city": "Öst"}}\n</tool_call>'
RESULTS = "<tool_response>\n3 °C\n</tool_response>\n<tool_response>\nrain\n</tool_response>"


def trl_template(name: str) -> ChatTemplate:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    return ChatTemplate(path.read_text(), bos="<s>", eos="</s>")


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"])
def test_a_template_that_speaks_our_form_does_it_itself(name: str) -> None:
    template, use = trl_template(name), read_tools([tool()])
    assert use is not None
    messages = [{**message} for message in CALLED[:2]]
    text = ToolPrompts(template).render(messages, use)
    assert "About weather." in text
    assert SAID in text or SAID.replace("Ö", "\\u00d6") in text
    function = {"name": "weather", "arguments": {"city": "Öst"}}
    known = [
        messages[0],
        {"role": "assistant", "content": "",
         "tool_calls": [{"id": "call_1", "type": "function", "function": function}]},
    ]  # fmt: skip
    assert text == template.render(known, tools=[t.declared() for t in use.tools])


@pytest.mark.parametrize(
    "name", ["llama3", "llama3_1", "gemma", "phi3", "glm4moe", "qwen3_6", "gptoss", "deepseekv3"]
)
def test_other_templates_are_given_text(name: str) -> None:
    """Those without tools, and those that write calls in a form that we do not read."""
    use = read_tools([tool()])
    assert use is not None
    text = ToolPrompts(trl_template(name)).render(CALLED, use)
    assert text.count("About weather.") == 1
    assert SAID in text
    assert RESULTS in text
    assert json.dumps(use.tools[0].declared(), ensure_ascii=False) in text


def test_where_the_tools_are_declared() -> None:
    use = read_tools([tool()])
    assert use is not None
    prompts = ToolPrompts(ChatTemplate(TEMPLATE, bos="", eos=""))
    text = prompts.render([{"role": "user", "content": "Q"}], use)
    assert text.startswith("<|start|>system\nYou may call functions")
    text = prompts.render(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q"}], use
    )
    assert text.startswith("<|start|>system\nBe kind.\n\nYou may call functions")
    no_system = ChatTemplate(
        "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' }}"
        "[{{ m.content }}]{% endfor %}",
        bos="",
        eos="",
    )
    text = ToolPrompts(no_system).render([{"role": "user", "content": "Q"}], use)
    assert text.startswith("[You may call functions")
    assert text.endswith("\n\nQ]")
    plain = [{"role": "user", "content": "Q"}]
    assert ToolPrompts(no_system).render(plain) == no_system.render(plain) == "[Q]"


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", "[" * 100_000])
def test_bad_calls_in_messages_are_refused(arguments: str) -> None:
    message = {**CALLED[1], "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    with pytest.raises(StructureError, match="no JSON object") as caught:
        ToolPrompts(ChatTemplate(TEMPLATE, bos="", eos="")).render([message])
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


def test_the_variables_that_a_template_reads() -> None:
    source = "{% set tools = 1 %}{{ tools }}{{ messages[0].documents }}{{ enable_thinking }}"
    assert ChatTemplate(source, bos="", eos="").variables == {"messages", "enable_thinking"}
    assert "tools" in trl_template("llama3_1").variables
    assert "tools" not in trl_template("llama3").variables
    bomb = ChatTemplate(
        "{% if tools %}{% for i in range(10**9) %}x{% endfor %}{% endif %}{{ messages }}",
        bos="",
        eos="",
    )
    use = read_tools([tool()])
    with pytest.raises(TemplateError):
        bomb.render([{"role": "user", "content": "Q"}], tools=[tool()])
    # Found not to speak our form, it is not given the tools.
    assert "weather" in ToolPrompts(bomb).render([{"role": "user", "content": "Q"}], use)
