"""The `parallax` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from parallax.arguments import close_to
from parallax.errors import DamagedCheckpoint, ParallaxError, printable
from parallax.version import version

__all__ = ["COMMANDS", "main"]


def check(argv: Sequence[str]) -> int:
    """What a configuration would run, without running it: mesh, batch, stages, and that its schedule ends."""
    from parallax.config import resolve_batch
    from parallax.config_io import load
    from parallax.stage_plan import plan_stages

    config = load(argv)
    plan = plan_stages(config)
    print(f"mesh {config.mesh_shape.describe()}")
    print(resolve_batch(config).equation)
    print(plan.describe())
    print("the schedule is complete and ends on an ordered wire")
    return 0


def parity(argv: Sequence[str]) -> int:
    """Train on two or more meshes and compare the loss and gradient norm of every step.

    Exit code: 0 where all agree to what rounding explains for the dtype, 1 where they do not. Nothing is written.
    """
    from parallax.parity import run_parity

    return run_parity(argv)


def schedule(argv: Sequence[str]) -> int:
    """List pipeline schedules, show one as text, SVG or trace, export one as a table."""
    from parallax.schedule_command import run_schedule

    return run_schedule(argv)


def checkpoint(argv: Sequence[str]) -> int:
    """Look at checkpoints, check, compare and thin them out."""
    from parallax.checkpoint_command import run_checkpoint

    return run_checkpoint(argv)


def bench(argv: Sequence[str]) -> int:
    """How fast this machine trains a configuration on some meshes, beside its own products of matrices.

    Without mesh=: one rank, and along each axis as many as there are cores, or GPUs (the power of two that is not
    more). Each mesh trains 2 steps to warm up and then the steps that are timed. Nothing is written. The columns:
      step            the median of the timed steps
      tokens/s        of the global batch, in such a step
      GFLOP/s         of all ranks together: the model's products of matrices, a backward being twice a forward
      of products     that, as a share of what all ranks at once reach in nothing but products of the MLP's sizes
      peak of a rank  the most memory that a rank has held
    """
    from parallax.bench_command import run_bench

    return run_bench(argv)


def verify_resume(argv: Sequence[str]) -> int:
    """Train 2N steps, and N, a restart, and N more, on the same mesh and on another, and compare all of it.

    N is steps. On the first mesh every loss, norm and tensor must be equal bit for bit, on the second, which restarts
    from the checkpoint of the first, they must agree to rounding. Exit code: 0 where the restart shows nowhere, else 1.
    It makes its checkpoints in a place of its own and takes no output=, resume= or checkpoint.*.
    """
    from parallax.verify_resume import run_verify_resume

    return run_verify_resume(argv)


COMMANDS: Mapping[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "check": (check, "[config=FILE.yaml] [key=value ...]"),
    "checkpoint": (checkpoint, "ls | show | verify | diff | prune | reshard | export ..."),
    "parity": (parity, "mesh=1x1x1 mesh=2x2x2 [key=value ...]"),
    "bench": (bench, "[mesh=1x1x1] [mesh=2x1x1] [steps=N] [key=value ...]"),
    "verify-resume": (verify_resume, "[mesh=2x1x1] [mesh=1x2x2] [steps=N] [key=value ...]"),
    "schedule": (schedule, "list | show NAME | export NAME FILE.csv [pipeline=4 num_microbatches=8 ...]"),
}

MESHES = {
    "parity": ("parity", "none: give two or more"),
    "bench": ("bench_command", "one rank, and all cores or GPUs along each axis"),
    "verify-resume": ("verify_resume", "1x1x1; a second one takes up what the first has saved"),
}
"""The commands that train on meshes: their module, and their default."""


def help_of(name: str) -> str:
    """What `parallax NAME --help` says, of a command that takes the recipe's keys."""
    from importlib import import_module
    from inspect import cleandoc

    from parallax.config_io import help_text

    function, arguments = COMMANDS[name]
    defaults: dict[str, str] = {}
    if name in MESHES:
        steps = import_module(f"parallax.{MESHES[name][0]}").DEFAULT_STEPS
        defaults = {"mesh": MESHES[name][1], "steps": str(steps)}
    keys = help_text(defaults).partition("\n\n")[2]
    return f"usage: parallax {name} {arguments}\n{cleandoc(function.__doc__ or '')}\n\n{keys}"


def usage() -> str:
    lines = ["usage: parallax COMMAND [key=value ...]", ""]
    for name, (function, arguments) in COMMANDS.items():
        lines += [f"  {name} {arguments}", f"      {(function.__doc__ or '').splitlines()[0]}"]
    lines += [
        "",
        "  parallax COMMAND --help says more, parallax --version which it is; training itself is recipes/gpt.py",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A ParallaxError is one line on stderr, and 2; 1 for a checkpoint that is
    not what was saved.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"parallax {version()}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        hint = close_to(name, (*COMMANDS, "--version", "--help")) or f"; there are {', '.join(COMMANDS)}"
        print(printable(f"error: there is no command {name}{hint}; parallax --help tells more"), file=sys.stderr)
        return 2
    function = COMMANDS[name][0]
    if name == "schedule" and ("--help" in rest or "-h" in rest):
        from parallax.schedule_command import USAGE

        print(f"usage: {USAGE}")
        return 0
    if name != "checkpoint" and ("--help" in rest or "-h" in rest):
        print(help_of(name), end="")
        return 0
    try:
        code = function(rest)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ParallaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DamagedCheckpoint) else 2
