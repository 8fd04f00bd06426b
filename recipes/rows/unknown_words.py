"""Finds words that a tokenizer does not know. The model reads all of them as the same unknown token."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def unknown_words(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[str]:
    """The words of `texts` that the tokenizer turns into its unknown token, each once, in their order.

    The list is empty if the tokenizer knows every text (byte-level BPE), or cannot map tokens to words (one written in Python).
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or not tokenizer.is_fast or not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    words: dict[str, None] = {}
    for text, ids, spans in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        words |= {text[slice(*span)]: None for token, span in zip(ids, spans, strict=True) if token == unknown}
    return [word for word in words if word != tokenizer.unk_token]  # a text may hold the token itself
