"""`parallax checkpoint`: look at checkpoints, check, compare and thin them out, in little memory, without torchrun."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallax.arguments import close_to, take_options
from parallax.checkpoint.place import Place, place
from parallax.errors import CheckpointError, ConfigError, DamagedCheckpoint, NewerCheckpoint, printable

if TYPE_CHECKING:
    from parallax.checkpoint import Manifest

__all__ = ["USAGE", "run_checkpoint"]

USAGE = """parallax checkpoint COMMAND ...
  ls RUN                 the checkpoints of a run's directory, oldest first
  show CHECKPOINT        what it holds: step, mesh, files, tensors
  verify CHECKPOINT ...  whether it is what was saved: manifest, sizes, every file's hash
  diff A B               which tensors differ, and by how much
  prune RUN keep=K [keep_every=N]   delete all but the newest K that are sound, and multiples of N
  reshard CHECKPOINT --mesh 2x2x2 OUT [key=value ...]   write OUT/checkpoints with the files of another mesh
  export CHECKPOINT --to hf OUT     a Hugging Face model directory; export --help tells the options
All but export take --json. Exit code: 0, 1 where something is damaged or differs, 2 for a mistake in the command."""


def run_checkpoint(argv: Sequence[str]) -> int:
    """Run one of the commands; returns its exit code."""
    if argv and argv[0] == "export":
        from parallax.checkpoint.hf_command import run_export

        return run_export(argv[1:])
    if "--help" in argv or "-h" in argv:
        print(f"usage: {USAGE}")
        return 0
    name, *words = [word for word in argv if word != "--json"] or [""]
    commands: Mapping[str, Callable[[Sequence[str]], tuple[Any, list[str], int]]] = {
        "ls": _ls,
        "show": _show,
        "verify": _verify,
        "diff": _diff,
        "prune": _prune,
        "reshard": _reshard,
    }
    if name not in commands:
        said = f"and got {name}{close_to(name, (*commands, 'export', '--json'))}" if name else "and got nothing"
        raise ConfigError(f"parallax checkpoint takes one of {', '.join(commands)}, export, {said}\nusage: {USAGE}")
    if name != "reshard":  # which has options of its own
        _, words = take_options(words, name, flags=("--json",))
    data, lines, code = commands[name](words)
    print(json.dumps(data, allow_nan=False) if "--json" in argv else printable("\n".join(lines)))
    return code


def _one(words: Sequence[str], what: str) -> Place:
    if len(words) != 1:
        raise ConfigError(f"expected one {what}, got {len(words)}\nusage: {USAGE}")
    return place(words[0])


def _checkpoints(run: Place) -> Place:
    """The directory that holds the checkpoints: RUN/checkpoints, or RUN itself."""
    from parallax.checkpoint.store import store_of

    for found in (run / "checkpoints", run):
        try:
            store_of(found).sizes(found)
            return found
        except OSError:
            continue
    raise CheckpointError(f"{run} is no directory; give a run's output, such as runs/001")


def _ls(words: Sequence[str]) -> tuple[Any, list[str], int]:
    from parallax import checkpoint
    from parallax.memory import format_bytes

    rows: list[dict[str, Any]] = []
    for path in checkpoint.find(_checkpoints(_one(words, "run"))):
        row: dict[str, Any] = {"path": str(path), "step": checkpoint.step_of(path), "problem": None, "damaged": False}
        try:
            manifest = checkpoint.read_manifest(path)
            row |= {"bytes": sum(file.bytes for file in manifest.files.values()), "files": len(manifest.files)}
            row["mesh"] = manifest.state.get("mesh")
        except CheckpointError as error:  # one of a newer version, or that may not be read, is no damage
            row |= {"problem": str(error), "damaged": isinstance(error, DamagedCheckpoint)}
        rows.append(row)
    lines = [f"{'step':>8}  {'size':>8}  {'files':>5}  mesh"] if rows else ["no checkpoints"]
    for row in rows:
        shown = f"{format_bytes(row['bytes']):>8}  {row['files']:>5}  {row['mesh']}" if not row["problem"] else ""
        lines.append(f"{row['step']:>8}  {shown or 'DAMAGED: ' * row['damaged'] + row['problem']}")
    return rows, lines, int(any(row["problem"] for row in rows))


def _show(words: Sequence[str]) -> tuple[Any, list[str], int]:
    from parallax import checkpoint

    manifest = checkpoint.read_manifest(_one(words, "checkpoint"))
    tensors = {
        name: {"shape": list(t.global_shape), "dtype": t.dtype, "boxes": len(t.boxes)}
        for name, t in sorted(manifest.tensors.items())
    }
    state = {key: value for key, value in manifest.state.items() if key != "config"}
    data = {"step": manifest.step, "state": state, "config": manifest.state.get("config"), "tensors": tensors}
    data["files"] = {name: file.bytes for name, file in manifest.files.items()}
    elements = sum(math.prod(t.global_shape) for n, t in manifest.tensors.items() if n.startswith("parameters/"))
    lines = [f"step {manifest.step}, {elements:,} parameters, {len(manifest.files)} files"]
    lines += [f"  {key} {value}" for key, value in state.items()]
    width = max(map(len, tensors), default=0)
    for name, saved in sorted(manifest.tensors.items()):
        size = "x".join(map(str, saved.global_shape))
        lines.append(f"  {name:<{width}}  {saved.dtype:<4}  {size:<14}  {len(saved.boxes)} boxes")
    return data, lines, 0


def _verify(words: Sequence[str]) -> tuple[Any, list[str], int]:
    from parallax import checkpoint

    if not words:
        raise ConfigError(f"verify takes one checkpoint or more\nusage: {USAGE}")
    for word in words:  # a mistyped path is a mistake and no damage, and is said before hours of hashing
        with contextlib.suppress(DamagedCheckpoint, NewerCheckpoint, OSError):
            checkpoint.read_manifest(place(word))
    rows = [{"path": word, "problems": _problems(place(word))} for word in words]
    lines = [line for row in rows for line in (row["problems"] or [f"{row['path']} is sound"])]
    return rows, lines, int(any(row["problems"] for row in rows))


def _problems(path: Place) -> list[str]:
    """What keeps a checkpoint from being what was saved: its manifest, its sizes, every file's sha256."""
    from parallax import checkpoint
    from parallax.checkpoint.files import check_file

    problems: list[str] = []
    try:
        manifest = checkpoint.read_manifest(path)
        for name in sorted(manifest.files):
            try:
                check_file(manifest, name, thorough=True)
            except CheckpointError as error:
                problems.append(str(error))
    except CheckpointError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename} cannot be read: {error.strerror}")
    return problems


def _diff(words: Sequence[str]) -> tuple[Any, list[str], int]:
    from parallax import checkpoint

    if len(words) != 2:
        raise ConfigError(f"diff takes two checkpoints, got {len(words)}\nusage: {USAGE}")
    left, right = (checkpoint.read_manifest(place(word)) for word in words)
    names = sorted(set(left.tensors) | set(right.tensors))
    width = max(map(len, names), default=0)
    data: dict[str, Any] = {"only": {}, "different": {}}
    lines: list[str] = []
    for name in names:
        if name not in left.tensors or name not in right.tensors:
            data["only"][name] = words[0] if name in left.tensors else words[1]
            lines.append(f"{name:<{width}}  only in {data['only'][name]}")
            continue
        a, b = left.tensors[name], right.tensors[name]
        if a.global_shape != b.global_shape:
            data["different"][name] = {"shapes": [list(a.global_shape), list(b.global_shape)]}
            lines.append(f"{name:<{width}}  {list(a.global_shape)} and {list(b.global_shape)}")
            continue
        count, most, largest = _difference(left, right, name)
        if count or a.dtype != b.dtype:
            relative = most / largest if largest else math.inf if most else 0.0
            row: dict[str, Any] = {"elements": count, "dtypes": [a.dtype, b.dtype]}
            # JSON has no infinity: null, as where a number became NaN.
            row |= {k: v if math.isfinite(v) else None for k, v in (("max_abs", most), ("relative", relative))}
            data["different"][name] = row
            lines.append(f"{name:<{width}}  {count:,} elements, at most {most:.3g} ({relative:.1e})")
    return data, lines or ["the same tensors, bit for bit"], int(bool(lines))


def _difference(left: Manifest, right: Manifest, name: str) -> tuple[int, float, float]:
    """Of a tensor in two checkpoints: how many elements differ, by how much at most, and the largest one on the left.

    Bits are compared, so 0.0 is not -0.0; of other dtypes values.
    """
    import torch
    from torch import Tensor

    from parallax.checkpoint.files import read_global, row_blocks

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def unequal(x: Tensor, y: Tensor) -> Tensor:
        if x.dtype == y.dtype:
            return x.view(bits[x.itemsize]) != y.view(bits[y.itemsize])
        return (x.double() != y.double()) & ~(x.isnan() & y.isnan())

    count, most, largest = 0, 0.0, 0.0
    for box, _ in row_blocks(tuple((0, size) for size in left.tensors[name].global_shape)):
        x, y = read_global(left, name, box), read_global(right, name, box)
        where = unequal(x, y)
        count += int(where.sum())
        if bool(where.any()):
            one, other = x[where].double(), y[where].double()
            apart = (one - other).abs()
            apart[one.isnan() & other.isnan()] = 0.0
            most = max(most, float(torch.where(apart.isnan(), math.inf, apart).max()))
        finite = x.double().abs()[x.isfinite()]
        largest = max(largest, float(finite.max()) if finite.numel() else 0.0)
    return count, most, largest


def _reshard(words: Sequence[str]) -> tuple[Any, list[str], int]:
    from parallax.reshard_command import run_reshard

    return run_reshard(words)


def _prune(words: Sequence[str]) -> tuple[Any, list[str], int]:
    from parallax import checkpoint

    rest, keep, keep_every = _keeps(words)
    directory = _checkpoints(_one(rest, "run"))
    damaged: list[str] = []

    def check(path: Place) -> None:
        if problems := _problems(path):
            damaged.append(f"{path} is damaged, so it stays and does not count: {problems[0]}")
            raise CheckpointError(problems[0])

    # No run may be writing there.
    lock = checkpoint.DirectoryLock(directory) if isinstance(directory, Path) else contextlib.nullcontext()
    with lock:
        gone = checkpoint.prune(directory, keep, keep_every, check=check)
    lines = [f"deleted {path}" for path in gone] or ["nothing to delete"]
    return [str(path) for path in gone], damaged + lines, int(bool(damaged))


def _keeps(words: Sequence[str]) -> tuple[list[str], int, int]:
    """What of prune's words is no key=value, keep, and keep_every."""
    least = {"keep": 1, "keep_every": 0}
    found: dict[str, int] = {}
    rest: list[str] = []
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or "/" in name:
            rest.append(word)
            continue
        if name not in least:
            raise ConfigError(f"prune has no {name}{close_to(name, least) or '; it takes keep=K and keep_every=N'}")
        if name in found:
            raise ConfigError(f"{name} is given twice; keep one")
        if not text.isascii() or not text.isdigit() or int(text) < least[name]:
            raise ConfigError(f"{name}={text}: expected an integer of at least {least[name]}")
        found[name] = int(text)
    if "keep" not in found:
        raise ConfigError(f"prune needs keep=K, how many of the newest stay\nusage: {USAGE}")
    return rest, found["keep"], found.get("keep_every", 0)
