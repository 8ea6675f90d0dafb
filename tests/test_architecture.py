"""The house rules of CONTRIBUTING.md, enforced on the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "parallax").rglob("*.py"))
EVERYTHING = SOURCES + sorted((ROOT / "recipes").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.py"))

# Who may import whom, lowest first: a room may import rooms of lower rank, never a sibling of its own.
RANK = {
    "errors": 0,
    "rng": 0,
    "version": 0,
    "plain_files": 0,
    "plain_json": 0,
    "arguments": 1,
    "allocator": 0,
    "processor": 0,
    "transfer": 0,
    "compiled": 1,
    "shared_memory": 1,
    "mesh": 2,
    "params": 2.5,
    "gradients": 2.5,
    "comm": 3,
    "config_fields": 3,
    "config_names": 4,
    "pipeline.schedule": 3,
    "pipeline.v_schedules": 4,
    "pipeline.schedules": 5,
    "pipeline.lower": 5,
    "pipeline.validate": 4,
    "pipeline.simulate": 4,
    "pipeline.split": 4,
    "pipeline.table": 6,
    "pipeline.draw": 6,
    "pipeline.search": 6,
    "pipeline.join": 5,
    "models.costs": 8.5,
    "models.memory": 9,
    "stage_plan": 10,
    "config_batch": 4,
    "config_hf": 7,
    "config_rules": 7,
    "config": 8,
    "config_io": 9,
    "corpus": 9,
    "batches": 10,
    "tensor": 10,
    "pipeline": 10,
    "precision": 10,
    "data": 10,
    "checkpoint": 10,
    "optimizers": 11,
    "models": 11,
    "replicas": 11,
    "owed": 11,
    "saved_state": 11,
    "same_run": 11,
    "postmortem": 11,
    "step": 12,
    "assemble": 13,
    "wrap_rules": 12.2,
    "wrap_backward": 12.3,
    "wrap_watch": 12.3,
    "wrap_left_out": 12.3,
    "wrap_state": 12.4,
    "wrap_optimizer": 12.5,
    "wrap": 13,
    "arrays": 13,
    "metrics": 13,
    "output": 14,
    "resume": 15,
    "trace": 14,
    "memory": 4,
    "memory_report": 14,
    "stop": 1,
    "launch": 4,
    "parity": 16,
    "schedule_command": 16,
    "reshard_command": 15,
    "checkpoint_command": 16,
    "verify_resume": 17,
    "bench_command": 17,
    "cli": 18,
}
NO_TORCH = ["parallax.pipeline.schedule", "parallax.pipeline.schedules", "parallax.pipeline.lower"]
NO_TORCH += ["parallax.pipeline.simulate", "parallax.pipeline.validate", "parallax.pipeline.split"]
NO_TORCH += ["parallax.pipeline.v_schedules", "parallax.pipeline.table", "parallax.pipeline.draw"]
NO_TORCH += ["parallax.pipeline.search", "parallax.pipeline.join", "parallax.stage_plan", "parallax.schedule_command"]
NO_TORCH += ["parallax.mesh", "parallax.config", "parallax.config_io", "parallax.config_hf", "parallax.corpus"]
COLLECTIVES = re.compile(
    r"\bdist\.(all_reduce|all_gather\w*|reduce_scatter\w*|all_to_all\w*|broadcast\w*|i?send|i?recv|"
    r"batch_isend_irecv|barrier|scatter\w*|gather\w*|P2POp)\b"
)


def _room(module: str) -> str:
    """`parallax.tensor.layers` -> `tensor`; the pure files of the pipeline stand for themselves."""
    name = module.removeprefix("parallax.")
    return name if name in RANK else name.split(".")[0]


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("parallax"):
            if node.module == "parallax":
                found += [f"parallax.{alias.name}" for alias in node.names]
            else:
                found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("parallax")]
    return found


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _typing_only(path: Path) -> set[str]:
    """Modules imported under TYPE_CHECKING: no arrow at run time."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found |= {n.module for n in node.body if isinstance(n, ast.ImportFrom) and n.module}
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__init__.py"], ids=_module)
def test_arrows_point_down(path: Path):
    room = _room(_module(path))
    for module in set(_imports(path)) - _typing_only(path):
        other = _room(module)
        assert other == room or RANK[other] < RANK[room], f"{_module(path)} may not import {module}"


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path):
    text = path.read_text()
    assert text.count("\n") <= 400, "a file is one concept, in 400 lines at most"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"
        assert not isinstance(node, ast.Global), "no global state"


def test_the_recipe_is_read_in_one_sitting():
    assert (ROOT / "recipes/gpt.py").read_text().count("\n") <= 120


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_collectives_live_in_comm_and_transport(path: Path):
    # shared_memory finds out over sockets who shares what.
    if _module(path) in ("parallax.comm", "parallax.pipeline.transport", "parallax.shared_memory"):
        return
    assert not COLLECTIVES.search(path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_no_pickle(path: Path):
    assert not re.search(r"\bpickle\b(?!d)(?!\.)|torch\.(save|load)\b|object_list|gather_object", _code(path))


def _code(path: Path) -> str:
    """The source without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def test_pure_modules_import_no_torch():
    code = f"import sys, {', '.join(NO_TORCH)}\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_running_a_stage_imports_neither_dtensor_nor_torch_pipelining():
    code = (
        "import sys, parallax.assemble, parallax.resume, parallax.metrics\n"
        "slow = [m for m in ('torch.distributed.tensor', 'torch.distributed.pipelining') if m in sys.modules]\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_forbidden_names():
    for path in SOURCES:
        assert path.stem not in {"utils", "helpers", "common", "engine", "manager", "misc"}


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_linters(command: list[str]):
    tool = Path(sys.executable).parent / command[0]
    if not tool.exists():
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([str(tool), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
