"""Has a stage's parameters in memory when its modules use them, though each rank owns only a part of every bucket.

A block is what is gathered together: a layer of the transformer, the embedding, the head; in any other model each child
of a ModuleList, ModuleDict or Sequential that has a forward. What belongs to no block, or is used outside of its own,
is needed as long as the stage runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from parallax.comm import Pending, all_gather_start
from parallax.data.buckets import FlatBuffers
from parallax.data.layout import Bucket
from parallax.gradients import GradSink
from parallax.mesh import Axis

__all__ = ["Gather", "Hook", "block_of", "find_blocks"]


SAME_BLOCKS = "With zero=3 all ranks must run the same blocks: else use gather=step or zero=2"


def find_blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every block; a class with `is_block = True` is one too."""
    holds_blocks = isinstance(model, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    for name, child in model.named_children():
        # What has no forward, as a list in a list, is never called, and its hooks would never run.
        called = getattr(child.forward, "__func__", None) is not nn.Module.forward
        if called and (holds_blocks or getattr(child, "is_block", False)):
            yield prefix + name, child
        else:
            yield from find_blocks(child, f"{prefix}{name}.")


def block_of(model: nn.Module) -> dict[nn.Parameter, str | None]:
    """The block that alone uses each parameter; None for what more than one uses, or a module in no block."""
    blocks = {block: name for name, block in find_blocks(model)}
    users: dict[nn.Parameter, set[str | None]] = {}
    block, inside = None, ""
    for path, module in model.named_modules(remove_duplicate=False):  # a module may have several places
        if block is None or not path.startswith(inside):
            block, inside = blocks.get(module), path + "."
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, set()).add(block)
    return {parameter: found.pop() if len(found) == 1 else None for parameter, found in users.items()}


class Hook:
    """A hook of a Gather on a module. Copies of the module have a copy of it, which does nothing: their parameters are
    their own and whole, and one rank alone may call them. torch.compile leaves it alone, where that is about.
    """

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        dynamo = sys.modules.get("torch._dynamo")  # two seconds to import, and who compiles has it
        self._call = dynamo.disable(call) if dynamo is not None and call is not None else call

    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook()

    def __reduce__(self) -> Any:
        return Hook, ()


class Gather:
    """Gathers one stage's buckets over `axis`.

    Level 1 and 2: `publish` begins the gathering of every bucket, in order of use, and a block waits for its own
    just before it runs. Level 3: a block's bucket is gathered before its forward and again before its backward, while
    the one before it computes, and dropped when another block has begun; with `keep` it stays from the first use to
    `reshard`. Volume: (n-1)/n of the parameters' bytes for each gathering. Blocks are gathered as they run, so without
    `keep` all ranks must run the same ones: RuntimeError from the collective where they do not.
    """

    def __init__(self, model: nn.Module, flat: FlatBuffers, axis: Axis, sink: GradSink | None, keep: bool) -> None:
        self.flat, self.axis, self.sink, self.keep = flat, axis, sink, keep
        self._order = list(reversed(flat.early))
        self._pending: dict[Bucket, Pending] = {}
        self._resident: list[Bucket] = []
        self._holds = 0
        self._held: dict[Bucket, None] = {}  # whole for `hold` alone
        self._kept: list[Bucket] = []  # whole after it too
        self._running: set[Bucket] = set()  # in their forward
        self._owing: dict[Bucket, set[nn.Parameter]] = {}  # in their backward: what has no gradient yet
        bucket_of = {p.parameter: b for b in flat.early for p in b.placed}
        blocks = block_of(model)
        root = {bucket_of[p] for p, block in blocks.items() if block is None and p in bucket_of}
        # Here and below: before the hooks that are there already, which may read weights, as weight_norm's does.
        begin = Hook(lambda module, args: self._begin(module, root))
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(begin, prepend=True)]
        for block in dict.fromkeys(block for _, block in find_blocks(model)):
            buckets = list(dict.fromkeys(bucket_of[p] for p in block.parameters() if p in bucket_of))
            if buckets:
                self._watch(block, buckets)

    def _watch(self, block: nn.Module, buckets: list[Bucket]) -> None:
        if self.flat.level < 3:
            wait = Hook(lambda module, args: self._wait(buckets))
            self._handles.append(block.register_forward_pre_hook(wait, prepend=True))
            return
        (bucket,) = buckets
        if self.sink is not None:
            self.sink.through_autograd = True
        before = Hook(lambda module, args: self._before_forward(bucket))
        after = Hook(lambda module, args, output: self._after_forward(bucket, output))
        self._handles.append(block.register_forward_pre_hook(before, prepend=True))
        self._handles.append(block.register_forward_hook(after))
        for placed in bucket.placed:
            hook = placed.parameter.register_post_accumulate_grad_hook(lambda p: self.accumulated(bucket, p))
            self._handles.append(hook)

    def remove(self) -> None:
        """Take the hooks off: nothing is gathered any more."""
        for handle in self._handles:
            handle.remove()

    # --- the whole stage ------------------------------------------------------------------------

    def _begin(self, model: nn.Module, root: Iterable[Bucket]) -> None:
        """The stage's forward begins: no backward is under way."""
        self._owing.clear()
        self.unshard()
        self._wait(root)
        if self._holds and model.training and torch.is_grad_enabled():  # a rank alone may evaluate within a hold
            self._kept = self._needed()

    def unshard(self) -> None:
        """Gather what no block holds; with `keep` begin to gather all."""
        if self.flat.level == 3:
            for bucket in [b for b in self.flat.buckets if b.late] + (self._order if self.keep else self._order[:1]):
                self._start(bucket)
        late = self.flat.late
        self._wait([late] if late else [])

    def reshard(self) -> None:
        """Drop what level 3 has gathered."""
        if self.flat.level == 3:
            for bucket in list(self._resident):
                self._drop(bucket)
            self._running.clear()
            self._owing.clear()

    def publish(self) -> None:
        """This rank's parameters have changed: send them to those that hold copies."""
        if self.flat.level == 3:
            self.reshard()
            self._kept = []
            for bucket in self._held:
                self._gather(bucket)
        else:
            self._wait(list(self._pending))
            late = self.flat.late
            for bucket in ([late] if late else []) + self._order:
                self._gather(bucket)
        if self._holds:
            self.gather_all()

    def gather_all(self) -> None:
        """Return when what is under way has come: below level 3, or within `hold`, every parameter is whole then."""
        self._wait(list(self._pending))

    def hold(self) -> None:
        """Return when every parameter is whole, and keep all so until as many `release` as `hold`."""
        self._holds += 1
        if self._holds == 1:
            self._kept = self._needed()
        for bucket in self.flat.buckets if self.flat.level == 3 else ():
            if bucket not in self._resident and bucket not in self._held:
                self._held[bucket] = None
                self._gather(bucket)
        self.gather_all()

    def release(self) -> None:
        """The end of a `hold`. What somebody wrote is lost at level 3, so what a backward still needs comes anew."""
        self._holds -= 1
        if self._holds or self.flat.level < 3:
            return
        self.reshard()
        while self._held:
            self.flat.drop(self._held.popitem()[0])
        for bucket in self._kept:
            self._start(bucket)
        self._wait(self._kept)

    def _needed(self) -> list[Bucket]:
        """What a backward reads that no hook of its own brings: it must stay from the forward on."""
        return [bucket for bucket in self._resident if bucket.late or self.keep]

    # --- one block ------------------------------------------------------------------------------

    def _before_forward(self, bucket: Bucket) -> None:
        # In a backward this is a recomputation, and what comes next lies the other way.
        self._enter(bucket, 0 if bucket in self._owing else 1)
        self._running.add(bucket)

    def _after_forward(self, bucket: Bucket, output: Any) -> None:
        self._running.discard(bucket)
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:  # a leaf would keep the hook for good
                tensor.register_hook(lambda grad: self._before_backward(bucket))

    def _before_backward(self, bucket: Bucket) -> None:
        if bucket in self._owing:  # the block has more than one output
            return
        self._enter(bucket, -1)
        self._owing[bucket] = {p.parameter for p in bucket.placed if p.parameter.requires_grad}

    def accumulated(self, bucket: Bucket, parameter: nn.Parameter) -> None:
        """A parameter has its gradient of this backward."""
        if bucket in self._owing:
            self._owing[bucket].discard(parameter)

    def _enter(self, bucket: Bucket, direction: int) -> None:
        """A block begins: gather it, begin the one that comes next, drop those that are done."""
        # In an input-gradient pass the weight gradients come later, and need no weights.
        kept = self.sink is not None and self.sink.keeping
        for other in list(self._resident):
            done = kept or not self._owing.get(other)
            used = other is bucket or other.late or other in self._running or other in self._pending
            if done and not used and not self.keep:
                self._drop(other)
        self._start(bucket)
        self._wait([bucket])
        place = self._order.index(bucket) + direction
        if 0 <= place < len(self._order):
            self._start(self._order[place])

    def _start(self, bucket: Bucket) -> None:
        if bucket not in self._resident:
            self._resident.append(bucket)
            if bucket in self._held:
                del self._held[bucket]
            else:
                self._gather(bucket)

    def _gather(self, bucket: Bucket) -> None:
        whole = self.flat.whole_values(bucket)
        self._pending[bucket] = all_gather_start(self.flat.own_values(bucket), self.axis, whole, bucket.name)

    @torch.no_grad()
    def _wait(self, buckets: Iterable[Bucket]) -> None:
        for bucket in buckets:
            if bucket not in self._pending:
                continue
            try:
                self._pending.pop(bucket).wait()
            except RuntimeError as error:  # over sockets: a time-out
                error.add_note(f"while {bucket.name} and what goes with it were gathered. {SAME_BLOCKS}")
                raise

    def _drop(self, bucket: Bucket) -> None:
        self._wait([bucket])
        self._resident.remove(bucket)
        self._owing.pop(bucket, None)
        if self._holds:
            self._held[bucket] = None
        else:
            self.flat.drop(bucket)
