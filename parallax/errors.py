"""The errors a user sees. Each message says what is wrong, the numbers, and the fix."""

from __future__ import annotations

__all__ = ["CheckpointError", "ConfigError", "MeshError", "ParallaxError", "ScheduleError"]


class ParallaxError(ValueError):
    """Base of every error that parallax raises on bad input."""


class ConfigError(ParallaxError):
    """A configuration that cannot run. Raised alike on every rank, before the first collective."""


class MeshError(ParallaxError):
    """A mesh that does not fit the processes, or does not parse."""


class ScheduleError(ParallaxError):
    """A pipeline schedule that is incomplete, contradictory, or would deadlock."""


class CheckpointError(ParallaxError):
    """A checkpoint that is missing, damaged, or belongs to another model. Names the file."""
