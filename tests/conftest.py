"""Shared fixtures. `ranks` runs a function on n gloo processes."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.ranks.workers import run_ranks


@pytest.fixture(scope="session")
def ranks():
    """run_ranks(n, function, *args): see tests/ranks/workers.py."""
    return run_ranks


settings.register_profile("parallax", deadline=None)  # a busy machine is no failure
settings.load_profile("parallax")
