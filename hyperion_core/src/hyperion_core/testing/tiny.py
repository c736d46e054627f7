"""A tiny causal language model of random weights, and a tokenizer: a whole base for tests, made in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 256 + 3


def tiny_llama(*, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A Llama of two layers, 32 wide, in fp32 and in evaluation mode; the same weights for the same seed.

    The caller's random state stays as it was.

    Args:
        overrides: of `transformers.LlamaConfig`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 258,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones: any text there and back; with a ChatML template."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([PAD, START, END])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        chat_template=_CHAT,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def save_tiny_base(folder: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Both, in a folder that `from_pretrained` loads."""
    return _saved(tiny_llama(seed=seed, **overrides), folder)


def save_biased_base(folder: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """As `save_tiny_base`, and every linear module but the head has a bias, of about 0.1."""
    import torch

    model = tiny_llama(seed=seed, attention_bias=True, mlp_bias=True, **overrides)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(0, 0.1, generator=generator)
    return _saved(model, folder)


def _saved(model: LlamaForCausalLM, folder: str | Path) -> Path:
    folder = Path(folder)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
