"""The model of training.py by DeepSpeed: ZeRO 0 to 3 over the data axis; its pipeline where pipeline > 1.

Ran with deepspeed 0.19.8 and torch 2.13.0 (`DS_BUILD_OPS=0 pip install -c constraints.txt -e .[bench]`). The model is
that of torch_native.py; the optimizer is torch's fused AdamW, handed over to DeepSpeed, whose own CPU Adam needs a
compiler. Its kernel for shared memory needs one too and serves inference alone, so it is off. With ZeRO it keeps
another copy of the float32 weights as master weights. Its pipeline runs with ZeRO 0 and 1. No tensor parallelism.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_native import Block, Stage

__all__ = ["ENVIRONMENT", "build", "missing"]

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
"""Before deepspeed is imported."""

BUCKET_ELEMENTS = 1 << 23
"""More than the model has. The default, 5e8, is for larger ones, and some of its buffers are of that size."""


def missing() -> bool:
    """True where deepspeed is not installed."""
    return importlib.util.find_spec("deepspeed") is None


def _import() -> Any:
    os.environ |= ENVIRONMENT
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _config(level: int, global_batch: int, microbatch: int, count: int) -> dict[str, Any]:
    zero = {"stage": level, "reduce_bucket_size": BUCKET_ELEMENTS}
    zero |= {"allgather_bucket_size": BUCKET_ELEMENTS, "stage3_prefetch_bucket_size": BUCKET_ELEMENTS}
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": microbatch,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }


def _optimizer(model: nn.Module, adamw: Mapping[str, Any]) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() == 1]
    rest = {key: value for key, value in adamw.items() if key != "weight_decay"}
    groups = [{"params": matrices, "weight_decay": adamw["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True, **rest)


class First(nn.Module):
    """Tokens [B, T] to vectors [B, T, D]."""

    def __init__(self, shape: Mapping[str, int]) -> None:
        super().__init__()
        self.token = nn.Embedding(shape["vocab"], shape["hidden"])
        self.position = nn.Embedding(shape["length"], shape["hidden"])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position(torch.arange(tokens.shape[1])[None])


class Last(nn.Module):
    """Vectors [B, T, D] to logits [B, T, V]."""

    def __init__(self, shape: Mapping[str, int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape["hidden"])
        self.head = nn.Linear(shape["hidden"], shape["vocab"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def _pipeline(whole: Stage, shape: Mapping[str, int], pipeline: int, data: int) -> nn.Module:
    """This rank's layers with the values of the whole model, in DeepSpeed's pipeline."""
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    block = LayerSpec(Block, shape["hidden"], shape["heads"])  # a module in its place would stay on every rank
    layers = [LayerSpec(First, shape), *[block] * shape["layers"], LayerSpec(Last, shape)]
    topology = PipeDataParallelTopology(num_pp=pipeline, num_dp=data)
    model = PipelineModule(layers, topology=topology, loss_fn=_loss, partition_method="type:Block")
    values = whole.state_dict()
    for name, layer in model.named_children():
        if not name.isdigit():  # its own: what stages share, which is nothing here
            continue
        inside = 0 < int(name) <= shape["layers"]
        before = f"blocks.{int(name) - 1}." if inside else ""
        layer.load_state_dict({key: values[before + key] for key in layer.state_dict()})
    return model


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _accumulated(engine: Any, count: int) -> Callable[[Tensor, Tensor], float | None]:
    def step(tokens: Tensor, targets: Tensor) -> float:
        total = 0.0
        for x, y in zip(tokens.chunk(count), targets.chunk(count), strict=True):
            loss = _loss(engine(x), y)
            engine.backward(loss)
            engine.step()  # it counts the microbatches, and does nothing before the last
            total += float(loss.detach())
        return total / count

    return step


def _pipelined(engine: Any, microbatch: int) -> Callable[[Tensor, Tensor], float | None]:
    def step(tokens: Tensor, targets: Tensor) -> float | None:
        pairs = zip(tokens.split(microbatch), targets.split(microbatch), strict=True)
        loss = engine.train_batch(iter(pairs))  # the mean over data, told to all ranks
        return float(loss) if engine.is_last_stage() else None

    return step


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
    level: int,
) -> Callable[[Tensor, Tensor], float | None]:
    """step(tokens, targets) of this data rank -> the loss on the last stage, None elsewhere.

    level: of ZeRO. Raises ValueError for a mesh that it cannot run.
    """
    if tensor > 1 or (pipeline > 1 and level > 1):
        raise ValueError(f"no mesh {data}x{tensor}x{pipeline} with ZeRO {level}; choose tensor=1, and ZeRO 0 or 1")
    deepspeed = _import()
    torch.set_num_threads(1)
    whole = Stage(shape, 0, 1)
    whole.fill(weights)
    count = global_batch // data // microbatch
    config = _config(level, global_batch, microbatch, count)
    model = _pipeline(whole, shape, pipeline, data) if pipeline > 1 else whole
    engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(model, adamw), config=config)
    return _pipelined(engine, microbatch) if pipeline > 1 else _accumulated(engine, count)


if __name__ == "__main__":
    raise SystemExit(f"{os.path.basename(__file__)} is used by training.py")
