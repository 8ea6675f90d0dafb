"""Text without a download: the split by files, token files, and errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from parallax import corpus as corpus_file
from parallax.corpus import Corpus, TokenStream, open_corpus
from parallax.errors import ConfigError


def opened(source: object, *, fraction: float = 0.25, seed: int = 0, vocab: int = 256) -> Corpus:
    return open_corpus(str(source), validation_fraction=fraction, seed=seed, vocab=vocab)


def whole(stream: TokenStream) -> bytes:
    return bytes(stream.read(0, len(stream)).astype(np.uint8))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    for number in range(8):
        folder = tmp_path / "inner" if number % 2 else tmp_path
        (folder / f"{number}.txt").write_text(f"file {number} " * 20)
    return tmp_path


def test_the_standard_library_is_about_ten_megabytes_of_python():
    corpus = opened("stdlib", fraction=0.05)
    total = len(corpus.train) + len(corpus.validation)
    assert 5e6 < total < 5e7
    assert 0.03 < len(corpus.validation) / total < 0.07
    assert b"import " in whole(corpus.validation)
    again = opened("stdlib", fraction=0.05)
    assert whole(again.validation) == whole(corpus.validation), "the same files every time"
    assert whole(opened("stdlib", fraction=0.05, seed=1).validation) != whole(corpus.validation)


def test_files_are_held_out_whole(texts: Path):
    corpus = opened(texts)
    assert corpus.num_files == (6, 2)
    train, held_out = whole(corpus.train), whole(corpus.validation)
    for number in range(8):
        text = f"file {number} ".encode() * 20 + b"\n"
        assert (text in train) != (text in held_out)
    assert len(train) + len(held_out) == 8 * 141


def test_a_glob_a_directory_and_a_file(texts: Path):
    assert sum(opened(texts).num_files) == 8
    assert sum(opened(texts / "*.txt").num_files) == 4
    assert sum(opened(texts / "**/*.txt").num_files) == 8
    alone = opened(texts / "0.txt")
    assert whole(alone.train) + whole(alone.validation) == b"file 0 " * 20 + b"\n"


@pytest.mark.parametrize(("name", "dtype"), [("t.bin", np.uint16), ("t.uint32.bin", np.uint32)])
def test_token_files_are_mapped(tmp_path: Path, name: str, dtype: type):
    tokens = np.arange(1000, dtype=dtype) % 700
    tokens.tofile(tmp_path / name)
    corpus = opened(tmp_path / name, vocab=700)
    assert isinstance(corpus.train.parts[0], np.memmap)
    assert (len(corpus.train), len(corpus.validation)) == (750, 250)
    assert corpus.train.read(0, 750).tolist() == tokens[:750].tolist()
    assert corpus.validation.read(0, 250).tolist() == tokens[750:].tolist()


def test_train_bin_and_val_bin_are_taken_as_named(tmp_path: Path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(100, 110, dtype=np.uint16).tofile(tmp_path / "val.bin")
    corpus = opened(tmp_path, vocab=110)
    assert corpus.train.read(0, 100).tolist() == list(range(100))
    assert corpus.validation.read(0, 10).tolist() == list(range(100, 110))


def test_a_stream_reads_across_its_parts():
    stream = TokenStream("s", (np.arange(3), np.arange(3, 4), np.arange(4, 9)), 9)
    for start in range(10):
        for stop in range(start, 12):
            assert stream.read(start, stop).tolist() == list(range(9))[start:stop]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def test_what_cannot_be_read_is_named(tmp_path: Path):
    good = write(tmp_path / "good.txt", b"text " * 100)
    cases = [
        (tmp_path / "nothing-*.txt", 256, r"nothing-\*.txt: there is no such file"),
        (tmp_path / "missing", 256, "missing: there is no such file"),
        (write(tmp_path / "hidden/.one", b"text").parent, 256, "hidden: the directory holds no file to read, hidden"),
        (write(tmp_path / "empty.txt", b""), 256, "empty.txt is empty"),
        (write(tmp_path / "latin.txt", b"caf\xe9"), 256, "latin.txt is not UTF-8 text: byte 3 is 0xe9"),
        (good, 100, "model.vocab=100 is smaller than the 256 byte tokens"),
        (write(tmp_path / "odd.bin", b"\0\0\0"), 256, "odd.bin has 3 bytes, not a multiple of the 2 of a uint16"),
        (write(tmp_path / "none.bin", b""), 256, "none.bin has 0 bytes"),
        (write(tmp_path / "big.bin", b"\x00\x01" * 10), 256, "big.bin holds token 256, model.vocab=256"),
    ]
    for source, vocab, message in cases:
        with pytest.raises(ConfigError, match=message):
            opened(source, vocab=vocab)


def test_an_id_beyond_the_vocabulary_is_found_when_it_is_read(tmp_path: Path):
    """The middle of a huge file is not looked at before."""
    stream = TokenStream("middle.bin", (np.array([1, 2, 900, 3]),), 256)
    assert stream.read(0, 2).tolist() == [1, 2]
    with pytest.raises(
        ConfigError, match="middle.bin holds token 900, model.vocab=256; set model.vocab to at least 901"
    ):
        stream.read(1, 3)


def test_too_short_is_an_error_with_the_numbers(texts: Path):
    corpus = opened(texts)
    assert corpus.require(200) is corpus
    with pytest.raises(ConfigError, match=r"validation part has 282 tokens, .*sequence_length=282 needs at least 283"):
        corpus.require(282)
    with pytest.raises(ConfigError, match="sequence_length=4000000 needs at least 4,000,001"):
        corpus.require(4_000_000)
    many = TokenStream("s", (np.zeros(15_617, np.uint8),), 256)
    with pytest.raises(ConfigError, match="its training part has 15,617 tokens, corpus.sequence_length=16000 needs"):
        Corpus(many, many, "s", (1, 1)).require(16_000)


def test_what_is_named_for_validation_is_not_trained_on(tmp_path: Path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(100, 110, dtype=np.uint16).tofile(tmp_path / "val.bin")
    corpus = opened(tmp_path, vocab=110)
    assert (len(corpus.train), len(corpus.validation), corpus.num_files) == (100, 10, (1, 1))


def test_both_ends_of_a_token_file_are_looked_at_when_it_is_opened(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus_file, "CHECKED_TOKENS", 10)
    for place in (0, 99):
        tokens = np.zeros(100, np.uint16)
        tokens[place] = 300
        tokens.tofile(tmp_path / f"{place}.bin")
        with pytest.raises(ConfigError, match=f"{place}.bin holds token 300"):
            opened(tmp_path / f"{place}.bin")


def test_a_file_that_the_system_refuses_is_named(texts: Path, monkeypatch):
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"0\.txt cannot be read: Permission denied"):
        opened(texts / "0.txt")


def test_hidden_files_and_folders_are_left_out(texts: Path):
    (texts / ".git").mkdir()
    write(texts / ".git" / "object", b"\xff\xfe")
    write(texts / ".hidden.txt", b"secret")
    assert sum(opened(texts).num_files) == 8


@pytest.mark.parametrize("names", [("train.u32.bin", "val.u32.bin"), ("a_train_000001.bin", "a_val_000000.bin")])
def test_validation_files_are_never_trained_on(tmp_path: Path, names: tuple[str, str]):
    dtype = np.uint32 if "u32" in names[0] else np.uint16
    for number, name in enumerate(names):
        np.full(100, number, dtype=dtype).tofile(tmp_path / name)
    corpus = opened(tmp_path)
    assert set(corpus.train.read(0, 1000)) == {0} and set(corpus.validation.read(0, 1000)) == {1}
    assert len(corpus.train) == len(corpus.validation) == 100


def test_pythons_own_sources_are_found_without_walking_what_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a.py", "json/b.py", "site-packages/torch/c.py", "json/tests/d.py", "json/e.txt", "test/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    walked = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walked.append(Path(path).name) or scan(path))
    assert sorted(corpus_file._sources(tmp_path)) == [tmp_path / "a.py", tmp_path / "json/b.py"]
    assert sorted(walked) == sorted([tmp_path.name, "json"])


def test_tokens_beside_text_are_an_error(tmp_path: Path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "a.bin")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"has token files \(.*a.bin\) and others \(.*b.txt\); name one kind"):
        opened(tmp_path)


def test_a_name_that_is_not_utf8_is_no_obstacle(tmp_path: Path):
    for name in (b"\xff.txt", b"b.txt"):
        Path(str(tmp_path).encode().decode() + "/" + name.decode("utf-8", "surrogateescape")).write_text("text " * 9)
    assert sum(opened(tmp_path).num_files) == 2
