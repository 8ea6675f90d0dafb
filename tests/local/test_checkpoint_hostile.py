"""A checkpoint that somebody made with ill will, its seal in order: little time, little memory, nothing believed."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallax import checkpoint
from parallax.checkpoint import Entry
from parallax.checkpoint.manifest import SavedBox, _check_tiling, parse_manifest, seal
from parallax.errors import CheckpointError, DamagedCheckpoint, NewerCheckpoint
from parallax.plain_json import ROOM_BYTES
from tests.local.exchange import alone
from tests.local.test_checkpoint import cut_rows, tensor
from tests.local.test_checkpoint_damage import edit

FILE = "rank-00000.safetensors"


def sealed(**changes: Any) -> bytes:
    manifest = {"format": "parallax-checkpoint", "version": 1, "step": 1, "state": {}, "files": {}, "tensors": {}}
    return seal(json.dumps(manifest | changes).encode())


def one_tensor(shape: list[int], boxes: list[list[list[int]]], num_bytes: int) -> bytes:
    """Of bytes; its boxes lie one behind another."""
    sizes = [math.prod(stop - start for start, stop in box) for box in boxes]
    offsets = [0, *itertools.accumulate(sizes)]
    listed = [{"file": FILE, "offset": at, "box": box} for at, box in zip(offsets, boxes, strict=False)]
    tensors = {"w": {"global_shape": shape, "dtype": "U8", "boxes": listed}}
    return sealed(files={FILE: {"bytes": num_bytes, "sha256": "0" * 64}}, tensors=tensors)


def test_many_boxes_that_begin_at_the_same_places_take_little_time():
    """They all begin at 0 along the dim that is cut most often: compared pair by pair, 8,000 took 18 s."""
    num, side = 8000, 89
    boxes = [[[i // side, i // side + 1], [0, i + 1], [i % side, i % side + 1]] for i in range(num)]
    text = one_tensor([num // side + 1, num, side], boxes, 1 << 40)
    begun = time.process_time()
    with pytest.raises(DamagedCheckpoint, match="leave a part"):
        parse_manifest(text, Path("m"))
    assert time.process_time() - begun < 4


def test_boxes_tile_a_tensor_or_are_refused():
    """Against counting every element: random cuts, and cuts of which one box was changed."""
    draw = random.Random(5)
    outcomes = set()
    for _ in range(600):
        shape = tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 4)))
        boxes = [tuple((0, size) for size in shape)]
        for _ in range(draw.randint(0, 6)):
            box = boxes.pop(draw.randrange(len(boxes)))
            dim = draw.randrange(len(shape))
            (start, stop), middle = box[dim], draw.randint(box[dim][0], box[dim][1])
            halves = [(start, middle), (middle, stop)] if start < middle < stop else [(start, stop)]
            boxes += [(*box[:dim], half, *box[dim + 1 :]) for half in halves]
        for _ in range(draw.randint(0, 2)):
            at, dim = draw.randrange(len(boxes)), draw.randrange(len(shape))
            start = draw.randrange(shape[dim])
            changed = (start, draw.randint(start + 1, shape[dim]))
            boxes[at] = (*boxes[at][:dim], changed, *boxes[at][dim + 1 :])
        count = np.zeros(shape, int)
        for box in boxes:
            count[tuple(slice(*side) for side in box)] += 1
        try:
            _check_tiling("w", shape, tuple(SavedBox(FILE, 0, box) for box in boxes))
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == bool((count == 1).all()), (shape, boxes)
        outcomes.add((accepted, int(count.sum()) == math.prod(shape)))
    assert outcomes == {(True, True), (False, True), (False, False)}


SWOLLEN = {
    "empty lists": lambda n: b"[" + b"[]," * n + b"[]]",
    "nested lists": lambda n: b"[" + b"[[[[[[[[]]]]]]]]," * (n // 8) + b"[]]",
    "objects": lambda n: b"[" + b'{"a":1},' * n + b"{}]",
    "keys": lambda n: b"{" + b",".join(b'"%d":[]' % i for i in range(n)) + b"}",
    "texts": lambda n: b"[" + b'"ab",' * n + b"1]",
    "wide texts": lambda n: b'["' + b"a" * 30 * n + b'\\ud83d\\ude00"]',
}


@pytest.mark.parametrize("num", [20_000, 70_000, 300_000])
@pytest.mark.parametrize("kind", SWOLLEN)
def test_a_manifest_takes_no_more_memory_than_twice_the_files_and_32_mb(tmp_path: Path, kind: str, num: int):
    body = b'{"format":"parallax-checkpoint","version":1,"step":1,"files":{},"tensors":{},"state":{"a":'
    (tmp_path / "manifest.json").write_bytes(text := seal(body + SWOLLEN[kind](num) + b"}}"))
    tracemalloc.start()
    try:
        checkpoint.read_manifest(tmp_path)
        refused = False
    except DamagedCheckpoint as error:
        refused = True
        assert "more memory than there is room" in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 2 * len(text) + ROOM_BYTES
    assert refused == (num == 300_000) or num == 70_000


def test_real_manifests_are_far_from_the_limit_of_memory():
    """100,000 boxes of 4 kB: real ones are larger, or fewer."""
    num = 100_000
    text = one_tensor([num, 4096], [[[i, i + 1], [0, 4096]] for i in range(num)], 4096 * num)
    tracemalloc.start()
    manifest = parse_manifest(text, Path("m"), len(text) + 4096 * num)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(manifest.tensors["w"].boxes) == num and peak <= 2 * (len(text) + 4096 * num) + ROOM_BYTES


def test_boxes_that_share_bytes_of_a_file_are_refused():
    """1,000 bytes of a file served as 1,000,000 numbers."""
    text = one_tensor([1000, 1000], [[[i, i + 1], [0, 1000]] for i in range(1000)], 1_000_000)
    assert parse_manifest(text, Path("m")).tensors["w"].global_shape == (1000, 1000)
    manifest = json.loads(b"{" + text[text.index(b'"format"') :])
    for box in manifest["tensors"]["w"]["boxes"]:
        box["offset"] = 0
    with pytest.raises(DamagedCheckpoint, match=f"boxes overlap at byte 0 of {FILE}"):
        parse_manifest(seal(json.dumps(manifest).encode()), Path("m"))


@pytest.mark.parametrize("name", ["w\x1b]0;title\x07", "w\nstep 9", "w\u202e", "w" * 2000])
def test_names_that_a_terminal_would_obey_are_refused(tmp_path: Path, name: str):
    path = checkpoint.save(tmp_path, 1, cut_rows(tensor((12, 5)), 1, 0), {}, alone())
    edit(path, lambda manifest: manifest["tensors"].update({name: manifest["tensors"].pop("w")}))
    with pytest.raises(DamagedCheckpoint, match="is no name of a tensor"):
        checkpoint.read_manifest(path)
    entry = Entry(name, (12, 5), ((0, 12), (0, 5)), tensor((12, 5)), (0,))
    with pytest.raises(CheckpointError, match="is no name of a tensor"):
        checkpoint.save(tmp_path, 2, [entry], {}, alone())


def test_a_copy_under_the_name_of_a_later_step_is_refused(tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, cut_rows(tensor((12, 5)), 1, 0), {}, alone())
    shutil.copytree(path, tmp_path / "step-00000007")
    with pytest.raises(DamagedCheckpoint, match="step-00000007 holds step 1: renamed or copied"):
        checkpoint.read_manifest(tmp_path / "step-00000007")
    shutil.copytree(path, tmp_path / "the-good-one")
    assert checkpoint.read_manifest(tmp_path / "the-good-one").step == 1


def test_a_newer_version_is_not_damage(tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, cut_rows(tensor((12, 5)), 1, 0), {}, alone())
    for version, kind in ((2, NewerCheckpoint), (0, DamagedCheckpoint), (True, DamagedCheckpoint)):
        edit(path, lambda manifest, version=version: manifest.update(version=version))  # type: ignore[misc]
        with pytest.raises(kind, match=f"has version {version}; this parallax reads version 1"):
            checkpoint.read_manifest(path)
