"""The model of training.py in torch alone: DDP or FSDP2, DTensor, pipelining, as their manuals have it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["build"]


class Block(nn.Module):
    """qkv holds q, k and v of a head side by side, so that a cut of its rows is a cut of heads."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x))
        B, T, _ = qkv.shape
        q, k, v = qkv.view(B, T, -1, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Stage(nn.Module):
    """Blocks [first, last) of the model, with the embedding on the first stage and the head on the last."""

    def __init__(self, shape: Mapping[str, int], index: int, count: int) -> None:
        super().__init__()
        hidden, layers = shape["hidden"], shape["layers"]
        self.first = index == 0
        self.last = index == count - 1
        if self.first:
            self.token, self.position = nn.Embedding(shape["vocab"], hidden), nn.Embedding(shape["length"], hidden)
        own = range(index * layers // count, (index + 1) * layers // count)
        self.blocks = nn.ModuleDict({str(i): Block(hidden, shape["heads"]) for i in own})
        if self.last:
            self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, shape["vocab"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device)[None])
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x)) if self.last else x

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """The values that parallax begins with, by its names."""
        names = {"token": "embedding.token", "position": "embedding.position", "norm": "final_norm", "head": "head"}
        parts = {"out": "attention.out", "up": "mlp.up", "down": "mlp.down"}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                owner, _, leaf = name.rpartition(".")
                if not owner.startswith("blocks."):
                    parameter.copy_(weights[f"{names[owner]}.{leaf}"])
                    continue
                _, index, part = owner.split(".")
                before = f"layers.{index}."
                if part != "qkv":
                    parameter.copy_(weights[f"{before}{parts.get(part, part)}.{leaf}"])
                    continue
                size = self.blocks[index].head_dim
                three = [weights[f"{before}attention.{one}.{leaf}"] for one in "qkv"]
                three = [one.view(-1, size, *one.shape[1:]) for one in three]
                parameter.copy_(torch.stack(three, dim=1).reshape(parameter.shape))


def _cut(stage: Stage, mesh: Any, sequence_parallel: bool) -> None:
    """Tensor parallelism by DTensor."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    if sequence_parallel:
        column = ColwiseParallel(input_layouts=Shard(1))
        row = RowwiseParallel(output_layouts=Shard(1))
        plan: dict[str, Any] = {
            "token": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "position": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
        }
        block_plan: dict[str, Any] = {"attention_norm": SequenceParallel(), "mlp_norm": SequenceParallel()}
    else:
        column, row = ColwiseParallel(), RowwiseParallel()
        plan = {
            "token": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        }
        block_plan = {}
    block_plan |= {"qkv": column, "out": row, "up": column, "down": row}
    here = {name for name, _ in stage.named_children()}
    parallelize_module(stage, mesh, {name: style for name, style in plan.items() if name in here})
    for block in stage.blocks.values():
        parallelize_module(block, mesh, block_plan)


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Matrices decay; DTensors and plain tensors may not share a fused call."""
    groups: dict[tuple[bool, str], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault((parameter.dim() > 1, type(parameter.data).__name__), []).append(parameter)
    return [{"params": found, "weight_decay": decay if matrix else 0.0} for (matrix, _), found in groups.items()]


def _vocabulary_cut() -> Any:
    from torch.distributed.tensor.parallel import loss_parallel

    return loss_parallel()


def build(
    data: int,
    tensor: int,
    pipeline: int,
    *,
    shape: Mapping[str, int],
    weights: Mapping[str, Tensor],
    adamw: Mapping[str, Any],
    global_batch: int,
    microbatch: int,
    how: str = "ddp",
    sequence_parallel: bool = False,
    schedule: str = "1F1B",
) -> Callable[[Tensor, Tensor], float | None]:
    """step(tokens, targets) of this data rank -> the loss of its share on the last stage, None elsewhere.

    how: `ddp`, `fsdp` (FSDP2, parameters kept until the last microbatch) or `replicate` (its unsharded sibling).
    """
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (pipeline, data, tensor), mesh_dim_names=("pipeline", "data", "tensor"))
    index = mesh["pipeline"].get_local_rank()
    stage = Stage(shape, index, pipeline)
    stage.fill(weights)
    if tensor > 1:
        _cut(stage, mesh["tensor"], sequence_parallel)
    model: nn.Module = stage
    if data > 1 and how == "ddp":
        model = nn.parallel.DistributedDataParallel(
            stage, process_group=mesh["data"].get_group(), gradient_as_bucket_view=True
        )
    elif data > 1:
        _wrap(stage, mesh["data"], how)
    groups = _groups(model, adamw["weight_decay"])
    optimizer = torch.optim.AdamW(groups, fused=True, **{k: v for k, v in adamw.items() if k != "weight_decay"})
    count = global_batch // data // microbatch

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    around = _vocabulary_cut if tensor > 1 else contextlib.nullcontext
    if pipeline > 1:
        run = _pipelined(model, mesh, index, pipeline, count, loss_of, schedule)
    else:
        run = _accumulated(model, count, data, how, loss_of)

    def step(tokens: Tensor, targets: Tensor) -> float | None:
        with around():
            loss = run(tokens, targets)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _wrap(stage: Stage, mesh: Any, how: str) -> None:
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in stage.blocks.values():
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(stage, mesh=mesh, reshard_after_forward=False)
        return
    from torch.distributed._composable.replicate_with_fsdp import replicate

    for block in stage.blocks.values():
        replicate(block, mesh=mesh)
    replicate(stage, mesh=mesh)


def _pipelined(
    model: nn.Module, mesh: Any, index: int, pipeline: int, count: int, loss_of: Any, schedule: str
) -> Callable[[Tensor, Tensor], float | None]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    assert schedule == "1F1B"
    stage = PipelineStage(model, index, pipeline, torch.device("cpu"), group=mesh["pipeline"].get_group())
    loop = Schedule1F1B(stage, n_microbatches=count, loss_fn=loss_of)

    def run(tokens: Tensor, targets: Tensor) -> float | None:
        if index == 0:
            loop.step(tokens, return_outputs=False)
            return None
        if index < pipeline - 1:
            loop.step(return_outputs=False)
            return None
        losses: list[Tensor] = []
        loop.step(target=targets, losses=losses, return_outputs=False)
        return sum(float(_local(loss.detach())) for loss in losses) / len(losses)

    return run


def _local(loss: Tensor) -> Tensor:
    return loss.full_tensor() if hasattr(loss, "full_tensor") else loss


def _accumulated(
    model: nn.Module, count: int, data: int, how: str, loss_of: Any
) -> Callable[[Tensor, Tensor], float | None]:
    def run(tokens: Tensor, targets: Tensor) -> float | None:
        total = 0.0
        pairs = list(zip(tokens.chunk(count), targets.chunk(count), strict=True))
        for number, (x, y) in enumerate(pairs):
            last = number == count - 1
            quiet: Any = contextlib.nullcontext()
            if data > 1 and how == "ddp" and not last:
                quiet = model.no_sync()  # type: ignore[operator]
            elif data > 1 and how != "ddp":
                model.set_requires_gradient_sync(last)  # type: ignore[operator]
                if how == "fsdp":
                    model.set_reshard_after_backward(last)  # type: ignore[operator]
            with quiet:
                loss = loss_of(model(x), y)
                (loss / count).backward()
            total += float(_local(loss.detach()))
        return total / count

    return run


if __name__ == "__main__":
    raise SystemExit(f"{os.path.basename(__file__)} is used by training.py")
