"""Messages to prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.errors import InvalidRequest
from router.chat_template import ChatTemplate, load_chat_template
from router.schemas import Message

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_messages_and_the_generation_prompt_are_rendered() -> None:
    template = ChatTemplate(CHATML, {})
    assert template.render([user("hi")]) == "<|user|>\nhi<|end|>\n<|assistant|>\n"
    assert template.render([user("hi")], add_generation_prompt=False) == "<|user|>\nhi<|end|>\n"


def test_continue_final_message_leaves_the_last_message_open() -> None:
    messages = [user("count"), {"role": "assistant", "content": "one, two,"}]
    text = ChatTemplate(CHATML, {}).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|assistant|>\none, two,")


def test_the_developer_role_is_a_system_role_where_the_template_does_not_know_it() -> None:
    assert ChatTemplate(CHATML, {}).render([{"role": "developer", "content": "x"}]).startswith("<|system|>")
    knowing = ChatTemplate("{% if messages[0].role == 'developer' %}yes{% endif %}", {})
    assert knowing.render([{"role": "developer", "content": "x"}]) == "yes"


def test_blocks_are_trimmed_as_transformers_does() -> None:
    source = "{% for m in messages %}\n    {% if m.role == 'user' %}\n[{{ m.content }}]\n    {% endif %}\n{% endfor %}"
    assert ChatTemplate(source, {}).render([user("a")]) == "[a]\n"


def test_templates_have_the_globals_that_they_expect() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ {'ü': '<b>'} | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') | length }} {{ bos_token }} {{ tools is none }} {{ enable_thinking }}"
    )
    text = ChatTemplate(source, {"bos_token": "<s>"}).render([user("a"), user("b")], variables={"enable_thinking": 1})
    assert text == '{"ü": "<b>"}4 <s> True 1'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.missing.attribute }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_the_requests_fault(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        ChatTemplate(source, {}).render([user("hi")])


def test_a_template_that_does_not_compile_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% if %}", {})


def test_the_template_of_a_model_directory_is_found(tmp_path: Path) -> None:
    assert load_chat_template(str(tmp_path)) is None
    config = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "{{ bos_token }}A"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = load_chat_template(str(tmp_path))
    assert template is not None
    assert template.render([user("x")]) == "<s>A"
    (tmp_path / "chat_template.jinja").write_text("B")
    template = load_chat_template(str(tmp_path))
    assert template is not None
    assert template.render([user("x")]) == "B"


def test_text_parts_become_one_string() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Message(role="user", content=parts).for_template(0) == {"role": "user", "content": "ab"}


def test_other_parts_are_refused_by_their_place() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://x"}}]
    with pytest.raises(InvalidRequest, match="image_url") as caught:
        Message(role="user", content=parts).for_template(2)
    assert caught.value.param == "messages[2].content[1].type"


def test_an_assistant_message_may_have_no_content() -> None:
    assert Message(role="assistant", content=None).for_template(0)["content"] == ""
    with pytest.raises(InvalidRequest):
        Message(role="user").for_template(0)
