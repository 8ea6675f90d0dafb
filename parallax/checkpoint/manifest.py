"""The manifest: which box of which tensor lies in which file. A closed world, checked before anything is believed.

manifest.json holds the format's name and version, the step, the caller's state, and

    files    name -> {bytes, sha256, crc32}
    tensors  name -> {global_shape, dtype, boxes: [{file, offset, box}]}

and first of all sha256, of the text without it, so that a flipped bit of an offset cannot load a neighbour's numbers.
offset is the box's first byte in the file; a box is row-major and contiguous there. The files are safetensors, so that
any tool can read them, but what parallax believes is the manifest alone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parallax.checkpoint.place import Place
from parallax.checkpoint.store import MANIFEST, STEP, store_of
from parallax.errors import CheckpointError, DamagedCheckpoint, NewerCheckpoint
from parallax.params import Box
from parallax.plain_json import ROOM_BYTES, parse_json

__all__ = ["DTYPES", "Manifest", "SavedBox", "SavedFile", "SavedTensor", "parse_manifest", "read_manifest"]

FORMAT, VERSION = "parallax-checkpoint", 1
MAX_MANIFEST_BYTES = 1 << 26
"""More than half a million boxes."""
MAX_DIMS, MAX_NAME = 16, 1024
DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1}
"""safetensors' names of the dtypes, and their sizes in bytes."""
SHA256 = re.compile(r"[0-9a-f]{64}")
SEAL = re.compile(rb'\{"sha256": "([0-9a-f]{64})", ')
FILE_NAME = re.compile(r"rank-\d{5}(-[0-9a-f]{8})?\.safetensors")
UNFINISHED = re.compile(r"(rank|record|failed|saving)-\d{5}-[0-9a-f]{8}(\.\w+)*")
"""What a save that died may leave beside the files of one that did not, in a store without rename. Nobody reads it."""


@dataclass(frozen=True, slots=True)
class SavedFile:
    """crc32 is what a load checks, four times as fast as sha256; files of old have none."""

    bytes: int
    sha256: str
    crc32: int | None = None


@dataclass(frozen=True, slots=True)
class SavedBox:
    file: str
    offset: int
    box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    global_shape: tuple[int, ...]
    dtype: str
    boxes: tuple[SavedBox, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    path: Place
    step: int
    state: Mapping[str, Any]
    files: Mapping[str, SavedFile]
    tensors: Mapping[str, SavedTensor]


def read_manifest(directory: Place) -> Manifest:
    """Read and check DIRECTORY/manifest.json, and that exactly its files are there, at their sizes.

    Raises CheckpointError that names the file: DamagedCheckpoint where it is not what was saved.
    """
    store, path = store_of(directory), directory / MANIFEST
    try:
        sizes = store.sizes(directory)
        text = store.read(path, MAX_MANIFEST_BYTES) if MANIFEST in sizes else None
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{directory} is no directory; give a checkpoint such as OUTPUT/checkpoints/step-00000100"
        ) from None
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename or path} cannot be read: {error.strerror}") from None
    if text is None:
        raise DamagedCheckpoint(f"{directory} has no {MANIFEST}: not a checkpoint, or a save that never finished")
    manifest = parse_manifest(text, path, sum(size or 0 for size in sizes.values()))
    _check_files(manifest, sizes)
    named = STEP.fullmatch(directory.name)
    if named and int(named[1]) != manifest.step:
        raise DamagedCheckpoint(f"{directory} holds step {manifest.step}: renamed or copied; give it its name back")
    return manifest


def seal(body: bytes) -> bytes:
    """A JSON object's text with the sha256 of that text as its first key."""
    return b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'", ' + body[1:]


def unseal(text: bytes) -> bytes:
    """What `seal` was given. Raises ValueError where the text is not what was sealed."""
    match = SEAL.match(text)
    body = b"{" + text[match.end() :] if match else b""
    if match is None or hashlib.sha256(body).hexdigest().encode() != match[1]:
        raise ValueError("its sha256 is not that of its text")
    return body


def parse_manifest(text: bytes, path: Place, files_bytes: int = 0) -> Manifest:
    """The manifest in these bytes; `path` is for the messages. Takes no more memory than twice the checkpoint's files,
    of files_bytes together, and ROOM_BYTES. Raises CheckpointError.
    """

    def bad(what: str) -> CheckpointError:
        return DamagedCheckpoint(f"{path} is damaged or not a manifest of parallax: {what}")

    if len(text) > MAX_MANIFEST_BYTES:
        raise bad(f"it is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        body = unseal(text)
        data = parse_json(body, ROOM_BYTES + 2 * files_bytes)
    except (ValueError, RecursionError) as error:
        raise bad(str(error)) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise bad(f"its format is not {FORMAT!r}")
    version = data.get("version")
    if version is not VERSION:  # not True, which equals 1
        said = f"{path} has version {version!r}; this parallax reads version {VERSION}"
        if isinstance(version, int) and version > VERSION:
            raise NewerCheckpoint(f"{said}: install the parallax that wrote it, or name an older checkpoint")
        raise DamagedCheckpoint(said)
    try:
        files = {name: _file(_mapping(f)) for name, f in _mapping(data["files"]).items()}
        tensors = {name: _tensor(name, t, files) for name, t in _mapping(data["tensors"]).items()}
        _check_apart(tensors)
        manifest = Manifest(path, _count(data["step"]), _mapping(data["state"]), files, tensors)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise bad(f"{type(error).__name__}: {error}") from None
    if odd := [name for name in files if not FILE_NAME.fullmatch(name)]:
        raise bad(f"{odd[0]!r} is no name of a shard")
    return manifest


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {type(value).__name__}")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no count")
    return value


def _file(data: Any) -> SavedFile:
    sha256, crc32 = data["sha256"], data.get("crc32")
    if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise ValueError(f"{sha256!r} is no sha256")
    return SavedFile(_count(data["bytes"]), sha256, None if crc32 is None else _count(crc32))


def check_name(name: str) -> None:
    """Raise CheckpointError unless a tensor may have this name: a terminal would obey some that `show` prints."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise CheckpointError(f"{name[:100]!r} is no name of a tensor: at most {MAX_NAME} characters, all printable")


def _tensor(name: str, data: Any, files: Mapping[str, SavedFile]) -> SavedTensor:
    check_name(name)
    shape = tuple(_count(size) for size in data["global_shape"])
    if len(shape) > MAX_DIMS or math.prod(shape) >= 1 << 60:
        raise ValueError(f"{name}: shape {shape} is out of range")
    dtype = data["dtype"]
    if dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {dtype!r} is unknown")
    boxes = tuple(
        SavedBox(b["file"], _count(b["offset"]), tuple((_count(start), _count(stop)) for start, stop in b["box"]))
        for b in data["boxes"]
    )
    for saved in boxes:
        inside = len(saved.box) == len(shape) and all(
            start < stop <= size for (start, stop), size in zip(saved.box, shape, strict=True)
        )
        end = saved.offset + math.prod(saved.shape) * DTYPES[dtype]
        if not inside or saved.file not in files or end > files[saved.file].bytes:
            raise ValueError(f"{name}: box {saved.box} is outside of shape {shape} or of file {saved.file!r}")
    _check_tiling(name, shape, boxes)
    return SavedTensor(shape, dtype, boxes)


# Note: Whether boxes tile a tensor
# Stretch each dim at random: the k-th place between two elements goes to a random number. A box then has a volume, the
# product of what its sides have become, and where boxes tile the tensor, their volumes add up to that of the whole.
# Where they do not, the two sums differ as polynomials in the random numbers: every corner at which the boxes do not
# meet leaves a term. Polynomials of degree d that differ agree at a random point modulo a prime p with a chance of
# d / p at most (Schwartz-Zippel): below 1 in 10^17, and nobody can choose boxes for numbers that are drawn at reading.
# Comparing the boxes pair by pair needs the square of the time.
PRIME = (1 << 61) - 1


def _check_tiling(name: str, shape: tuple[int, ...], boxes: tuple[SavedBox, ...]) -> None:
    """The boxes cover the tensor exactly once. See Note: Whether boxes tile a tensor."""
    num_elements = sum(math.prod(saved.shape) for saved in boxes)
    if num_elements < math.prod(shape):
        raise ValueError(f"{name}: the boxes leave a part of shape {shape} out")
    draw = random.Random()  # seeded by the system
    stretched: list[defaultdict[int, int]] = [defaultdict(lambda: draw.randrange(PRIME)) for _ in shape]

    def volume(box: Box) -> int:
        return math.prod(places[stop] - places[start] for (start, stop), places in zip(box, stretched, strict=True))

    whole = volume(tuple((0, size) for size in shape))
    if num_elements > math.prod(shape) or (sum(volume(saved.box) for saved in boxes) - whole) % PRIME:
        raise ValueError(f"{name}: boxes overlap")


def _check_apart(tensors: Mapping[str, SavedTensor]) -> None:
    """No two boxes share bytes of a file, so no file serves more numbers than it holds."""
    spans = sorted(
        (saved.file, saved.offset, saved.offset + math.prod(saved.shape) * DTYPES[tensor.dtype])
        for tensor in tensors.values()
        for saved in tensor.boxes
    )
    for (file, _, end), (other, begin, _) in itertools.pairwise(spans):
        if file == other and begin < end:
            raise ValueError(f"boxes overlap at byte {begin} of {file}")


def _check_files(manifest: Manifest, sizes: Mapping[str, int | None]) -> None:
    directory = manifest.path.parent
    others = set(sizes) - set(manifest.files) - {MANIFEST}
    if extra := sorted(name for name in others if not UNFINISHED.fullmatch(name)):
        raise DamagedCheckpoint(f"{directory / extra[0]} is not in the manifest; remove it, or take another checkpoint")
    for name, file in manifest.files.items():
        if name not in sizes:
            raise DamagedCheckpoint(f"{directory / name} is missing; take another checkpoint")
        if sizes[name] is None:
            raise DamagedCheckpoint(f"{directory / name} is no regular file; take another checkpoint")
        if sizes[name] != file.bytes:
            raise DamagedCheckpoint(
                f"{directory / name} has {sizes[name]} bytes, the manifest says {file.bytes}: truncated or altered; "
                "take another checkpoint"
            )


def overlaps(tensor: SavedTensor, box: Box) -> Iterator[tuple[SavedBox, Box]]:
    """The saved boxes that meet a box, each with the part that they share, in global coordinates."""
    for saved in tensor.boxes:
        shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(saved.box, box, strict=True))
        if all(start < stop for start, stop in shared):
            yield saved, shared
