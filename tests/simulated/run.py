"""Runs a function, or a script, in a process with the simulated device.

python -m tests.simulated.run LIBRARY call MODULE:FUNCTION JSON     prints the result as JSON on the last line
python -m tests.simulated.run LIBRARY script PATH [ARGUMENT ...]

The function is called with the device and the arguments of the JSON list. The process ends without Python's finalizers:
autograd's device thread may still be letting go of what it holds, which ends a process that has finalized half.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

from tests.simulated.device import install


def main() -> None:
    library, kind, target, *rest = sys.argv[1:]
    device = install(Path(library))
    from tests.simulated import nccl

    nccl.install()
    if kind == "script":
        sys.argv = [target, *rest]
        runpy.run_path(target, run_name="__main__")
        return
    module, _, name = target.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(device, *json.loads(rest[0]))), flush=True)


def ended() -> int:
    """The exit status of `main`, whose errors are shown."""
    try:
        main()
    except SystemExit as wish:
        if isinstance(wish.code, str):
            print(wish.code, file=sys.stderr)
        return wish.code if isinstance(wish.code, int) else int(wish.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = ended()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
