"""UniCompressConfig: LoRA's own fields, and the geometry of the compact form."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum

from peft import LoraConfig

from .errors import ConfigError

DECOMPRESSORS = ("cell", "phase", "raster")


class UCPeftType(str, Enum):
    """The method's name for PEFT. An enum, since transformers' `load_adapter` reads `peft_type.value`."""

    UNICOMPRESS = "UNICOMPRESS"


@dataclass
class UniCompressConfig(LoraConfig):
    """Configuration of a UniCompress adapter (arXiv 2603.11320).

    LoRA's fields (`r`, `lora_alpha`, `lora_dropout`, ...) keep their meaning and apply to the language model.
    `target_modules=None` (default) takes every linear layer of the family's language model; `[]` means no LoRA;
    whatever is named, LoRA never leaves the language model.

    Args:
        stride: Window of the average pooling on the image grid (eq. 3); it divides the grid's side. Default 2,
            which turns T dense tokens into T / 4.
        num_global_tokens: Learned meta tokens N_g in front of the pooled ones (eq. 1 and 2), 0 or more. Default 4.
        decompressor: How dense codes come back (eq. 7). "cell" (default) expands each hidden state inside the
            language model's loop; "phase" and "raster" expand compact codes after it, in s^2 or T steps.
        decompressor_layers: Layers of the decompressor, at least 1. Default 2.
        decompressor_width: Width of the decompressor and of the drawing side's extractor. Default 512.
        codebook_weight: lambda_cb, the weight of the codebook-consistency term in stage 1 (eq. 8), 0 or more.
            Default 1.0.
        base_geometry: Written when the adapter is attached: the shapes of the base that it was made for. A base
            with others is refused. Leave it None.
        uc_adapters_version: Written when the adapter is attached: the version of this library.

    Raises:
        ConfigError: A value is out of range; the message names the legal ones.
    """

    stride: int = field(default=2, metadata={"help": "Pooling window on the image grid."})
    num_global_tokens: int = field(default=4, metadata={"help": "Learned global meta tokens."})
    decompressor: str = field(default="cell", metadata={"help": f"One of {', '.join(DECOMPRESSORS)}."})
    decompressor_layers: int = field(default=2, metadata={"help": "Layers of the decompressor."})
    decompressor_width: int = field(default=512, metadata={"help": "Width of the decompressor."})
    codebook_weight: float = field(default=1.0, metadata={"help": "Weight of the codebook term in stage 1."})
    base_geometry: dict | None = field(default=None, metadata={"help": "Shapes of the base, written on attaching."})
    uc_adapters_version: str | None = field(default=None, metadata={"help": "Library version, written on attaching."})

    def __post_init__(self):
        targets = self.target_modules
        names = isinstance(targets, (list, set, tuple)) and all(isinstance(name, str) for name in targets)
        pattern = isinstance(targets, str) and targets
        self._require("target_modules", targets is None or names or pattern, "a pattern, a list of names, [] or None")
        super().__post_init__()
        self.peft_type = UCPeftType.UNICOMPRESS
        self._require_int("stride", 1)
        self._require_int("num_global_tokens", 0)
        self._require("decompressor", self.decompressor in DECOMPRESSORS, f"one of {', '.join(DECOMPRESSORS)}")
        self._require_int("decompressor_layers", 1)
        self._require_int("decompressor_width", 1)
        self._require("codebook_weight", self._within("codebook_weight", 0), "a finite number >= 0")
        self._require_int("r", 1)
        self._require("lora_alpha", self._within("lora_alpha", 0) and self.lora_alpha > 0, "a finite number > 0")
        self._require("lora_dropout", self._within("lora_dropout", 0, 1), "a number from 0 up to, not including, 1")
        geometry = self.base_geometry
        self._require("base_geometry", geometry is None or isinstance(geometry, dict), "None, or what attaching wrote")
        self._require("trainable_token_indices", not self.trainable_token_indices, "None: the base's words stay as they are")
        self._require("task_type", self.task_type is None, "None: a task type would force another model class")
        self._require("bias", self.bias == "none", "'none': a trained bias would change the disabled model")
        self._require("modules_to_save", not self.modules_to_save, "None: an adapter holds no weight of its base")
        self._require("layer_replication", not self.layer_replication, "None: the base is never changed")
        self._require(
            "init_lora_weights",
            isinstance(self.init_lora_weights, bool) or self.init_lora_weights in ("gaussian", "orthogonal"),
            "True, False, 'gaussian' or 'orthogonal': other schemes change the base's weights",
        )

    @classmethod
    def from_peft_type(cls, **kwargs):
        """PEFT's loader, except that an unknown field is an error: ignoring it could change the mathematics."""
        known = {f.name for f in fields(cls)} | {"peft_version"}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise ConfigError(
                f"Unknown field(s) {', '.join(map(repr, unknown))} in the adapter's config (written by uc-adapters "
                f"{kwargs.get('uc_adapters_version')}); expected only fields of UniCompressConfig. Upgrade uc-adapters, "
                "or remove the field if it was added by hand."
            )
        return super().from_peft_type(**kwargs)

    def _require_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        good = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
        self._require(name, good, f"an integer >= {minimum}")

    def _within(self, name: str, low: float, high: float = float("inf")) -> bool:
        value = getattr(self, name)
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ConfigError(f"{name}={getattr(self, name)!r} is not valid; expected {expected}.")
