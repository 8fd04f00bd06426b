"""UniCompressConfig: LoRA's own fields, and the geometry of the compact form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from os import PathLike
from pathlib import Path

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .errors import ConfigError, InputError
from .files.folder import PEFT_TYPE, check_weights, read_config
from .files.pull import PULL_OPTIONS, pull
from .identity import is_fingerprint
from .layers import Grid, compact_grid
from .version import INSTALL, __version__

FORMAT_VERSION = 1  # of what is saved; raised when the same fields and weights come to mean other mathematics
DECOMPRESSORS = ("strip", "phase", "raster")


class UCPeftType(str, Enum):
    """The method's name for PEFT. An enum, since transformers' `load_adapter` reads `peft_type.value`."""

    UNICOMPRESS = PEFT_TYPE


@dataclass
class UniCompressConfig(LoraConfig):
    """Configuration of a UniCompress adapter (arXiv 2603.11320).

    LoRA's fields (`r`, `lora_alpha`, `lora_dropout`, ...) keep their meaning and apply to the language model.
    `target_modules=None` (default) takes every linear layer of the family's language model; `[]` means no LoRA;
    whatever is named, LoRA never leaves the language model.

    Args:
        stride: Window of the average pooling on the image grid (eq. 3); it divides the grid's sides. Default 2,
            which turns T dense tokens into T / 4. A list has the strides that the adapter is trained to read at;
            `model.compact_processor(processor, stride=...)` chooses one, and the model tells it from the placeholders. Without
            a choice, the one in the middle counts (of an even number, the larger of both). Only for "strip", and for bases
            whose images have one size.
        num_global_tokens: Learned meta tokens N_g in front of the pooled ones (eq. 1 and 2), 0 or more. Default 4.
            "strip" reads them, and draws none, see `drawing_global_tokens`.
        decompressor: How dense codes come back (eq. 7). "strip" (default) draws the next `codes_per_step` codes of the raster
            from each hidden state, inside the language model's loop. "raster" (the paper's) and "phase" expand compact codes
            after the loop, in T or s^2 steps.
        codes_per_step: The number of codes that "strip" draws in a step of the language model, from 1 to the codes of an image,
            whatever the stride is. If it does not divide them, the last step draws what is left. A list has the numbers that
            the adapter is trained for, among which `generate(codes_per_step=...)` chooses; without it, the one in the middle
            counts (of an even number, the larger of both). Default None: s^2.
        drawing_global_tokens: Whether N_g learned inputs stand in front of an image to draw, too, between its begin and the
            separator. The language model reads them in the prefill, so they take no step, and their position id is that of the
            image's begin. "strip" attends to its states there in every step. Only for "strip": the other decompressors draw
            global codes. Default False.
        decompressor_layers: Layers of the decompressor, at least 1. Default 2.
        decompressor_width: Width of the decompressor and of the drawing side's extractor. Default 512.
        codebook_weight: lambda_cb, the weight of the codebook-consistency term in stage 1 (eq. 8), 0 or more.
            Default 1.0.
        base_geometry: Written when the adapter is attached: the shapes of the base that it was made for. A base
            with others is refused. Leave it None.
        base_fingerprint: Written when the adapter is attached: the base's codebook and weights in a few numbers. Another
            codebook is refused, other weights are warned of. Leave it None.
        format_version: Of the saved form. A newer one than this library knows is refused. Leave it alone.
        uc_adapters_version: Written on saving: the version of this library.
        seal: Written on saving: checksums of the weights file and of these fields. Never held in memory.

    Raises:
        ConfigError: A value is out of range; the message names the legal ones.
    """

    stride: int | list[int] = field(default=2, metadata={"help": "Pooling window on the image grid."})
    num_global_tokens: int = field(default=4, metadata={"help": "Learned global meta tokens."})
    decompressor: str = field(default="strip", metadata={"help": f"One of {', '.join(DECOMPRESSORS)}."})
    codes_per_step: int | list[int] | None = field(default=None, metadata={"help": "Codes in a step; None: stride squared."})
    drawing_global_tokens: bool = field(default=False, metadata={"help": "Global tokens in front of an image to draw, too."})
    decompressor_layers: int = field(default=2, metadata={"help": "Layers of the decompressor."})
    decompressor_width: int = field(default=512, metadata={"help": "Width of the decompressor."})
    codebook_weight: float = field(default=1.0, metadata={"help": "Weight of the codebook term in stage 1."})
    base_geometry: dict | None = field(default=None, metadata={"help": "Shapes of the base, written on attaching."})
    base_fingerprint: dict | None = field(default=None, metadata={"help": "The base's weights, written on attaching."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Of the saved form."})
    uc_adapters_version: str | None = field(default=None, metadata={"help": "Library version, written on saving."})
    seal: dict | None = field(default=None, metadata={"help": "Checksums, written on saving."})

    def __post_init__(self):
        self.seal = None  # the seal belongs to a file, and the fields in memory may change
        self._require_int("format_version", 1)
        if self.format_version > FORMAT_VERSION:
            raise ConfigError(
                f"The adapter was saved in format {self.format_version} by uc-adapters {self.uc_adapters_version}; expected "
                f"format {FORMAT_VERSION}, which uc-adapters {__version__} reads. Upgrade: {_upgrade(vars(self))}"
            )
        for name in ("base_model_name_or_path", "revision", "uc_adapters_version"):
            value = getattr(self, name)
            self._require(name, value is None or isinstance(value, str), "a string or None")
        targets = self.target_modules
        names = isinstance(targets, (list, set, tuple)) and all(isinstance(name, str) for name in targets)
        pattern = isinstance(targets, str) and targets
        self._require("target_modules", targets is None or names or pattern, "a pattern, a list of names, [] or None")
        super().__post_init__()
        self.peft_type = UCPeftType.UNICOMPRESS
        self._require_ints("stride")
        self._require_int("num_global_tokens", 0)
        self._require("decompressor", self.decompressor in DECOMPRESSORS, f"one of {', '.join(DECOMPRESSORS)}")
        single = isinstance(self.stride, int) or self.decompressor == "strip"
        self._require("stride", single, f"one integer with decompressor={self.decompressor!r}, which draws a code a window")
        if self.codes_per_step is not None:
            self._require_ints("codes_per_step")
            self._require("codes_per_step", self.decompressor == "strip", f"None with decompressor={self.decompressor!r}")
        self._require("drawing_global_tokens", isinstance(self.drawing_global_tokens, bool), "True or False")
        if self.drawing_global_tokens:
            fits = self.decompressor == "strip" and self.num_global_tokens > 0
            self._require("drawing_global_tokens", fits, "False, or decompressor='strip' with num_global_tokens >= 1")
        self._require_int("decompressor_layers", 1)
        self._require_int("decompressor_width", 1)
        self._require("codebook_weight", self._within("codebook_weight", 0), "a finite number >= 0")
        self._require_int("r", 1)
        self._require("lora_alpha", self._within("lora_alpha", 0) and self.lora_alpha > 0, "a finite number > 0")
        self._require("lora_dropout", self._within("lora_dropout", 0, 1), "a number from 0 up to, not including, 1")
        geometry = self.base_geometry
        self._require("base_geometry", geometry is None or isinstance(geometry, dict), "None, or what attaching wrote")
        self._require("base_fingerprint", is_fingerprint(self.base_fingerprint), "None, or what attaching wrote")
        self._require(
            "trainable_token_indices", self.trainable_token_indices is None, "None: the base's words stay as they are"
        )
        self._require("task_type", self.task_type is None, "None: a task type would force another model class")
        self._require("bias", self.bias == "none", "'none': a trained bias would change the disabled model")
        self._require("modules_to_save", not self.modules_to_save, "None: an adapter holds no weight of its base")
        self._require("target_parameters", not self.target_parameters, "None: name modules; parameters are found outside, too")
        self._require("layer_replication", not self.layer_replication, "None: the base is never changed")
        self._require(
            "alora_invocation_tokens", self.alora_invocation_tokens is None, "None: such a LoRA would never be switched on here"
        )
        self._require("arrow_config", self.arrow_config is None, "None: it mixes adapters, and an image has one compact form")
        self._require("kasa_config", self.kasa_config is None, "None: it changes the weights of the base")
        for name in ("velora_config", "monteclora_config"):
            self._require(name, getattr(self, name) is None, "None: PEFT saves such a LoRA with weights that it cannot load")
        self._require("megatron_config", not self.megatron_config, "None: PEFT would import a module that the config names")
        self._require(
            "init_lora_weights",
            isinstance(self.init_lora_weights, bool) or self.init_lora_weights in ("gaussian", "orthogonal"),
            "True, False, 'gaussian' or 'orthogonal': other schemes change the base's weights",
        )

    def num_image_tokens(self, grid: Grid, stride: int | None = None) -> int:
        """Placeholders of one image to read, of H x W dense tokens: N_g + 1 + H * W / s^2.

        Args:
            grid: H and W.
            stride: As in `read_stride`.

        Raises:
            InputError: The stride does not divide H and W, or the adapter is not trained for it.
        """
        return self.num_global_tokens + 1 + math.prod(compact_grid(grid, self.read_stride(stride)))

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides at which the adapter is trained to read, in ascending order."""
        return (self.stride,) if isinstance(self.stride, int) else tuple(self.stride)

    def read_stride(self, stride: int | None = None) -> int:
        """Returns the stride, if a call asks for `stride`. Default None: the one in the middle.

        Raises:
            InputError: The adapter is not trained for it.
        """
        return _chosen("stride", stride, self.strides)

    def num_gen_tokens(self, grid: Grid, codes_per_step: int | None = None) -> int:
        """Placeholders of one image to draw, likewise: global tokens if it has any, the separator, and the steps of X.

        `codes_per_step` and the errors are as in `num_gen_steps`.
        """
        return self.num_drawing_globals + 1 + self.num_gen_steps(grid, codes_per_step) - self.num_global_codes

    def num_gen_steps(self, grid: Grid, codes_per_step: int | None = None) -> int:
        """Steps of the language model that draw one image, of H x W dense tokens: one for each code or strip.

        With "strip" the last step may have fewer codes than the others.

        Args:
            grid: H and W.
            codes_per_step: As in `strip_length`.

        Raises:
            InputError: The adapter is not trained for `codes_per_step`; or the stride does not divide H and W, and the
                decompressor is not "strip".
        """
        length = self.strip_length(codes_per_step)
        if self.decompressor == "strip":
            return math.ceil(math.prod(grid) / length)
        return self.num_global_codes + math.prod(compact_grid(grid, self.read_stride()))

    @property
    def strip_lengths(self) -> tuple[int, ...]:
        """The numbers of codes in a step for which "strip" is trained, in ascending order: `codes_per_step`, or s^2."""
        lengths = self.read_stride() ** 2 if self.codes_per_step is None else self.codes_per_step
        return (lengths,) if isinstance(lengths, int) else tuple(lengths)

    def strip_length(self, codes_per_step: int | None = None) -> int:
        """Returns the number of codes in a step, if a call asks for `codes_per_step`. Default None: the one in the middle.

        Raises:
            InputError: The adapter is not trained for it.
        """
        if codes_per_step is not None and self.decompressor != "strip":
            raise InputError(
                f"codes_per_step={codes_per_step!r} with the {self.decompressor!r} decompressor; expected none: only 'strip' "
                "draws several codes in a step. Remove it."
            )
        return _chosen("codes_per_step", codes_per_step, self.strip_lengths)

    @property
    def num_global_codes(self) -> int:
        """Global tokens that are drawn, as codes: N_g, or none with "strip"."""
        return 0 if self.decompressor == "strip" else self.num_global_tokens

    @property
    def num_drawing_globals(self) -> int:
        """Global tokens in front of an image to draw: drawn codes, or learned inputs if `drawing_global_tokens`."""
        return self.num_global_tokens if self.drawing_global_tokens else self.num_global_codes

    @classmethod
    def from_peft_type(cls, **kwargs):
        """PEFT's loader, except that an unknown field that is set is an error: ignoring it could change the mathematics.

        Unknown fields that are unset are ignored: a newer PEFT writes them.
        """
        version = kwargs.get("format_version")
        unknown = kwargs.keys() - {f.name for f in fields(cls)}
        surplus = sorted(name for name in unknown if kwargs[name] not in (None, False, "", [], {}))
        if surplus and not (isinstance(version, int) and version > FORMAT_VERSION):  # the constructor refuses a newer format
            raise ConfigError(
                f"Unknown field(s) {', '.join(map(repr, surplus))} in the adapter's config (written by uc-adapters "
                f"{kwargs.get('uc_adapters_version')}); expected only fields of UniCompressConfig of uc-adapters "
                f"{__version__}. Upgrade: {_upgrade(kwargs)} Or remove the field if it was added by hand."
            )
        return super().from_peft_type(**{name: value for name, value in kwargs.items() if name not in unknown})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, subfolder: str | None = None, **kwargs
    ) -> UniCompressConfig:
        """Loads the config of an adapter's folder or Hub repo, and checks the weights beside it.

        PEFT calls this before it loads any weights, so a plain `PeftModel` refuses a damaged adapter, too. A local folder may
        hold a config alone.

        Args:
            pretrained_model_name_or_path: A folder, or a Hub id.
            subfolder: The adapter's subfolder in the folder or repo.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download`, as in
                `UniCompressModel.from_pretrained`; others are ignored.

        Raises:
            HubError: The adapter cannot be fetched from the Hub.
            AdapterFileError: A file is missing, damaged, or not the one that was saved.
            ConfigError: A field is unknown or out of range, or the format is newer than this library.
        """
        options = {name: kwargs[name] for name in PULL_OPTIONS if name in kwargs}
        folder = pull(pretrained_model_name_or_path, **{"subfolder": subfolder, **options})
        written = read_config(folder)
        try:
            config = cls.from_peft_type(**written)
        except ConfigError:
            raise
        except Exception as error:  # PEFT checks LoRA's own fields, and raises errors of many classes
            raise ConfigError(
                f"{folder} holds a config that PEFT refuses: {error}. Fetch or save the adapter again."
            ) from error
        weights = any((folder / name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
        if weights or not Path(pretrained_model_name_or_path).is_dir():
            check_weights(folder, written)
        return config

    def _require_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        good = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
        self._require(name, good, f"an integer >= {minimum}")

    def _require_ints(self, name: str) -> None:
        """Accepts an integer >= 1, or a list of different ones, which is sorted."""
        value = getattr(self, name)
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        good = values and all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in values)
        self._require(name, good and len(set(values)) == len(values), "an integer >= 1, or a list of different ones")
        setattr(self, name, values[0] if len(values) == 1 else sorted(values))

    def _within(self, name: str, low: float, high: float = float("inf")) -> bool:
        value = getattr(self, name)
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ConfigError(f"{name}={getattr(self, name)!r} is not valid; expected {expected}.")


def _chosen(name: str, asked: int | None, trained: tuple[int, ...]) -> int:
    """Returns the ratio that a call asks for, or else the one in the middle; raises InputError if it is not trained."""
    if asked is None:
        return trained[len(trained) // 2]
    if isinstance(asked, bool) or not isinstance(asked, int) or asked not in trained:
        legal = " or ".join(map(str, trained))
        raise InputError(f"{name}={asked!r}, for which the adapter is not trained; expected {legal}.")
    return asked


def _upgrade(written: dict) -> str:
    return f"uc-adapters {written.get('uc_adapters_version')} or newer reads it. {INSTALL}"
