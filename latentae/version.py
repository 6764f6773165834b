"""The package's version, alone so that every room can read it without importing the face."""

__version__ = "0.1.0"
