"""The version of the package. `pyproject.toml` reads it, too."""

__version__ = "0.3.0"

# The package is on no index, and anybody could take its name there, so no message may say to install it from one
INSTALL = "Install uc-adapters from a clone of its repository (it is not on PyPI): pip install ."
