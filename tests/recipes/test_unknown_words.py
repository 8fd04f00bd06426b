import pytest
from rows.unknown_words import unknown_words
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], []),
        (["a red 3 at the top left", "a cyan 9"], []),
        (["a fox in the snow, at night", "A fox at the top"], ["fox", "in", "snow", "night"]),
        (["a Überfuchs"], ["Überfuchs"]),
        (["a <unk> at the top"], []),
    ],
)
def test_words_that_are_not_in_the_vocabulary_are_named_once(processor, texts, expected):
    assert unknown_words(processor.tokenizer, texts) == expected


def test_a_tokenizer_of_bytes_knows_every_word():
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(["a red fox"], vocab_size=300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, unk_token="<unk>", eos_token="<eos>")
    assert unknown_words(tokenizer, ["a fox in the snow", "狐"]) == []
    assert unknown_words(PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer), ["a fox"]) == []
