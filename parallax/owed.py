"""What compression keeps from step to step, as a checkpoint holds it.

`owed/NAME` is a tensor of (data ranks, *shape of the parameter): what each rank has not sent of its gradients yet. Only
its sum over the ranks matters to the parameters, so on another number of data ranks n rank r takes over what ranks r,
r + n, r + 2n, ... owed. `warm/NAME`, PowerSGD's factors, owes nothing to anybody: where it does not fit it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parallax.checkpoint import Entry
from parallax.checkpoint.manifest import Manifest
from parallax.data.compress import Part
from parallax.data.feedback import Compressed
from parallax.errors import CheckpointError

if TYPE_CHECKING:
    from parallax.assemble import Run
    from parallax.params import ParamSpec

__all__ = ["OWED", "Loading", "holders", "owed_entries"]

OWED, WARM = "owed/", "warm/"


def owed_entries(run: Run) -> list[Entry]:
    """This rank's part of what compression keeps: nothing without it, or where nobody owes anything."""
    sync = run.sync
    if not isinstance(sync, Compressed):
        return []
    axis, entries = run.mesh.grad, []
    for part, owed in sync.owed() if sync.owes else ():
        spec = part.spec
        shape, box = (axis.size, *spec.global_shape), ((axis.rank, axis.rank + 1), *spec.box)
        entries.append(Entry(f"{OWED}{spec.name}", shape, box, owed[None], holders(run, spec, [axis.rank])))
    return entries + [_warm_entry(run, part, q) for part, q in sync.compressor.warm.items()]


def _warm_entry(run: Run, part: Part, q: Tensor) -> Entry:
    box = ((part.block, part.block + 1), *((0, size) for size in q.shape))
    everyone = range(run.mesh.grad.size)
    return Entry(
        f"{WARM}{part.spec.name}", (part.num_blocks, *q.shape), box, q[None], holders(run, part.spec, everyone)
    )


def holders(run: Run, spec: ParamSpec, places: Sequence[int]) -> tuple[int, ...]:
    """The global ranks that hold the same box of a parameter, of those at these places of mesh.grad."""
    mesh, schedule = run.mesh, run.schedule
    pipeline: Sequence[int] = (mesh.pipeline.rank,)
    if spec.name in {tie.name for tie in run.sync.ties} and run.shards.size == 1:
        pipeline = sorted({schedule.stage_to_rank[0], schedule.stage_to_rank[-1]})
    shape = mesh.shape
    grad = [divmod(place, shape.context) for place in places]
    return tuple(
        sorted(
            shape.rank_at({"pipeline": p, "data": d, "context": c, "tensor": t})
            for p in pipeline
            for d, c in grad
            for t in spec.tensor_ranks
        )
    )


class Loading:
    """What a run takes from a checkpoint for its compression: `entries` to fill, then `finish`.

    leaves: names in the checkpoint that this run knows and has no use for. Raises CheckpointError where the
    checkpoint owes gradients that this run could not pay.
    """

    def __init__(self, run: Run, manifest: Manifest) -> None:
        self.sync = run.sync if isinstance(run.sync, Compressed) else None
        self.entries: list[Entry] = []
        self._then: list[Callable[[], object]] = []
        self.owes = any(name.startswith(OWED) for name in manifest.tensors)
        if self.owes and self.sync is None:
            raise CheckpointError(
                f"{manifest.path} has gradients in {OWED}* that its ranks still owe, from data.compression="
                f"{manifest.state.get('config', {}).get('data', {}).get('compression')}, and this run would lose them; "
                "set data.compression as it was, or data.compression=topk data.compression_ratio=1 until the next "
                "checkpoint: that pays all"
            )
        if self.sync is not None:
            self._take_owed(run, self.sync, manifest)
            self._take_warm(run, self.sync, manifest)
        taken = {entry.name for entry in self.entries}
        self.leaves = sorted(name for name in manifest.tensors if name.startswith(WARM) and name not in taken)

    def _take_owed(self, run: Run, sync: Compressed, manifest: Manifest) -> None:
        axis = run.mesh.grad
        for part, owed in sync.owed() if self.owes else ():
            name = f"{OWED}{part.spec.name}"
            saved = manifest.tensors.get(name)
            num_saved = saved.global_shape[0] if saved is not None and saved.global_shape else axis.size
            shape = (num_saved, *part.spec.global_shape)
            found = [torch.empty_like(owed) for _ in range(axis.rank, num_saved, axis.size)]
            for rank, tensor in zip(range(axis.rank, num_saved, axis.size), found, strict=True):
                self.entries.append(
                    Entry(name, shape, ((rank, rank + 1), *part.spec.box), tensor[None], (run.mesh.rank,))
                )
            self._then.append(lambda owed=owed, found=found: _add_up(owed, found))  # type: ignore[misc]

    def _take_warm(self, run: Run, sync: Compressed, manifest: Manifest) -> None:
        for part, q in sync.compressor.warm.items():
            entry = _warm_entry(run, part, torch.empty_like(q))
            saved = manifest.tensors.get(entry.name)
            if saved is not None and saved.global_shape == entry.global_shape:
                self.entries.append(entry)
                self._then.append(lambda q=q, new=entry.tensor: q.copy_(new[0]))  # type: ignore[misc]

    def finish(self) -> None:
        """The entries are filled: take them over. What the run owed before is forgotten."""
        if self.sync is not None:
            self.sync.reset(owes=self.owes)
            for then in self._then:
                then()


def _add_up(owed: Tensor, found: Sequence[Tensor]) -> None:
    """In rank order; a single one bit for bit."""
    if not found:
        owed.zero_()
        return
    owed.copy_(found[0])
    for tensor in found[1:]:
        owed.add_(tensor)
