"""Tune a language model toward any distribution you can describe, by f-divergence policy gradient."""

from fdpg_fast._version import __version__

__all__ = ["__version__"]
