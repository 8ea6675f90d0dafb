"""Any nn.Module, any torch optimizer, over the data axis: what DDP (arXiv:2006.15704), Horovod (arXiv:1802.05799) and
FSDP do for a training script, in three lines.

    mesh = parallax.init_mesh("4x1x1")
    model = parallax.data_parallel(model, mesh, zero=1)
    optimizer = parallax.optimizer(model, torch.optim.AdamW, lr=3e-4)

Then the script goes on as before: forward, loss.backward(), optimizer.step(). Gradients are means over the data ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from parallax.comm import all_reduce, broadcast
from parallax.config_fields import LOSSY
from parallax.data.buckets import FlatBuffers
from parallax.data.choose import CASTS, replicate
from parallax.data.gather import Hook, block_of, find_blocks
from parallax.data.sync import BucketSync
from parallax.data.zero import Zero
from parallax.errors import ConfigError
from parallax.mesh import Mesh, cut_axis
from parallax.params import collect
from parallax.wrap_backward import AfterBackward
from parallax.wrap_optimizer import Optimizer
from parallax.wrap_rules import check_compression, check_dropped, check_join, check_module, check_output
from parallax.wrap_watch import Unwrapped, Watch, check_free

__all__ = ["DataParallel", "Optimizer", "data_parallel", "optimizer"]


def data_parallel(module: nn.Module, mesh: Mesh, **options: Any) -> DataParallel:
    """Wrap a module for the data axis of a mesh; see DataParallel for the options.

    With zero=3 every rank must run the same blocks in a step; where that may differ (LayerDrop, experts) take
    gather="step" or zero=2. Else RuntimeError: at once where ranks share memory, after the mesh's time-out elsewhere.
    With zero=1 and 2 the parameters of a block arrive before the block is called: who uses them without that call, and
    before it, reads those of the step before, unless within `model.gathered()`.
    """
    return DataParallel(module, mesh, **options)


def optimizer(model: DataParallel, kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Optimizer:
    """A torch optimizer for what this rank updates; kind is its class, options its own. See Optimizer."""
    return Optimizer(model, kind, **options)


class DataParallel(nn.Module):
    """Calls the module, and reduces its gradients over mesh.grad while the backward runs.

    zero: 0 keeps copies of all, 1 cuts the optimizer's state, 2 gradients too, 3 parameters too, gathered block by
    block (a block is a child of a ModuleList, ModuleDict or Sequential), or with gather="step" once; elsewhere they
    read as NaN, but for `with model.gathered():`. shard_size: cut over that many neighbours, copy across. no_decay:
    patterns of parameter names that weight decay leaves alone. All ranks begin with the parameters and buffers of the
    first data rank; with broadcast_buffers they have its buffers after every step, and before the first training
    forward where no step was before it. A parameter without a gradient counts as zero; frozen ones stay as they are,
    and whole if they were frozen when wrapped. compression: as data.compression, with its rank and ratio; what the
    lossy ones owe is in no state_dict, and they want gradients of one scale: no GradScaler, no join.

    Collectives: a broadcast of the state; a step's are those of Replicate, Zero or the compressor. Raises ConfigError
    for a mesh with a pipeline, for parameters of more than one dtype or device, and for a zero, shard_size or
    compression that cannot be.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        *,
        zero: int = 0,
        shard_size: int | None = None,
        gather: str = "block",
        bucket_bytes: int = 25 * 2**20,
        broadcast_buffers: bool = True,
        no_decay: Sequence[str] = (),
        compression: str = "none",
        compression_rank: int = 4,
        compression_ratio: float = 0.01,
    ) -> None:
        super().__init__()
        check_free(module)
        check_module(module, mesh, zero, shard_size, gather)
        check_compression(compression, compression_rank, compression_ratio, zero)
        self.module, self.mesh, self.broadcast_buffers = module, mesh, broadcast_buffers
        for tensor in [*module.parameters(), *module.buffers()]:
            broadcast(tensor.detach(), mesh.grad)
        decays = {n: not any(fnmatch(n, pattern) for pattern in no_decay) for n, _ in module.named_parameters()}
        specs = [replace(spec, decay=decays[spec.parameter]) for spec in collect(module, mesh)]  # as torch: biases too
        self.order = {spec.name: place for place, spec in enumerate(specs)}
        size = (shard_size or mesh.grad.size) if zero else 1
        self.shards, replicas = cut_axis(mesh, mesh.grad, ("data", "context"), size)
        names, blocks = dict(module.named_parameters()), block_of(module)
        dtype = next(p.dtype for p in module.parameters() if p.requires_grad)
        self.flat = FlatBuffers(
            module,
            specs,
            bucket_bytes=bucket_bytes,
            grad_dtype=dtype if dtype.itemsize >= 4 else torch.float32,
            device=mesh.device,
            level=zero,
            ranks=mesh.grad.size,
            shards=self.shards,
            group_of=lambda name: blocks[names[name]],
        )
        self._watch = Watch(module, self.flat)
        flats = {0: self.flat}
        cut = {"models": {0: module}, "shards": self.shards, "replicas": replicas, "keep": gather == "step"}
        self.sync: BucketSync
        if self.shards.size > 1:
            import_module("torch._dynamo")  # as the first torch optimizer will; it keeps hooks out of torch.compile
            narrow = CASTS.get(compression)
            self.sync = Zero(mesh, flats, {}, learns=False, reduce_dtype=narrow, **cut)  # type: ignore[arg-type]
        else:
            lossy = {"compression_rank": compression_rank, "compression_ratio": compression_ratio}
            self.sync = replicate(mesh, flats, {}, learns=False, compression=compression, **lossy)  # type: ignore[arg-type]
        looks = self.flat.level == 3 and gather == "block"
        checks = [(block, Hook(partial(check_output, name))) for name, block in (find_blocks(module) if looks else ())]
        self._handles = [block.register_forward_hook(check) for block, check in checks]
        self.lossy, self.active, self.accumulating, self.joining = compression in LOSSY, True, False, False
        self.num_active, self._source, self._buffers_sent = mesh.grad.size, 0, False
        self.after_backward = AfterBackward(self)
        self._when_loaded: list[Callable[[], None]] = []
        self._when_reduced: list[Callable[[], None]] = []
        self.begin_step()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What copy and pickle ask for: neither the ranks nor what is under way between them can be copied."""
        raise ConfigError(
            "a wrapped module can be neither copied nor pickled; copy what is inside, where it is whole: "
            "`with model.gathered(): copied = copy.deepcopy(model.module)`, or save model.state_dict()"
        )

    def begin_step(self) -> None:
        """Gradients back to zero; what was under way is dropped."""
        self.sync.wait()
        self.sync.zero()
        self.flat.grad_scale = 1.0 if self.joining else 1.0 / self.mesh.grad.size
        self.armed = self.reduced = False
        self.after_backward.reset()
        self.left_out: set[str] = set()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, those of `accumulate` too."""
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients so far; a forward that has begun the step stays its beginning."""
        check_dropped(self.joining and self.reduced and self.num_active < self.mesh.grad.size)
        self.sync.wait()
        self.sync.zero()
        self.armed = self.armed and not self.reduced  # after its backward the forward's step is over
        self.reduced = False
        if self.armed:
            self.sync.arm(0)

    def forward(self, *args: Any, **options: Any) -> Any:
        trains = self.training and torch.is_grad_enabled() and not self.accumulating
        if trains and self.reduced and self._dropped_by_hand():
            self.drop_gradients()
        if trains and not self.armed:
            self._begin()
        if self.flat.level == 3:  # the gathering would hide it
            self._watch.check_memory()
        output = self.module(*args, **options)
        if trains:
            self.after_backward.watch(output)
        return output

    def _dropped_by_hand(self) -> bool:
        """Whether a script has done `param.grad = None` for all instead of zero_grad."""
        return self.flat.level == 0 and all(placed.parameter.grad is None for placed in self.flat.placed)

    def _begin(self) -> None:
        if self.joining:
            self.agree(active=True)
        self._arm()

    def _arm(self) -> None:
        self._watch.check()
        self.sync.arm(0)
        self.armed = True
        if not self._buffers_sent:
            self.send_buffers()
        self._buffers_sent = False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What double(), to() and the like go through: the parameters lie in memory that must stay as it is."""
        before = torch.empty(0, dtype=self.flat.dtype, device=self.flat.device)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise ConfigError(
                f"a wrapped module stays {before.dtype} on {before.device}, and this would make it {after.dtype} on "
                f"{after.device}; convert or move `model.unwrap()`, then wrap it again"
            )
        return self

    def send_buffers(self) -> None:
        """Let every rank have the buffers of the first rank that still has batches. After a step, so that whoever saves
        then needs no collective for them."""
        if self.broadcast_buffers and self.mesh.grad.size > 1:
            for buffer in self.module.buffers():
                broadcast(buffer, self.mesh.grad, self._source)
        self._buffers_sent = True

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """For every backward but the last before a step: gradients add up, and nothing is sent.

        They add up apart from param.grad, which shows none: to drop them is `model.zero_grad()`.
        """
        before, self.accumulating = self.accumulating, True
        waits = self.armed and not self.reduced  # a forward has begun the step; its backward is still to come
        if waits:
            self.sync.disarm(0)
        try:
            yield
        finally:
            self.accumulating = before
            if waits and self.armed and not before:
                self.sync.arm(0)

    def reduce(self) -> None:
        """Return when this rank's gradients are the mean over the ranks that took part. Once a step."""
        if self.reduced:
            return
        if not self.armed:
            self._begin()
        self.flat.add_given()
        self.sync.reduce(0)
        self.sync.finish()
        if self.joining:  # only now is it known how many took part
            for segment in self.flat.segments:
                self.flat.grads_of(segment).mul_(1.0 / self.num_active)
        self.left_out = {placed.name for placed in self.flat.left_out()}
        self.flat.show_grads()
        for show in self._when_reduced:
            show()
        self._left_at_first = self.left_out
        self.note_grads()
        self.reduced = True

    def take_grads(self) -> None:
        """Once they are reduced: what a script has assigned to param.grad since is the gradient; None has none."""
        if self.flat.level == 0:
            self.left_out = {placed.name for placed in self.flat.take_shown()}
        else:
            self._watch.check_gradients()

    def check_step(self) -> None:
        """Before the optimizer's step: what it updates must be what the module computes with."""
        self.take_grads()
        self._watch.check_memory()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        self.after_backward.warn()
        return (parameter for _, parameter in super().named_parameters(recurse=recurse))

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self.after_backward.warn()
        return super().named_parameters(*args, **options)

    # --- ranks with fewer batches ---------------------------------------------------------------

    @contextmanager
    def join(self, optimizer: Optimizer) -> Iterator[None]:
        """Around a loop in which ranks may have different numbers of batches: a rank that is done takes part in the
        others' steps, with no gradient of its own, until all are done. Not for zero=3.

        The mean is over the ranks that still have batches; what one of them clips, all do, and at zero=0 what its
        script does to gradients. Sends 8 bytes a step for each rank, 24 and 8 for each parameter group at the step and
        at each clip, and the gradients once more where a script changed them and a rank is done. One join at a time.
        """
        joined = self.mesh.grad.joined
        check_join(bool(joined), self.flat.level, self.lossy)
        self.begin_step()
        self.joining, self.flat.grad_scale = True, 1.0
        joined.append(self)
        try:
            yield
            promised = self.armed and not self.reduced  # the others wait for the backward of this forward
            self.drop_gradients()
            if promised:
                optimizer.step()
            while self.agree(active=False):
                self._arm()
                optimizer.step()
        finally:
            joined.clear()
            self.joining, self.active, self.num_active, self._source = False, True, self.mesh.grad.size, 0
        self.begin_step()

    def agree(self, *, active: bool) -> int:
        """How many ranks have a batch for the coming step."""
        axis, self.active = self.mesh.grad, active
        here = torch.zeros(axis.size, dtype=torch.int64, device=self.mesh.device)
        here[axis.rank] = int(active)
        found = all_reduce(here, axis).tolist()
        self.num_active = sum(found)
        self._source = found.index(1) if self.num_active else 0
        return self.num_active

    def note_grads(self) -> None:
        """The gradients are the same on every rank now."""
        self._version = self.flat.grads._version

    def changes(self) -> int:
        """What a script has done to whole gradients: 0 nothing, 1 changed some, 2 set some to None."""
        if self.flat.level:
            return 0
        return 2 if self.left_out != self._left_at_first else int(self.flat.grads._version != self._version)

    def follow_changes(self, changes: float) -> None:
        """Have a rank without batches use the gradients that the others changed. changes: the most of any rank."""
        if changes == 2:
            raise ConfigError("join cannot leave out a parameter whose grad is set to None; multiply it by 0 instead")
        if changes and self.num_active < self.mesh.grad.size:
            broadcast(self.flat.grads, self.mesh.grad, self._source)
        self.note_grads()

    # --- whole parameters -----------------------------------------------------------------------

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it every parameter is whole and up to date on every rank, also after forwards, steps and another
        gathered() within. What all ranks write into them stays, but at zero=3 is lost. All ranks enter it; at zero=3
        evaluation within it sends nothing, and one rank may do it alone.
        """
        if self.flat.level == 3:
            self._watch.check_memory()
        sync = self.sync  # this one also if the model is unwrapped within
        sync.hold()
        try:
            yield
        finally:
            sync.release()

    def unwrap(self) -> nn.Module:
        """Give this wrap up, and return the module as one that was never wrapped: whole plain parameters, no hooks.

        On every rank alike: at zero=3 it gathers. Gradients are dropped; neither this model nor its optimizer trains
        any more.
        """
        if self.joining:
            raise ConfigError("unwrap within join would leave the other ranks alone; unwrap after it")
        if self.flat.level == 3:
            self._watch.check_memory()
        self.sync.hold()
        self.begin_step()
        self.flat.give_back()
        self.sync.remove()
        for handle in self._handles:
            handle.remove()
        self.sync = cast(BucketSync, Unwrapped())
        self._watch = cast(Watch, self.sync)
        return self.module

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The module's own state, whole and after a step the same on every rank, under the module's own names.

        A collective at zero=3 alone: below it one rank may ask for it and the others not.
        """
        with self.gathered():
            found = self.module.state_dict(*args, **options)
            for name, value in found.items():
                if isinstance(value, Tensor):
                    found[name] = value.clone()  # in place: what torch notes beside the tensors stays
            return found

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the module's own state on every rank. Its memory is kept (assign does nothing)."""
        with self.gathered():
            found = self.module.load_state_dict(state_dict, strict)
            for bucket in self.flat.buckets if self.flat.level == 3 else ():
                whole = self.flat.whole_values(bucket)
                self.flat.own_values(bucket).copy_(whole[bucket.own[0] - bucket.start : bucket.own[1] - bucket.start])
        for refresh in self._when_loaded:
            refresh()
        return found

    def when_loaded(self, refresh: Callable[[], None]) -> None:
        """Have something called after load_state_dict."""
        self._when_loaded.append(refresh)

    def when_reduced(self, show: Callable[[], None]) -> None:
        """Have something called when the gradients are the mean."""
        self._when_reduced.append(show)
