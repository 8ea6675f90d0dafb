"""What one training step asks of a GPU, counted without one: parallax beside a plain torch loop.

    python benchmarks/kernels.py [model=124M] [batch=8] [dtype=bfloat16] [append=FILE]

The step runs on a simulated device (tests/simulated), which needs a torch without CUDA and a C++ compiler. Counted are
the kernels it would launch, the bytes they touch (each operand and result once: rows that are gathered count as the
whole), and how often the host waits for the device. A GPU's time is neither: it is what benchmarks/gpu.py measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", ATTENTION, f"{ATTENTION}_backward"}
OF_NO_KERNEL = {"detach", "resize_", "lift_fresh", "set_", "_unsafe_view"}


def count(device: Any, who: str, model: str, size: int, dtype: str) -> dict[str, Any]:
    """Of the second step, in a process with the device."""
    import torch
    from gpu import MODELS, batch_of, ours, plain
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    kernels: Counter[str] = Counter()
    touched: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = op(*args, **(kwargs or {}))
            name = op._schema.name.removeprefix("aten::")
            if name in OF_NO_KERNEL or name.startswith(("empty", "new_empty")) or _views(op):
                return result
            given = [] if name in ("zero_", "fill_", "zeros_like", "ones_like") else tree_leaves((args, kwargs))
            tensors = {id(t): t for t in [*given, *tree_leaves(result)] if isinstance(t, torch.Tensor)}
            kernels[name] += 1
            touched[name] += sum(t.numel() * t.element_size() for t in tensors.values())
            if name == "softmax" and args[0].dtype == torch.bfloat16:  # widened first, unseen from here
                touched[name] += 2 * result.numel() * result.element_size()
            return result

    torch.manual_seed(0)
    where = torch.device("cuda")
    step, weights, _ = ours(MODELS[model], size, dtype, where)
    if who != "parallax":
        step = plain(MODELS[model], weights, dtype, where, False)
    step(*batch_of(MODELS[model], size, 0, where))
    data = batch_of(MODELS[model], size, 1, where)
    waited, launched = device.waits, device.kernels()
    with Counting():
        loss = step(*data)
    waits, launched = device.waits - waited, device.kernels() - launched
    return {
        "loss": float(loss),
        "kernels": sum(launched.values()),
        "bytes": sum(touched.values()),
        "apart": sum(count for name, count in touched.items() if name not in PRODUCTS),
        "waits": waits,
        "most": [(name, kernels[name], size) for name, size in touched.most_common(8)],
    }


def _views(op: Any) -> bool:
    """Whether its results are views: no kernel."""
    returns = op._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    from gpu import DTYPES, MODELS
    from harness import asked, count, machine, one_of, text

    from tests.simulated.device import build, why_not

    wish = asked(
        {
            "model": ("124M", one_of(*MODELS)),
            "batch": ("8", count),
            "dtype": ("bfloat16", one_of(*DTYPES)),
            "append": (None, text),
        },
        sys.argv[1:],
    )
    model, size, dtype = wish.model, wish.batch, wish.dtype
    if reason := why_not():
        raise SystemExit(f"not counted: {reason}")
    said = [f"{model}, {dtype}, batch {size}; {machine()}", ""]
    said += ["| who | kernels | GB touched | of it not products | the host waits | loss |", "|" + "---|" * 6]
    print("\n".join(said), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "device.so"
        build(library)
        for who in ("parallax", "torch"):
            line = [sys.executable, "-m", "tests.simulated.run", str(library), "call", "kernels:count"]
            line.append(json.dumps([who, model, size, dtype]))
            environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}"}
            done = subprocess.run(line, cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            row = f"| {who} | {found['kernels']} | {found['bytes'] / 1e9:.1f} | {found['apart'] / 1e9:.1f} |"
            row += f" {found['waits']} | {found['loss']:.4f} |"
            most = ", ".join(f"{name} {bytes_ / 1e9:.2f} GB in {n}" for name, n, bytes_ in found["most"])
            print(f"{row}\n{who}: {most}", flush=True)
            said.append(row)
    if wish.append:
        with open(wish.append, "a") as file:
            print("\n" + "\n".join(said), file=file)


if __name__ == "__main__":
    main()
