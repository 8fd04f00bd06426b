"""uc-adapters: an adapter that shortens the image sequences a unified model reads and draws (UniCompress, arXiv 2603.11320).

Importing registers the method with PEFT, so that `PeftModel`, `AutoPeftModel` and transformers' `load_adapter` know it.
"""

from peft import mapping as _peft_mapping

from .config import UCPeftType, UniCompressConfig
from .data import UniCompressCollator
from .hub.card import CardFacts
from .hub.push import check_push, push_folder
from .model import UniCompressModel, get_uc_model
from .tuner import UniCompressTuner
from .version import __version__

# PEFT has no extension point yet (peft issue 2273): `register_peft_method` refuses types that are not in its own enum.
_peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[UCPeftType.UNICOMPRESS] = UniCompressConfig
_peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING[UCPeftType.UNICOMPRESS] = UniCompressTuner
_peft_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[UCPeftType.UNICOMPRESS] = UniCompressTuner.prefix

__all__ = [
    "CardFacts",
    "UniCompressCollator",
    "UniCompressConfig",
    "UniCompressModel",
    "__version__",
    "check_push",
    "get_uc_model",
    "push_folder",
]
