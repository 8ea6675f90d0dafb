"""Runs a function, or a script, in a process with the simulated device.

python -m tests.simulated.run LIBRARY call MODULE:FUNCTION JSON     prints the result as JSON on the last line
python -m tests.simulated.run LIBRARY script PATH [ARGUMENT ...]

The function is called with the device and the arguments of the JSON list.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
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


if __name__ == "__main__":
    main()
