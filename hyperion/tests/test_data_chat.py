"""Which text of a conversation is learnt, over chat templates of the kinds that models in the field have."""

from __future__ import annotations

import jinja2
import pytest
from byte_tokenizer import CHATML, LLAMA2

from hyperion.data.chat import PrefixBroken, assistant_segments
from hyperion.data.chat_template import chat_template_problems

TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
# Qwen3's: only the last answer is rendered with a thinking block, which its generation prompt leaves to the model.
THINKING_LAST = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# gpt-oss': the last turn ends with another token than the earlier ones, and the prompt stops before the channel.
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m['content'] }}{% if loop.last and m['role'] == 'assistant' %}<|return|>{% else %}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Cohere's: two tokens end a turn, and generation stops at the second. No end of sequence follows in CHANNELS.
TWO_ENDS = CHATML.replace("<|im_end|>", "<|end|></s>")
NO_END = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA:{% else %} {{ m['content'] }}\n\n"
    "{% endif %}{% endfor %}"
)
# The prompt opens a thinking block that the finished conversation does not show (R1's distillations).
PROMPT_THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")

SPECIALS = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|end|>",
    "<|return|>",
    "<|channel|>",
    "<|message|>",
)


def talk(*contents, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def learnt(template, messages):
    compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)

    def render(messages, add_generation_prompt):
        return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt)

    segments, open_ended = assistant_segments(render, messages, SPECIALS, "</s>")
    text = "".join(segment.text for segment in segments)
    whole = render(messages, False)
    assert whole == text or (open_ended and whole.startswith(text))
    return [segment.text for segment in segments if segment.supervised], open_ended


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["one<|im_end|>", "two<|im_end|>"]),
        (LLAMA2, [" one </s>", " two </s>"]),
        (TWO_ENDS, ["one<|end|></s>", "two<|end|></s>"]),
        (THINKING_LAST, ["one<|im_end|>", "<think>\n\n</think>\n\ntwo<|im_end|>"]),
        (CHANNELS, ["<|channel|>final<|message|>one<|end|>", "<|channel|>final<|message|>two<|return|>"]),
    ],
)
def test_every_assistant_turn_up_to_its_end_and_nothing_else(template, expected):
    assert learnt(template, talk("hi", "one", "more?", "two")) == (expected, False)


def test_equal_contents_and_contents_that_look_like_the_template():
    assert learnt(CHATML, talk("x", "x", "x", "x"))[0] == ["x<|im_end|>", "x<|im_end|>"]
    tricky = "assistant\n{{ m }} MESSAGE-CONTENT-0"
    assert learnt(CHATML, talk(tricky, tricky, "assistant", "user"))[0] == [f"{tricky}<|im_end|>", "user<|im_end|>"]
    # A special token that the user typed is not the end of the assistant's turn before it.
    assert learnt(NO_END, talk("a", "b", "</s>", "d")) == ([" b", " d"], True)


def test_content_that_the_template_trims():
    assert learnt(TRIMMING, talk("hi", "  one \n"))[0] == ["one<|im_end|>"]


def test_consecutive_and_leading_and_trailing_turns():
    one, two = ({"role": "assistant", "content": c} for c in ("one", "two"))
    assert learnt(CHATML, [*talk("hi"), one, two])[0] == ["one<|im_end|>", "two<|im_end|>"]
    assert learnt(CHATML, [one, *talk("hi"), two])[0] == ["one<|im_end|>", "two<|im_end|>"]
    assert learnt(CHATML, talk("hi", "one", "bye", system="S")) == (["one<|im_end|>"], False)


def test_template_without_end_of_turn_asks_for_an_end_of_sequence_right_after_the_answer():
    assert learnt(NO_END, talk("hi", "one")) == ([" one"], True)


def test_prompt_that_is_no_prefix_is_refused_with_both_texts():
    with pytest.raises(PrefixBroken, match=r"ends in '<think>.*goes on there with 'one"):
        learnt(PROMPT_THINKS, talk("hi", "one"))


def test_content_that_the_template_changes_is_refused():
    with pytest.raises(PrefixBroken, match="is not rendered as it is"):
        learnt(CHATML.replace("m['content']", "m['content'] + m['content']"), talk("hi", "one"))


@pytest.mark.parametrize(
    "tags", [("{% generation %}", "{% endgeneration %}"), ("{%- generation-%}", "{%endgeneration%}")]
)
def test_transformers_own_tag_may_stand_in_a_configs_template_however_it_is_spaced(tags):
    assert chat_template_problems(CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}".join(tags)), None) == []
    assert chat_template_problems(CHATML.replace("{% endfor %}", tags[1]), None)
