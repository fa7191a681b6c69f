from __future__ import annotations

import pytest
from evaluation_toys import CHATML, byte_tokenizer
from tokenizers.processors import TemplateProcessing

from secura_ds.data import Example, encode, render_prompt
from secura_ds.errors import UserError

END = "<|im_end|>"


def turns(*pairs: tuple[str, str]) -> Example:
    return Example("rows.jsonl:1", messages=tuple({"role": role, "content": text} for role, text in pairs))


PAIR = turns(("user", "2+2"), ("assistant", "4"))


def learnt(example: Example, **settings: object) -> str:
    tokenizer = byte_tokenizer()
    encoded = encode(example, tokenizer, max_length=1000, **settings)  # type: ignore[arg-type]
    assert all(label in (-100, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    return tokenizer.decode([label for label in encoded.labels if label != -100])


def test_only_the_answer_and_its_end_token_are_learnt() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(PAIR, tokenizer, max_length=1000)
    text = "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    assert tokenizer.decode(encoded.input_ids) == text
    assert learnt(PAIR) == f"4{END}"
    assert encoded.num_learnt == 2
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 2


def test_the_prompt_has_the_tokens_it_has_when_asked() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(PAIR, tokenizer, max_length=1000)
    prompt = render_prompt("2+2", tokenizer)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert set(encoded.labels[: len(prompt)]) == {-100}
    assert encoded.labels[len(prompt) :] == encoded.input_ids[len(prompt) :]


def test_every_assistant_turn_is_learnt() -> None:
    example = turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert learnt(example) == f"b{END}d{END}"


def test_all_is_learnt_without_completion_only() -> None:
    assert learnt(PAIR, completion_only=False).startswith("<|im_start|>user\n2+2")


def test_without_a_template_a_prompt_is_asked_as_it_is_learnt() -> None:
    tokenizer = byte_tokenizer(template=None)
    asked = [{"role": "user", "content": "2+2="}]
    assert (
        render_prompt(asked, tokenizer)
        == render_prompt("2+2=", tokenizer)
        == list(tokenizer("2+2=")["input_ids"])
    )


def test_without_a_template_pairs_are_joined_and_end() -> None:
    tokenizer = byte_tokenizer(template=None)
    encoded = encode(PAIR, tokenizer, max_length=1000)
    assert tokenizer.decode(encoded.input_ids) == f"2+24{END}"
    assert [label != -100 for label in encoded.labels] == [False, False, False, True, True]
    assert encoded.input_ids[:3] == render_prompt("2+2", tokenizer)


def test_start_token_once_and_text_learnt_whole() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 256), (END, 258)]
    )
    encoded = encode(Example("here", text="ab"), tokenizer, max_length=1000)
    assert tokenizer.decode(encoded.input_ids) == f"<|endoftext|>ab{END}"
    assert encoded.labels == encoded.input_ids
    tokenizer.chat_template = "<|endoftext|>" + CHATML
    assert encode(PAIR, tokenizer, max_length=1000).input_ids.count(256) == 1


def test_a_turns_own_end_token_is_not_doubled() -> None:
    tokenizer = byte_tokenizer(eos="<|endoftext|>")
    assert tokenizer.decode(encode(PAIR, tokenizer, max_length=1000).input_ids[-2:]) == f"4{END}"


def test_an_answer_the_template_leaves_open_gets_the_end_token() -> None:
    open_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer = byte_tokenizer(template=open_template)
    encoded = encode(PAIR, tokenizer, max_length=1000)
    assert tokenizer.decode(encoded.input_ids) == f"[user] 2+2\n[assistant] 4{END}"


def test_cut_examples_say_so() -> None:
    tokenizer = byte_tokenizer()
    whole = len(encode(PAIR, tokenizer, max_length=1000).input_ids)
    prompt = len(render_prompt("2+2", tokenizer))
    found = [encode(PAIR, tokenizer, max_length=n) for n in (whole, whole - 1, prompt)]
    assert [(e.was_cut, e.num_learnt, len(e.input_ids)) for e in found] == [
        (False, 2, whole), (True, 1, whole - 1), (True, 0, prompt)
    ]  # fmt: skip


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    rewriting = (
        "{% for m in messages %}{{ m.content if loop.last else m.content[:1] }}|{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    example = turns(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    with pytest.raises(UserError, match="rows.jsonl:1: .* renders turn 2 differently once more turns follow"):
        encode(example, byte_tokenizer(template=rewriting), max_length=1000)


def test_a_template_that_refuses_is_one_line() -> None:
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    example = turns(("system", "s"), ("user", "a"), ("assistant", "b"))
    with pytest.raises(
        UserError, match="rows.jsonl:1: .*refuses this conversation: System role not supported"
    ):
        encode(example, byte_tokenizer(template=refusing), max_length=1000)


def test_a_conversation_needs_a_template() -> None:
    with pytest.raises(UserError, match="rows.jsonl:1: the backbone has no chat template"):
        encode(turns(("assistant", "a")), byte_tokenizer(template=None), max_length=1000)
    with pytest.raises(UserError, match="rows.jsonl:2: the backbone has no chat template"):
        render_prompt(
            [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
            byte_tokenizer(template=None),
            "rows.jsonl:2",
        )
