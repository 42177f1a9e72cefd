import json
from pathlib import Path
from typing import Any

import pytest

from tandem.api.chat_template import ChatTemplate, PromptEnd, load_template
from tandem.errors import InvalidRequest

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages: list[dict[str, str]] = HELLO, **variables: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, variables)


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_template_sees_messages_special_tokens_and_the_clients_variables() -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}{% endfor %}{{ enable_thinking }}"
    assert render(source, enable_thinking=False) == "<s>user:helloFalse"


def test_blocks_leave_no_lines_and_loops_can_be_left() -> None:
    source = "{% for m in messages %}\n  {% if loop.index > 1 %}\n    {% break %}\n  {% endif %}\n{{ m.content }}\n"
    source += "{% endfor %}"
    assert render(source, HELLO * 2) == "hello\n"


def test_json_in_a_template_is_plain() -> None:
    assert render("{{ {'a': '<ü>'} | tojson }}{{ [1] | tojson(indent=1) }}") == '{"a": "<ü>"}[\n 1\n]'


def test_generation_marks_are_only_their_contents() -> None:
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahellob"


def test_the_date_can_be_asked_for() -> None:
    assert render("{{ strftime_now('%%') }}") == "%"


def test_a_template_that_refuses_the_messages_says_why() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


def test_a_template_cannot_reach_outside() -> None:
    with pytest.raises(InvalidRequest, match="unsafe"):
        render("{{ messages.__class__.__mro__ }}")


def test_a_client_cannot_replace_the_messages() -> None:
    with pytest.raises(InvalidRequest, match="must not set messages"):
        ChatTemplate("x", {}).render(HELLO, {"messages": []})


def test_developer_messages_are_system_messages_where_the_template_does_not_know_them() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert render("{{ messages[0].role }}", messages) == "system"
    assert render("{# developer #}{{ messages[0].role }}", messages) == "developer"


def test_the_template_comes_from_the_tokenizer_config(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": "{{ bos_token }}1", "bos_token": {"content": "<b>"}})
    assert load_template(tmp_path).render(HELLO, {}) == "<b>1"


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert load_template(tmp_path).render(HELLO, {}) == "d"


def test_a_template_file_goes_before_the_config(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": "config"})
    write(tmp_path, "chat_template.jinja", "file")
    assert load_template(tmp_path).render(HELLO, {}) == "file"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "the model has no chat template"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, r"\(rag\) none is 'default'"),
        ({"chat_template": "{% if %}"}, "chat template is broken"),
    ],
)
def test_a_model_that_cannot_chat_says_why(tmp_path: Path, config: dict[str, Any], why: str) -> None:
    write(tmp_path, "tokenizer_config.json", config)
    with pytest.raises(InvalidRequest, match=why):
        load_template(tmp_path).render(HELLO, {})


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRIPPING = CHAT.replace("m.content", "m.content | trim")
GOES_ON = [*HELLO, {"role": "assistant", "content": " so it "}]


@pytest.mark.parametrize(
    ("source", "end", "expected"),
    [
        (CHAT, PromptEnd.NEW_MESSAGE, "<user>hello</><assistant> so it </><assistant>"),
        (CHAT, PromptEnd.AFTER_LAST_MESSAGE, "<user>hello</><assistant> so it </>"),
        (CHAT, PromptEnd.IN_LAST_MESSAGE, "<user>hello</><assistant> so it "),
        (STRIPPING, PromptEnd.IN_LAST_MESSAGE, "<user>hello</><assistant>so it"),
    ],
)
def test_the_model_goes_on_in_a_new_message_after_the_last_one_or_in_it(
    source: str, end: PromptEnd, expected: str
) -> None:
    assert ChatTemplate(source, {}).render(GOES_ON, {}, end) == expected


def test_a_last_message_that_the_template_does_not_show_cannot_be_continued() -> None:
    with pytest.raises(InvalidRequest, match="does not show") as caught:
        ChatTemplate("{{ messages[0].content }}", {}).render(GOES_ON, {}, PromptEnd.IN_LAST_MESSAGE)
    assert caught.value.param == "continue_final_message"
