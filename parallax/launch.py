"""How a program ends: bad input in one line, a crash with its mesh coordinates, and no rank left waiting."""

from __future__ import annotations

import atexit
import os
import re
import sys
import time
import traceback
from collections.abc import Callable

from parallax import comm
from parallax.errors import GRACE_S, ParallaxError, report

__all__ = ["entrypoint"]

PEER_IS_GONE = re.compile(
    r"gloo.*(Connection (reset|closed) by peer|Broken pipe)|NCCL.*remote process exited", re.DOTALL
)
"""What a collective says when the rank at its other end has died; any other lost connection is an error of its own."""


def entrypoint(main: Callable[[], None]) -> None:
    """Run a program's main under torchrun or alone, then exit: 0, or as below.

    A ParallaxError is raised alike on every rank: rank 0 prints it in one line, all exit with 2, and torchrun adds
    its summary; one that a single rank has, which prints it, ends the others too. Any other exception is one rank's:
    it prints the traceback with its rank and exits with 1, and torchrun, which gets the traceback through its error
    file, ends the others within seconds.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        if error := record(_labelled(main))():
            report(error)
            _leave(2)
    except Exception:  # noqa: BLE001 - already printed
        _leave(1)
    comm.close()
    atexit._run_exitfuncs()
    _leave(0)


def _labelled(main: Callable[[], None]) -> Callable[[], ParallaxError | None]:
    """main, which returns an error of the user's making: torchrun would show what it is given with a traceback."""

    def run() -> ParallaxError | None:
        try:
            main()
        except ParallaxError as error:
            return error
        except Exception as error:
            me = f"[rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}]"
            if PEER_IS_GONE.search(str(error)):
                # Not the cause: let the launcher see the rank that is, and end this one, before it reports a second.
                reason = str(error).splitlines()[0]
                print(f"{me} stops, since another rank is gone: {reason}", file=sys.stderr, flush=True)
                time.sleep(GRACE_S)
            else:
                print(f"{me} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            raise
        return None

    return run


def _leave(code: int) -> None:
    """Exit without the interpreter's tidy end: after a failure the process groups' destructors would wait for peers,
    and even after success a gloo thread that is still there has been seen to abort a run that had done all its work."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
