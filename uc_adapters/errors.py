"""The errors of this package, one class for each cause.

All are ValueErrors. Every message names the value, what was expected, and the remedy.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """A field of `UniCompressConfig` is unknown or out of range."""


class BaseModelError(ValueError):
    """The base model cannot carry this adapter: its family is unknown, a module is missing, or its geometry differs."""


class AdapterNameError(ValueError):
    """PEFT cannot save or load an adapter correctly under this name."""


class AdapterFileError(ValueError):
    """An adapter's file or folder is missing or damaged, or its content does not match its config."""


class InputError(ValueError):
    """A prompt, an image or a batch does not fit the model or the adapter."""


class UnsupportedError(ValueError):
    """The method cannot do what was asked for, such as merging, or beam search when drawing."""


class HubError(ValueError):
    """A repo cannot be read from the Hub or written to it: it is missing, forbidden, unreachable, offline or rate-limited."""
