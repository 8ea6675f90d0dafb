"""Which parallax this is. Its number stands in pyproject.toml, and is read from the installed package."""

from __future__ import annotations

__all__ = ["version"]


def version() -> str:
    """As in 0.1.0; 0+unknown for a copy of the sources that nobody has installed."""
    # Only here: importing it takes longer than all that `import parallax` does.
    from importlib import metadata

    try:
        return metadata.version("parallax")
    except metadata.PackageNotFoundError:
        return "0+unknown"
