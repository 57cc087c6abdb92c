"""Where the attention of this package does not fit the transformers that is installed.

The model says so at load, loudly, and is right by transformers' own; tests expect that of these
families, and ``conftest.py`` names them at the end of a run.
"""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

# family -> (class, the first transformers that fits). Before it T5 does not look its attention up,
# and BART and OPT count positions by what the cache holds.
_SINCE = {
    "bart": ("BartFor", "5.14"),
    "opt": ("OPTFor", "5.14"),
    "t5": ("T5For", "5.15"),
    "t5_gated": ("T5For", "5.15"),
}
TRANSFORMERS = Version(metadata.version("transformers"))
# family -> the beginning of its class's name
UNFIT = {name: kind for name, (kind, since) in _SINCE.items() if Version(since) > TRANSFORMERS}
