"""The version; read from here by pyproject.toml and CMake too."""

__version__ = "0.1.0"
