"""The tokenizer and the chat template that the tiny bases share, and the words of the digit scenes."""

from __future__ import annotations

import re

from tiny_world.digits import COLOURS, DESCRIBE, PLACES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
}
ROLES = ["<|User|>", "<|Assistant|>"]
_SENTENCES = [*COLOURS, *PLACES, DESCRIBE, "a and at the ?.:!,"]
_SENTENCES += ["What digit is at the", "What colour is the", "How many digits are there", "Draw an image of"]
_WORDS = {word for sentence in _SENTENCES for word in re.findall(r"\w+|[^\w\s]", sentence.lower())}
DIGITS = [str(digit) for digit in range(10)]
DIGITS_AND_WORDS = [*DIGITS, *sorted(_WORDS)]
_LOWERCASE = normalizers.Lowercase()
_SPLIT = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])


def split_words(text: str) -> list[str]:
    """A text's words, digits and punctuation, as the tokenizer splits them."""
    return [word for word, _ in _SPLIT.pre_tokenize_str(_LOWERCASE.normalize_str(text))]


def chat_template(image_token: str, begin: str = "{{ bos_token }}") -> str:
    """A chat template that writes "<|User|>: ...", a blank line, "<|Assistant|>: ..." and the EOS token."""
    return (
        f"{begin}"
        "{% for message in messages %}"
        "{{ '<|User|>: ' if message['role'] == 'user' else '<|Assistant|>: ' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image_token + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '\n\n' }}{% else %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
    )


def word_tokenizer(
    image_tokens: dict[str, str], words: list[str], first: list[str] | None = None, **special_tokens: str
) -> PreTrainedTokenizerFast:
    """A tokenizer with a token per word and digit.

    Args:
        image_tokens: The family's special tokens, by attribute name.
        words: The words.
        first: Tokens that have the first ids. Default: none.
        **special_tokens: In place of SPECIAL_TOKENS, by attribute name.
    """
    special_tokens = SPECIAL_TOKENS | special_tokens
    vocabulary = dict.fromkeys([*(first or []), *special_tokens.values(), *image_tokens.values(), *ROLES, *words])
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.normalizer = _LOWERCASE
    backend.pre_tokenizer = _SPLIT
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special_tokens,
        extra_special_tokens=image_tokens,
        padding_side="left",
        model_max_length=1024,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ROLES}, replace_extra_special_tokens=False)
    return tokenizer
