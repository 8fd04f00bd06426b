"""The one place of the version; `pyproject.toml` reads it too."""

__version__ = "0.3.0"

# The package is on no index, where anybody could take its name: so nothing may tell a user to install it from there
INSTALL = "Install uc-adapters from a clone of its repository (it is not on PyPI): pip install ."
