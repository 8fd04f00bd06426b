"""What can go wrong, one class a cause. All are ValueErrors; every message names the value, the expected, the remedy."""

from __future__ import annotations


class ConfigError(ValueError):
    """A field of `UniCompressConfig` is unknown or out of range."""


class BaseModelError(ValueError):
    """The base model cannot carry this adapter: unknown family, missing module, or another geometry."""


class AdapterNameError(ValueError):
    """A name under which PEFT cannot save or load an adapter correctly."""


class AdapterFileError(ValueError):
    """An adapter's file or folder is missing, damaged, or does not hold what its config promises."""


class InputError(ValueError):
    """A prompt, an image or a batch that does not fit the model or the adapter."""


class UnsupportedError(ValueError):
    """Something that this method cannot do, such as merging or beam search for drawing."""


class HubError(ValueError):
    """A repo that cannot be read from the Hub or written to it: missing, not permitted, unreachable, offline, rate-limited."""
