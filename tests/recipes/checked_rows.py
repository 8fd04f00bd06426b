"""What another interpreter runs for test_training_rows.py, which imports little."""

from helpers import SHORT, small_config
from rows.training_rows import RowCheck, training_rows
from tiny_world.tiny_janus import make_processor

from uc_adapters import UniCompressCollator

CONTEXT = 100


def fingerprint(source: str) -> str:
    """Of the checked rows, with parts of its own."""
    collator = UniCompressCollator(make_processor(SHORT), small_config())
    return training_rows([source], RowCheck(collator, CONTEXT))._fingerprint
