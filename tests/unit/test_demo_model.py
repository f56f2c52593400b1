"""The embedded demo model: its files are whole, its chat template is portable, and its answers are exact."""

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
DIRECTORY = REPOSITORY / "baton" / "demo_model"
PAIRS = [json.loads(line) for line in (REPOSITORY / "bench/demo_model/qa.jsonl").read_text("utf-8").splitlines()]
CONFIG = json.loads((DIRECTORY / "config.json").read_text("utf-8"))
TOKENIZER_CONFIG = json.loads((DIRECTORY / "tokenizer_config.json").read_text("utf-8"))
TOKENIZER = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
END = CONFIG["eos_token_id"]
HELPFUL = {"role": "system", "content": "You are a helpful assistant."}

CHATS = [
    [{"role": "user", "content": "What is Baton?"}],
    [HELPFUL, {"role": "user", "content": "  Grüße,\n\n你好 🎽 {{ 1 + 1 }} <b>&amp;</b>  "}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": ""},
    ],
]


@cache
def load_model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY).eval()


@cache
def load_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(DIRECTORY)


def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    template = ImmutableSandboxedEnvironment().from_string(TOKENIZER_CONFIG["chat_template"])
    return template.render(
        messages=messages,
        bos_token=TOKENIZER_CONFIG["bos_token"],
        eos_token=TOKENIZER_CONFIG["eos_token"],
        add_generation_prompt=add_generation_prompt,
    )


def ask(question: str) -> list[int]:
    """Token ids of a chat that only asks `question`."""
    return TOKENIZER.encode(render([{"role": "user", "content": question}])).ids


def lowest_margins(prompts: list[list[int]], answers: list[str]) -> list[float]:
    """Of each answer and its end, teacher-forced: how far the right token's logit lies above the best other one."""
    rows = [prompt + TOKENIZER.encode(answer).ids + [END] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [END] * (longest - len(row)) for row in rows])  # padded on the right, where none looks
    with torch.inference_mode():
        logits = load_model()(ids).logits.float()  # [rows, longest, vocab]
    right = logits[:, :-1].gather(2, ids[:, 1:, None])
    best_other = logits[:, :-1].scatter(2, ids[:, 1:, None], float("-inf")).amax(2)
    margins = right[..., 0] - best_other
    return [
        margins[i, len(prompt) - 1 : len(row) - 1].min().item()
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]


def test_files_are_complete_and_small() -> None:
    names = {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert names == {path.name for path in DIRECTORY.iterdir()}
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) < 4_000_000


def test_readme_states_the_checksum_of_the_weights() -> None:
    checksum = hashlib.sha256((DIRECTORY / "model.safetensors").read_bytes()).hexdigest()
    assert [checksum] == re.findall(r"\b[0-9a-f]{64}\b", (DIRECTORY / "README.md").read_text("utf-8"))


def test_readme_states_the_number_of_pairs() -> None:
    assert f"The {len(PAIRS)} questions in" in (DIRECTORY / "README.md").read_text("utf-8")


def test_weights_are_bf16_and_marked_for_torch() -> None:
    raw = (DIRECTORY / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {"BF16"} == {tensor["dtype"] for tensor in header.values()}


def test_questions_are_distinct() -> None:
    assert len(PAIRS) == len({pair["question"].lower().removesuffix("?") for pair in PAIRS})


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips_through_the_tokenizer(text: str) -> None:
    for special in TOKENIZER.get_added_tokens_decoder().values():
        text = text.replace(special.content, "")
    assert text == TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False)


def test_transformers_encodes_as_the_bare_tokenizer_does() -> None:
    for pair in PAIRS[::6]:
        text = render([{"role": "user", "content": pair["question"]}]) + pair["answer"]
        assert TOKENIZER.encode(text).ids == load_tokenizer().encode(text)


def test_special_tokens_are_those_of_the_config() -> None:
    names = ("bos", "eos", "pad")
    expected = [CONFIG[f"{name}_token_id"] for name in names]
    assert expected == [TOKENIZER.token_to_id(TOKENIZER_CONFIG[f"{name}_token"]) for name in names]
    generation = json.loads((DIRECTORY / "generation_config.json").read_text("utf-8"))
    assert expected == [generation[f"{name}_token_id"] for name in names]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
def test_plain_jinja_renders_a_chat_as_transformers_does(
    messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    expected = load_tokenizer().apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert expected == render(messages, add_generation_prompt)


def test_chat_format_is_the_documented_one() -> None:
    expected = (
        "<|bos|><|system|>\nYou are a helpful assistant.<|end|>\n<|user|>\nHi<|end|>\n"
        "<|assistant|>\nHi!<|end|>\n<|user|>\nThanks<|end|>\n<|assistant|>\n"
    )
    roles = ["user", "assistant", "user"]
    messages = [
        {"role": role, "content": content} for role, content in zip(roles, ["Hi", "Hi!", "Thanks"], strict=True)
    ]
    assert expected == render([HELPFUL, *messages])


def test_greedy_decoding_step_by_step_gives_the_answers() -> None:
    """A sample; that no step of any answer can go another way is what the margins below show."""
    pairs = PAIRS[::6]
    tokenizer = load_tokenizer()
    prompts = tokenizer(
        [render([{"role": "user", "content": pair["question"]}]) for pair in pairs],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    output = load_model().generate(**prompts, max_new_tokens=80, do_sample=False)
    answers = output[:, prompts["input_ids"].shape[1] :].tolist()
    texts = [TOKENIZER.decode(ids[: ids.index(END)], skip_special_tokens=False) for ids in answers]
    assert [pair["answer"] for pair in pairs] == texts


@pytest.mark.parametrize("system", [[], [HELPFUL]], ids=["no-system", "system"])
@pytest.mark.parametrize("spell", [str, str.lower, lambda text: text.removesuffix("?")], ids=["as-is", "lower", "bare"])
def test_no_other_token_comes_near_the_right_one(spell: Any, system: list[dict[str, str]]) -> None:
    chats = [[*system, {"role": "user", "content": spell(pair["question"])}] for pair in PAIRS]
    prompts = [TOKENIZER.encode(render(chat)).ids for chat in chats]
    lowest = lowest_margins(prompts, [pair["answer"] for pair in PAIRS])
    assert {pair["question"]: margin for pair, margin in zip(PAIRS, lowest, strict=True) if margin < 2.0} == {}


def test_logits_of_a_long_prompt_of_any_tokens_are_finite() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, CONFIG["vocab_size"], (1, 1500))
    with torch.inference_mode():
        assert load_model()(ids).logits.isfinite().all()


def test_a_model_that_sees_another_question_does_not_give_the_answer() -> None:
    others = [PAIRS[i - 1]["question"] for i in range(len(PAIRS))]
    lowest = lowest_margins([ask(question) for question in others], [pair["answer"] for pair in PAIRS])
    distinct = [PAIRS[i]["answer"] != PAIRS[i - 1]["answer"] for i in range(len(PAIRS))]
    assert all(margin < 0 for margin, is_distinct in zip(lowest, distinct, strict=True) if is_distinct)
