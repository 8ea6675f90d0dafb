"""The `parallax` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

from parallax.errors import DamagedCheckpoint, ParallaxError

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
    """Train on two or more meshes and compare the loss and gradient norm of every step."""
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
    """How fast this machine trains a configuration on some meshes, beside its own products of matrices."""
    from parallax.bench_command import run_bench

    return run_bench(argv)


def verify_resume(argv: Sequence[str]) -> int:
    """Train 2N steps, and N, a restart, and N more, on the same mesh and on another, and compare all of it."""
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


def usage() -> str:
    lines = ["usage: parallax COMMAND [key=value ...]", ""]
    for name, (function, arguments) in COMMANDS.items():
        lines += [f"  {name} {arguments}", f"      {(function.__doc__ or '').splitlines()[0]}"]
    lines += ["", "  parallax COMMAND --help says more; training itself is recipes/gpt.py"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A ParallaxError is one line on stderr, and 2; 1 for a checkpoint that is
    not what was saved.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"error: there is no command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    function, arguments_text = COMMANDS[name]
    if name == "schedule" and ("--help" in rest or "-h" in rest):
        from parallax.schedule_command import USAGE

        print(f"usage: {USAGE}")
        return 0
    if name != "checkpoint" and ("--help" in rest or "-h" in rest):
        from parallax.config_io import help_text

        keys = help_text().partition("\n\n")[2]
        print(f"usage: parallax {name} {arguments_text}\n{function.__doc__}\n\n{keys}", end="")
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
