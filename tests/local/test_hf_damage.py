"""Files that lie: nothing of a Hugging Face directory is believed unchecked, and what is refused is named."""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallax.checkpoint.hf_export import export_hf
from parallax.checkpoint.hf_files import INDEX, SINGLE, read_hf_headers
from parallax.config_hf import read_hf_config
from parallax.errors import CheckpointError, ConfigError
from parallax.plain_json import ROOM_BYTES
from parallax.resume import Checkpoints
from tests.hf_models import run_of, save_our_model


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """One Llama in one file, and in several."""
    folder = tmp_path_factory.mktemp("original")
    step = save_our_model("llama", folder / "run")[0]
    export_hf(step, folder / "single")
    export_hf(step, folder / "several", max_shard_bytes=60_000)
    return folder


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file and leave the data as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def setting(name: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[name].update(values)


def twice(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + ', "lm_head.weight": ' + json.dumps(header["lm_head.weight"]) + "}").encode()


NORM = "model.norm.weight"
HEADERS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("a-name-twice", twice, "a key occurs twice"),
    ("shape-too-large", setting(NORM, shape=[49]), "does not take 192 bytes"),
    ("shape-that-wraps", setting(NORM, shape=[2**62 - 1, 2**62 - 1]), "does not take"),
    ("negative-shape", setting(NORM, shape=[-48]), "-48 is no count"),
    ("many-dims", setting(NORM, shape=[48] + [1] * 40), "no shape of at most 16 dims"),
    ("unknown-dtype", setting(NORM, dtype="F8_E4M3"), "nothing quantised"),
    ("offsets-beyond", setting(NORM, data_offsets=[10**9, 10**9 + 192]), "overlap or leave a gap"),
    ("offsets-of-another", setting(NORM, data_offsets=[0, 192]), "overlap or leave a gap"),
    ("no-offsets", lambda header: header[NORM].pop("data_offsets"), "KeyError"),
    ("a-gap", lambda header: header.pop(NORM), "overlap or leave a gap"),
    ("no-object", lambda header: b"[1, 2]", "its header is no object"),
    ("no-json", lambda header: b"\x80\x04pickled", "is damaged or no safetensors file"),
    ("deep", lambda header: b"[" * 100_000, "is damaged or no safetensors file"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS])
def test_a_header_that_lies_is_refused(original: Path, tmp_path: Path, change: Any, message: str):
    shutil.copytree(original / "single", tmp_path / "hf")
    rewrite(tmp_path / "hf" / SINGLE, change)
    with pytest.raises(CheckpointError, match=message):
        read_hf_headers(tmp_path / "hf")


def test_a_header_of_odd_length_is_no_lie(original: Path, tmp_path: Path):
    """Tensors then begin at an odd byte, as files of early versions have them."""
    shutil.copytree(original / "single", tmp_path / "hf")
    rewrite(tmp_path / "hf" / SINGLE, lambda header: (text := json.dumps(header).encode()) + b" " * (len(text) % 2 + 1))
    values = []
    for directory in (original / "single", tmp_path / "hf"):
        run, state = run_of("1x1x1", {"init_from": directory})
        Checkpoints(run, tmp_path).begin(state)
        values.append(run.flats[0].values)
    assert read_hf_headers(tmp_path / "hf")[NORM].offset % 2 == 1
    assert values[0].equal(values[1])


@pytest.mark.parametrize("length", [0, 1, 10**9, 2**63])
def test_the_length_of_the_header_is_checked_before_it_is_read(original: Path, tmp_path: Path, length: int):
    shutil.copytree(original / "single", tmp_path / "hf")
    path = tmp_path / "hf" / SINGLE
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=f"its header has {length} bytes"):
        read_hf_headers(tmp_path / "hf")


@pytest.mark.parametrize("where", [SINGLE, INDEX])
def test_a_header_takes_no_more_memory_than_twice_the_files_and_32_mb(tmp_path: Path, where: str):
    """A million empty lists: 3 MB took 70."""
    text = b'{"__metadata__":[' + b"[]," * 1_000_000 + b"[]]}"
    (tmp_path / where).write_bytes(len(text).to_bytes(8, "little") + text if where == SINGLE else text)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="more memory than there is room"):
        read_hf_headers(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 2 * len(text) + ROOM_BYTES


@pytest.mark.parametrize("cut", [0, 4, 100, -1, -5000])
def test_a_truncated_file_is_refused(original: Path, tmp_path: Path, cut: int):
    shutil.copytree(original / "single", tmp_path / "hf")
    path = tmp_path / "hf" / SINGLE
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        read_hf_headers(tmp_path / "hf")


@pytest.mark.parametrize(
    "name", ["../single/model.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".safetensors", "a.bin", "", 3]
)
def test_the_index_names_files_beside_it_alone(original: Path, tmp_path: Path, name: Any):
    shutil.copytree(original / "several", tmp_path / "hf")
    path = tmp_path / "hf" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no plain name of a .safetensors file"):
        read_hf_headers(tmp_path / "hf")


def test_no_link_is_followed(original: Path, tmp_path: Path):
    for kind in ("single", "several"):
        shutil.copytree(original / kind, tmp_path / kind)
        victim = sorted((tmp_path / kind).glob("*.safetensors"))[0]
        outside = tmp_path / f"outside-{kind}"
        victim.rename(outside)
        victim.symlink_to(outside)
        with pytest.raises(CheckpointError, match="it must be a regular file, no link"):
            read_hf_headers(tmp_path / kind)


def test_index_and_files_must_say_the_same(original: Path, tmp_path: Path):
    shutil.copytree(original / "several", tmp_path / "hf")
    path = tmp_path / "hf" / INDEX
    index = json.loads(path.read_text())
    whole = json.dumps(index)
    assert len(read_hf_headers(tmp_path / "hf")) == len(index["weight_map"])
    del index["weight_map"][NORM]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has, and the index does not put there, model.norm.weight"):
        read_hf_headers(tmp_path / "hf")
    path.write_text(whole.replace(f'"{NORM}"', '"model.other.weight"'))
    with pytest.raises(CheckpointError, match="the files are not of one model"):
        read_hf_headers(tmp_path / "hf")
    path.write_text(whole)
    next((tmp_path / "hf").glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="is missing; copy the model again"):
        read_hf_headers(tmp_path / "hf")


def test_pickle_is_refused_with_the_way_out(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="which is pickled and can run any code .* convert it .*save_pretrained"):
        read_hf_headers(tmp_path)


def test_missing_and_unknown_weights_are_named_and_nothing_changes(original: Path, tmp_path: Path):
    run, state = run_of("1x1x1", {"init_from": original / "single"})
    (flat,) = run.flats.values()
    before = flat.values.clone()

    def attempt(message: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        folder = tmp_path / "hf"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original / "single", folder)
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE)
        object.__setattr__(run.config, "init_from", str(folder))
        with pytest.raises(CheckpointError, match=message):
            Checkpoints(run, tmp_path).begin(state)
        assert flat.values.equal(before)

    attempt("has no model.norm.weight", lambda t: t.pop(NORM))
    attempt("does not have: model.layers.9.weight", lambda t: t.update({"model.layers.9.weight": torch.ones(2)}))
    attempt("of shape \\(47,\\), its config.json says", lambda t: t.update({NORM: torch.ones(47)}))
    attempt("weights must be F64", lambda t: t.update({NORM: torch.ones(48, dtype=torch.int32)}))
    assert math.isfinite(float(before.sum()))


def test_a_config_that_is_a_link_is_not_followed(original: Path, tmp_path: Path):
    shutil.copytree(original / "single", tmp_path / "hf")
    (tmp_path / "hf/config.json").rename(tmp_path / "outside.json")
    (tmp_path / "hf/config.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(ConfigError, match="it must be a regular file, no link"):
        read_hf_config(tmp_path / "hf")
    shutil.copytree(original / "run", tmp_path / "run")
    shutil.copytree(tmp_path / "hf", tmp_path / "run/hf", symlinks=True)
    step = next((tmp_path / "run/checkpoints").iterdir())
    with pytest.raises(ConfigError, match="it must be a regular file, no link"):
        export_hf(step, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
