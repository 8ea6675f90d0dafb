"""What the kernel saw of a save, and what Python saw of a load."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SAVE = """
from pathlib import Path
from parallax import checkpoint
from tests.local.exchange import together
from tests.local.test_checkpoint import cut_rows, tensor
whole = tensor((4000, 300))
together(2, lambda x: checkpoint.save(Path({path!r}) / "run/checkpoints", 1, cut_rows(whole, 2, x.rank), {{}}, x))
"""
LINE = re.compile(r"^\d+ +(openat|write|fsync|rename|renameat2?|close)\((.*)\) += (-?\d+)", re.M)


def calls_of(code: str, folder: Path) -> list[tuple[str, str, int]]:
    """(system call, its arguments, its result) in the order in which they ended."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = folder / "log"
    command = ["strace", "-f", "-o", str(log), "-e", "trace=openat,write,fsync,rename,renameat,renameat2,close"]
    done = subprocess.run([*command, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if "ptrace" in done.stderr.lower():
        pytest.skip("this machine does not let a process be traced")
    assert done.returncode == 0, done.stderr
    text = log.read_text()
    # A call that another thread's interrupts is told in two lines.
    begun: dict[str, str] = {}
    lines = []
    for line in text.splitlines():
        pid = line.split(maxsplit=1)[0]
        if line.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>").rstrip()
        elif "resumed>" in line:
            lines.append(begun.pop(pid, pid + " ") + line.partition("resumed>")[2])
        else:
            lines.append(line)
    return [(name, what, int(result)) for name, what, result in LINE.findall("\n".join(lines))]


def test_every_byte_is_on_disk_before_the_rename(tmp_path: Path):
    """Of each file in the new directory the last write comes before its fsync, that before the rename; the directories
    around it are synced in their turn.
    """
    files: dict[int, str] = {}
    state: dict[str, str] = {}
    order: list[str] = []
    for name, what, result in calls_of(SAVE.format(path=str(tmp_path)), tmp_path):
        quoted = re.findall(r'"([^"]*)"', what)
        number = int(what.split(",")[0]) if re.match(r"\d+\b", what) else -1
        if name == "openat" and result >= 0 and quoted[0].startswith(str(tmp_path)):
            files[result] = quoted[0]
        elif name == "write" and number in files:
            state[files[number]] = "written"
        elif name == "fsync" and number in files:
            state[files[number]] = "synced"
            order.append(f"fsync {files[number]}")
        elif name.startswith("rename"):
            order.append(f"rename {quoted[0]} {quoted[1]}")
            inside = {path: how for path, how in state.items() if path.startswith(quoted[0])}
            assert len(inside) == 4, "two shards, the manifest, the directory"
            assert set(inside.values()) == {"synced"}, inside
        elif name == "close":
            files.pop(number, None)
    target = str(tmp_path / "run/checkpoints/step-00000001")
    assert order[-2].startswith("rename") and order[-2].endswith(target)
    assert order[-1] == f"fsync {tmp_path / 'run/checkpoints'}"
    assert {f"fsync {tmp_path}", f"fsync {tmp_path / 'run'}"} <= set(order), "new directories have names to lose, too"


AUDIT = """
import sys
from pathlib import Path
from parallax.resume import Checkpoints
from parallax.checkpoint.hf_export import export_hf
from tests.cases import GPT2, TIED, advance, start
small = GPT2 | TIED | {{"model.layers": 2, "output": {path!r}}}
run, state = start("1x1x1", **small)
advance(run, state, 1)
path = Checkpoints(run, Path({path!r})).save(state)
export_hf(path, Path({path!r}) / "hf-out")
both = ({{"resume": str(path)}}, {{"init_from": {path!r} + "/hf-out"}})
runs = [start("1x1x1", **small | how) for how in both]
seen = []
wrong = ("pickle", "exec", "os.system", "os.posix_spawn", "subprocess", "ctypes.dlopen", "socket.connect", "marshal")
def hook(event, args):
    if event.startswith(wrong):
        seen.append((event, str(args)[:200]))
    if event == "open" and isinstance(args[0], str) and args[0].startswith("/etc"):
        seen.append((event, args[0]))
sys.addaudithook(hook)
Checkpoints(runs[0][0], Path({path!r})).resume(runs[0][1])
Checkpoints(runs[1][0], Path({path!r})).begin(runs[1][1])
assert runs[0][1].step == 1
assert not seen, seen
import pickle
pickle.loads(pickle.dumps(Path))
exec("1")
assert len(seen) >= 2, "the hook works"
"""


def test_no_load_runs_code(tmp_path: Path):
    """Neither of a checkpoint nor of a Hugging Face directory: no pickle, no exec, no process, no connection."""
    done = subprocess.run(
        [sys.executable, "-c", AUDIT.format(path=str(tmp_path))], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
