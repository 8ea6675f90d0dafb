"""Every version of the manifest that was ever released is read, bit for bit as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parallax.checkpoint.manifest import VERSION
from tests.cases import worst
from tests.data_checkpoint import DATA, go_on


def test_the_present_version_is_among_them():
    assert (DATA / f"checkpoint-version-{VERSION}/manifest.json").is_file()


@pytest.mark.parametrize(
    "path", sorted(p for p in DATA.glob("checkpoint-version-*") if p.is_dir()), ids=lambda p: p.name
)
def test_a_run_goes_on_from_it(path: Path):
    """Saved by 2x2x1 with zero=2; the loss and the gradient norm of the two steps after it were kept beside it."""
    kept = [tuple(row) for row in json.loads(path.with_suffix(".json").read_text())]
    assert worst(go_on(str(path)), kept) <= 1e-10
