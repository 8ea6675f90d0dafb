"""Every damage is an error that names the file, and changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallax import checkpoint
from parallax.checkpoint import Entry
from parallax.checkpoint.manifest import seal, unseal
from parallax.errors import CheckpointError
from tests.local.exchange import alone, together
from tests.local.test_checkpoint import cut_rows, entries, tensor

WHOLE = tensor((12, 5))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return together(2, lambda x: checkpoint.save(tmp_path, 1, cut_rows(WHOLE, 2, x.rank), {"n": 1}, x))[0]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(unseal((path / "manifest.json").read_bytes()))
    change(manifest)
    (path / "manifest.json").write_bytes(seal(json.dumps(manifest).encode()))


def refused(path: Path, *parts: str) -> None:
    """On every rank, with these words, and nothing is changed."""
    target = torch.zeros(12, 5)
    for error in together(2, lambda x: checkpoint.load(path, cut_rows(target, 2, x.rank), x)):
        assert isinstance(error, CheckpointError), error
        assert all(part in str(error) for part in parts), str(error)
    assert not target.any()


def test_an_honest_one_loads(saved: Path):
    target = torch.zeros(12, 5)
    assert checkpoint.load(saved, cut_rows(target, 1, 0), alone()) == {"n": 1}
    assert torch.equal(target, WHOLE)


def test_damaged_files(saved: Path):
    shard = saved / "rank-00001.safetensors"
    data = shard.read_bytes()
    for at in (0, 30, len(data) // 2, len(data) - 1):
        shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        refused(saved, shard.name, "altered")
    shard.write_bytes(data[:-1])
    refused(saved, shard.name, "truncated")
    shard.write_bytes(data + b"\0")
    refused(saved, shard.name)
    shard.unlink()
    refused(saved, shard.name, "missing")
    os.symlink("rank-00000.safetensors", shard)
    refused(saved, shard.name, "no regular file")
    shard.unlink()
    shard.mkdir()
    refused(saved, shard.name, "no regular file")
    shard.rmdir()
    shard.write_bytes(data)
    (saved / "rank-00002.safetensors").write_bytes(data)
    refused(saved, "rank-00002.safetensors", "not in the manifest")


def test_damaged_manifests(saved: Path):
    manifest = saved / "manifest.json"
    whole = manifest.read_bytes()
    for at in (0, 5, 40, 90, len(whole) // 2, len(whole) - 2):
        manifest.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(saved, "manifest.json", "sha256")
    text = unseal(whole).decode()
    for bad, word in [
        ("", "damaged"),
        (text[: len(text) // 2], "damaged"),
        ("[]", "format"),
        ("{}", "format"),
        (text.replace('"step": 1', '"step": NaN'), "NaN"),
        (text.replace('"step": 1', '"step": 1, "step": 2'), "twice"),
        (text.replace('"version": 1', '"version": 99'), "version 99"),
        (text.replace('"version": 1', '"version": true'), "version True"),
        (text.replace('"n": 1', '"n": 1e999'), "out of range"),
        ("[" * 100_000, "damaged"),
    ]:
        manifest.write_bytes(seal(bad.encode()) if bad.startswith("{") else bad.encode())
        refused(saved, "manifest.json", word if bad.startswith("{") else "damaged")
    manifest.write_bytes(b"\xff\xfe")
    refused(saved, "manifest.json")
    manifest.unlink()
    refused(saved, str(saved), "no manifest.json")
    os.mkfifo(manifest)
    refused(saved, "manifest.json", "not a regular file")
    manifest.unlink()
    manifest.symlink_to("/etc/passwd")
    refused(saved, "manifest.json", "cannot be read")
    refused(saved / "nowhere", "nowhere", "no directory")


CHANGES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("overlap", lambda m: m["tensors"]["w"]["boxes"][0].update(box=[[0, 7], [0, 5]]), "outside|overlap"),
    ("moved", lambda m: m["tensors"]["w"]["boxes"][1].update(box=[[5, 11], [0, 5]]), "overlap"),
    ("lost", lambda m: m["tensors"]["w"]["boxes"].pop(), "leave a part"),
    ("twice", lambda m: m["tensors"]["w"]["boxes"].append(m["tensors"]["w"]["boxes"][0]), "overlap"),
    ("outside", lambda m: m["tensors"]["w"]["boxes"][1].update(box=[[7, 13], [0, 5]]), "outside of shape"),
    ("offset", lambda m: m["tensors"]["w"]["boxes"][0].update(offset=1 << 40), "outside of shape"),
    ("negative", lambda m: m["tensors"]["w"]["boxes"][0].update(offset=-8), "no count"),
    ("float", lambda m: m["tensors"]["w"]["boxes"][0].update(offset=1.5), "no count"),
    ("bool", lambda m: m["tensors"]["w"]["boxes"][0].update(offset=True), "no count"),
    ("huge", lambda m: m["tensors"]["w"].update(global_shape=[1 << 61, 1 << 61]), "out of range"),
    ("dims", lambda m: m["tensors"]["w"].update(global_shape=[1] * 99), "out of range"),
    ("dtype", lambda m: m["tensors"]["w"].update(dtype="F99"), "dtype 'F99' is unknown"),
    ("no boxes", lambda m: m["tensors"]["w"].pop("boxes"), "KeyError"),
    ("a list", lambda m: m.update(tensors=[]), "expected an object"),
    ("step", lambda m: m.update(step="one"), "no count"),
    ("file", lambda m: m["tensors"]["w"]["boxes"][0].update(file="../rank-00000.safetensors"), "outside"),
    ("size", lambda m: m["files"]["rank-00000.safetensors"].update(bytes=1 << 50), "manifest says"),
]


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_a_manifest_that_contradicts_itself(saved: Path, change: Callable[[dict[str, Any]], object], message: str):
    edit(saved, change)
    target = torch.zeros(12, 5)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(saved, cut_rows(target, 1, 0), alone())
    assert saved.name in str(caught.value) and not target.any()


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "rank-00000.safetensors/..", "a\0b", "rank-1.bin"]
)
def test_names_that_lead_out_are_refused(saved: Path, name: str):
    def rename(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("rank-00000.safetensors")
        for box in manifest["tensors"]["w"]["boxes"]:
            box["file"] = box["file"].replace("rank-00000.safetensors", name)

    edit(saved, rename)
    refused(saved, "no name of a shard")


def test_another_model_is_refused(saved: Path):
    cases = [
        (entries("v", torch.zeros(12, 5), [((0, 12), (0, 5))]), "has no v; it was saved by another model"),
        (entries("w", torch.zeros(12, 6), [((0, 12), (0, 6))]), r"of shape \(12, 5\), this model wants \(12, 6\)"),
        (entries("w", torch.zeros(12, 5).double(), [((0, 12), (0, 5))]), "as F32, this run wants F64"),
        ([], "holds what this run does not have: w"),
        ([Entry("w", (12, 5), ((0, 12), (0, 5)), torch.zeros(3, 5), (0,))], r"a tensor of \(3, 5\) is not box"),
    ]
    for wanted, message in cases:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(saved, wanted, alone())
        assert all(not entry.tensor.any() for entry in wanted)
