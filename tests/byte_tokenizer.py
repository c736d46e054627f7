"""What tests of tokens begin with: a tokenizer whose tokens are bytes, chat templates of the field for it, and rows
read as supervised fine-tuning reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hyperion_core import facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)


def byte_tokenizer(
    *,
    chat_template: str | None = CHATML,
    adds_bos: bool = False,
    eos: str = "<|im_end|>",
    specials: Sequence[str] = ("<|im_start|>", "<|im_end|>", "<|sep|>"),
    merges: Sequence[tuple[str, str]] = (),
) -> PreTrainedTokenizerFast:
    """A token a byte, and those of `merges`; padding is the end of sequence, as in many models of the field.

    Args:
        adds_bos: put "<s>" in front of every text.
        specials: special tokens besides "<s>" and "</s>".
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", *specials]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos,
        additional_special_tokens=[token for token in specials if token not in ("<s>", eos)],
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer


def sft(row: Mapping[str, Any]) -> list[facts.Sequence]:
    """A prepared row as one sequence."""
    if "messages" in row:
        return [facts.Sequence(messages=tuple(row["messages"]))]
    return [facts.Sequence(segments=tuple(facts.Segment(**segment) for segment in row["segments"]))]
