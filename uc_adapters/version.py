"""The one place of the version; `pyproject.toml` reads it too."""

__version__ = "0.3.0"
