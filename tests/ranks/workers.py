"""Runs a function on n gloo ranks: workers forked from a server that has torch imported, so that 8 start in a fraction
of a second. Rendezvous is by file, no ports. Every rank's traceback comes back; all are killed on a time-out."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

# torch.optim imports torch._dynamo when the first optimizer is made: two seconds for each rank of each test.
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "numpy", "hypothesis", "pytest", "parallax.assemble"]
PRELOAD += ["parallax.step", "parallax.resume", "parallax.wrap", "parallax.config_io"]


class RankFailure(AssertionError):
    """What went wrong on the ranks, every traceback in rank order."""


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _worker(function: Callable[..., Any], args: tuple[Any, ...], rank: int, size: int, folder: str, pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    store = torch.distributed.FileStore(os.path.join(folder, "store"), size)
    from parallax import comm

    try:
        if size > 1:
            os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
        # Plain pickle: multiprocessing would share tensors through files that end with this process.
        pipe.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:  # noqa: BLE001 - whatever it is, it goes back to the test
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        pipe.close()
        os._exit(1)  # peers may wait for this rank: do not stay for a tidy end
    comm.close()


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """Run function(*args) on `size` ranks; returns what each rank returned, in rank order.

    function: importable (top level of a test module); it calls `init_mesh` itself. Raises RankFailure with every rank's
    traceback as soon as one fails, or on the time-out.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(function, args, rank, size, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def over_sockets(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) on ranks that share no memory, where collectives are still under way when they have begun."""
    os.environ["PARALLAX_SHARED_MEMORY"] = "0"
    return function(*args)


def _collect(pipes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(pipes):
        open_pipes = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results and rank not in failures}
        # After a failure the others get a moment to fail too, so that the first cause is among what is shown.
        wait = min(deadline - time.monotonic(), 2.0 if failures else float("inf"))
        ready = multiprocessing.connection.wait(list(open_pipes), max(0.0, wait))
        if not ready:
            missing = sorted(open_pipes.values())
            if not failures:
                failures = {rank: "no answer before the time-out" for rank in missing}
            break
        for pipe in ready:
            rank = open_pipes[pipe]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, value = False, "the process ended without a word"
            (results if ok else failures)[rank] = value
    if failures:
        ranks_of: dict[str, list[int]] = {}
        for rank, text in sorted(failures.items()):
            ranks_of.setdefault(text, []).append(rank)
        raise RankFailure("\n".join(f"--- ranks {where}\n{text}" for text, where in ranks_of.items()))
    return [results[rank] for rank in range(len(pipes))]
