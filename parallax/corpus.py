"""Text to train on: the standard library's sources, UTF-8 files, or token files. numpy only, no torch.

Text is read as bytes: 256 tokens, nothing to download. Training and validation are split by whole files, by a hash of
(seed, path), so that the split is the same on every mesh.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parallax.config import Config
from parallax.errors import ConfigError

__all__ = ["Corpus", "TokenStream", "corpus_for", "open_corpus"]

BYTE_VOCAB = 256
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
CHECKED_TOKENS = 1_000_000
VALIDATION_NAME = re.compile(r"(^|[._-])(val|valid|validation)([._-]|$)")
"""A token file to validate on: val.bin, fineweb_val_000000.bin."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenStream:
    """A long run of tokens: read in slices, memory-mapped where it comes from token files.

    vocab: ids beyond it are an error, found when they are read.
    """

    name: str
    parts: tuple[np.ndarray, ...]
    vocab: int

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64. Raises ConfigError on an id that the vocabulary does not have."""
        pieces, at = [], 0
        for part in self.parts:
            first, last = max(start - at, 0), min(stop - at, len(part))
            if first < last:
                pieces.append(part[first:last])
            at += len(part)
        tokens = np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, np.int64)
        if tokens.size and tokens.max() >= self.vocab:
            raise ConfigError(
                f"{self.name} holds token {tokens.max()}, model.vocab={self.vocab}; set model.vocab to at least "
                f"{tokens.max() + 1}, or check that the file's integers are read right (.uint32.bin for 32 bits)"
            )
        return tokens


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    train: TokenStream
    validation: TokenStream
    source: str
    num_files: tuple[int, int]

    def describe(self) -> str:
        train, held_out = self.num_files
        return (
            f"corpus {self.source}: {len(self.train):,} tokens of {train} files to train on, "
            f"{len(self.validation):,} of {held_out} held out"
        )

    def require(self, sequence_length: int) -> Corpus:
        """Itself. Raises ConfigError where either part is too short for one sequence and the token after it."""
        for stream, part in ((self.train, "training"), (self.validation, "validation")):
            if len(stream) < sequence_length + 1:
                raise ConfigError(
                    f"corpus.source={self.source}: its {part} part has {len(stream):,} tokens, corpus.sequence_length="
                    f"{sequence_length} needs at least {sequence_length + 1:,}; give more text or shorter sequences"
                )
        return self


def corpus_for(config: Config) -> Corpus:
    """The corpus that a configuration names. Raises ConfigError where it is missing or too short for a sequence."""
    section = config.corpus
    corpus = open_corpus(
        section.source,
        validation_fraction=section.validation_fraction,
        seed=config.seed,
        vocab=config.model.vocab,
    )
    return corpus.require(section.sequence_length)


def open_corpus(source: str, *, validation_fraction: float, seed: int, vocab: int) -> Corpus:
    """Open `stdlib`, a file, a directory, a glob of UTF-8 text, or nanoGPT-style .bin token files.

    stdlib: the running Python's own sources, about 10 MB of real code. .bin files hold uint16 ids, or uint32 if the
    name ends in .uint32.bin; files with `val` or `validation` in their name are held out, and where there is none the
    tail is. Raises ConfigError that names the file: missing, empty, unreadable, not UTF-8, ids beyond the vocabulary.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _text(source, root, _sources(root), validation_fraction, seed, vocab, forgiving=True)
    root, paths = _find(source)
    tokens = [path for path in paths if path.suffix == ".bin"]
    if tokens and len(tokens) < len(paths):
        text = next(path for path in paths if path.suffix != ".bin")
        raise ConfigError(
            f"corpus.source={source} has token files ({tokens[0]}) and others ({text}); name one kind, as in "
            f"{source.rstrip('/')}/*.bin"
        )
    if tokens:
        return _tokens(source, tokens, validation_fraction, vocab)
    return _text(source, root, paths, validation_fraction, seed, vocab, forgiving=False)


def _sources(root: Path) -> list[Path]:
    """Python files below a directory, outside of SKIPPED ones, which are not even walked: site-packages may hold 10,000
    folders, and every rank comes by here before its first step."""
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in SKIPPED]
        found += [Path(folder, name) for name in files if name.endswith(".py") and name not in SKIPPED]
    return found


def _find(source: str) -> tuple[Path, list[Path]]:
    """The files that a source names, sorted, and the directory that their names are relative to."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(
            p for p in path.rglob("*") if p.is_file() and not any(s.startswith(".") for s in p.relative_to(path).parts)
        )
        root = path
    elif path.is_file():
        found, root = [path], path.parent
    else:
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        root = Path(os.path.commonpath([p.parent for p in found])) if found else path.parent
    if not found:
        if path.is_dir():
            raise ConfigError(f"corpus.source={source}: the directory holds no file to read, hidden ones aside")
        raise ConfigError(f"corpus.source={source}: there is no such file, and no file matches; check the path")
    return root, found


def _text(
    source: str, root: Path, paths: Sequence[Path], fraction: float, seed: int, vocab: int, *, forgiving: bool
) -> Corpus:
    if vocab < BYTE_VOCAB:
        raise ConfigError(
            f"model.vocab={vocab} is smaller than the {BYTE_VOCAB} byte tokens of text; set model.vocab=256"
        )
    texts: dict[str, bytes] = {}
    for path in paths:
        text = _read_text(path, forgiving)
        if text:
            texts[path.relative_to(root).as_posix()] = text if text.endswith(b"\n") else text + b"\n"
    if len(texts) == 1:
        (name, whole), *_ = texts.items()
        cut = max(1, round(len(whole) * (1 - fraction)))
        train, validation = (
            TokenStream(name, (np.frombuffer(p, np.uint8),), vocab) for p in (whole[:cut], whole[cut:])
        )
        return Corpus(train, validation, source, (1, 1))
    held_out = _held_out({name: len(text) for name, text in texts.items()}, fraction, seed)
    train, validation = (
        TokenStream(source, (np.frombuffer(b"".join(texts[name] for name in sorted(part)), np.uint8),), vocab)
        for part in (set(texts) - held_out, held_out)
    )
    return Corpus(train, validation, source, (len(texts) - len(held_out), len(held_out)))


def _read_text(path: Path, forgiving: bool) -> bytes:
    """A file's bytes, known to be UTF-8. Of Python's own sources the odd one that is not is left out."""
    try:
        text = path.read_bytes()
    except OSError as error:
        if forgiving:
            return b""
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if not text and not forgiving:
        raise ConfigError(f"{path} is empty; leave it out of corpus.source")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        if forgiving:
            return b""
        raise ConfigError(
            f"{path} is not UTF-8 text: byte {error.start} is {text[error.start]:#04x}; convert it, or leave it out"
        ) from None
    return text


def _held_out(sizes: dict[str, int], fraction: float, seed: int) -> set[str]:
    """Whole files in an order keyed by (seed, name), until they make up the fraction; one at least, never all."""

    def order(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}\x1f{name}".encode(errors="surrogateescape"), digest_size=8).digest()

    chosen: set[str] = set()
    wanted, held = fraction * sum(sizes.values()), 0
    for name in sorted(sizes, key=order)[: len(sizes) - 1]:
        if chosen and held + sizes[name] / 2 > wanted:
            continue  # too large for what is left; a smaller one may come
        chosen.add(name)
        held += sizes[name]
        if held >= wanted:
            break
    return chosen


def _tokens(source: str, paths: Sequence[Path], fraction: float, vocab: int) -> Corpus:
    held = [path for path in paths if VALIDATION_NAME.search(path.name)]
    mapped = {path: _map(path, vocab) for path in paths}
    if held and len(held) < len(paths):
        train = tuple(mapped[path] for path in paths if path not in held)
        validation = tuple(mapped[path] for path in held)
        files = (len(train), len(validation))
    else:  # one run of tokens: its tail is held out
        whole = list(mapped.values())
        cut = max(1, round(len(whole[-1]) * (1 - fraction)))
        train, validation = (*whole[:-1], whole[-1][:cut]), (whole[-1][cut:],)
        files = (len(paths), 1)
    name = str(paths[0]) if len(paths) == 1 else source
    return Corpus(TokenStream(name, train, vocab), TokenStream(name, validation, vocab), source, files)


def _map(path: Path, vocab: int) -> np.ndarray:
    """A token file by memory map; its first and last million ids are looked at now, the rest as they are read."""
    dtype = np.dtype("<u4" if path.name.endswith((".uint32.bin", ".u32.bin")) else "<u2")
    try:
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise ConfigError(
                f"{path} has {size} bytes, not a multiple of the {dtype.itemsize} of a {dtype.name} token"
            )
        tokens = np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    stream = TokenStream(str(path), (tokens,), vocab)
    stream.read(0, CHECKED_TOKENS)
    stream.read(max(0, len(tokens) - CHECKED_TOKENS), len(tokens))
    return tokens
