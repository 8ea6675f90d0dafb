"""The model of training.py by Megatron-Core: its GPTModel, parallel layers, pipeline schedules and data parallelism.

Ran with megatron-core 0.16.1 and torch 2.13.0 (`pip install -c constraints.txt -e .[bench]`); no
TransformerEngine, no Apex, so the layers are its local ones. What is not its own:

- it asks for CUDA by name in a few places; `_on_cpu` answers with the CPU;
- its torch LayerNorm refuses sequence parallelism, and its fused ones need CUDA; `Norm` marks its parameters the way
  its fused ones do, so that its own code sums their gradients over the tensor axis;
- the peer `megatron-sdpa` puts torch's attention in the place of its local one, which keeps all probabilities;
- AdamW is torch's fused one, as everywhere in training.py.

Its fusions by torch.compile are off: they need a compiler.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["build", "missing"]

PARTS = tuple(f"{one}.{leaf}" for one in ("linear_qkv", "linear_fc1") for leaf in ("weight", "bias"))
ROWS = ("word_embeddings.weight", "output_layer.weight", *PARTS)
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
"""What its tensor ranks cut, along dim 0 and along dim 1; they have copies of the rest."""


def missing() -> bool:
    """True where megatron-core is not installed."""
    return importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None


def _on_cpu() -> None:
    """CUDA's current device is the CPU, and there is nothing to synchronize. For this process only."""
    zeros = torch.zeros

    def zeros_here(*size: Any, device: Any = None, **options: Any) -> Tensor:
        return zeros(*size, device="cpu" if device == "cuda" else device, **options)

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.zeros = zeros_here  # its schedules count tokens on "cuda"


class Norm(nn.LayerNorm):
    """A LayerNorm whose gradients are partial where the sequence is cut."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class TorchAttention(nn.Module):
    """Causal attention by torch, in the place of Megatron-Core's DotProductAttention. [T, B, h, K] to [T, B, h * K]."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (one.permute(1, 2, 0, 3) for one in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _config(shape: Mapping[str, int], tensor: int, pipeline: int, sequence_parallel: bool) -> Any:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    sizes = {"num_layers": shape["layers"], "hidden_size": shape["hidden"], "num_attention_heads": shape["heads"]}
    sizes |= {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    off = ["bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion"]
    off += ["perform_initialization", "persist_layer_norm", "cross_entropy_loss_fusion"]
    return TransformerConfig(
        **sizes,
        **dict.fromkeys(off, False),
        sequence_parallel=sequence_parallel and tensor > 1,
        activation_func=gelu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        deallocate_pipeline_outputs=True,
        finalize_model_grads_func=finalize_model_grads,
    )


def _model(config: Any, shape: Mapping[str, int], torch_attention: bool) -> nn.Module:
    """This rank's part of the model."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    if torch_attention:
        layer.submodules.self_attention.submodules.core_attention = TorchAttention
    here = TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), layer_norm=Norm)
    return GPTModel(
        config,
        here,
        shape["vocab"],
        shape["length"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
    )


def _whole(name: str, weights: Mapping[str, Tensor], head_dim: int, first_layer: int) -> Tensor:
    """The whole tensor that a parameter of Megatron-Core is, or is a part of."""
    outside = {
        "embedding.word_embeddings.weight": "embedding.token.weight",
        "embedding.position_embeddings.weight": "embedding.position.weight",
        "decoder.final_layernorm.weight": "final_norm.weight",
        "decoder.final_layernorm.bias": "final_norm.bias",
        "output_layer.weight": "head.weight",
    }
    if name in outside:
        return weights[outside[name]]
    _, _, index, owner, leaf = name.replace("self_attention.", "").replace("mlp.", "").split(".")
    parts = {"input_layernorm": "attention_norm", "pre_mlp_layernorm": "mlp_norm", "linear_proj": "attention.out"}
    parts |= {"linear_fc1": "mlp.up", "linear_fc2": "mlp.down"}
    before = f"layers.{first_layer + int(index)}."
    if owner != "linear_qkv":
        return weights[f"{before}{parts[owner]}.{leaf}"]
    three = [weights[f"{before}attention.{one}.{leaf}"] for one in "qkv"]  # q, k, v of a head side by side
    shape = (3 * three[0].shape[0], *three[0].shape[1:])
    return torch.stack([one.view(-1, head_dim, *one.shape[1:]) for one in three], dim=1).reshape(shape)


def _fill(model: Any, weights: Mapping[str, Tensor], head_dim: int, rank: int, size: int) -> None:
    """The values that parallax begins with, cut for this tensor rank."""
    first = model.decoder.layers[0].layer_number - 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = _whole(name, weights, head_dim, first)
            if name.endswith(ROWS):
                whole = whole.chunk(size, dim=0)[rank]
            elif name.endswith(COLUMNS):
                whole = whole.chunk(size, dim=1)[rank]
            if whole.shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(parameter.shape)} here and {tuple(whole.shape)} in parallax")
            parameter.copy_(whole)


def _optimizer(model: nn.Module, adamw: Mapping[str, Any]) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() == 1]
    rest = {key: value for key, value in adamw.items() if key != "weight_decay"}
    groups = [{"params": matrices, "weight_decay": adamw["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True, **rest)


def _forward_step(length: int) -> Callable[[Iterator[Any], Any], Any]:
    """What its schedules call for each microbatch."""
    positions = torch.arange(length)[None]
    # Its own mask is made on "cuda".
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]

    def loss_of(losses_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = losses_BT.sum()
        return total, torch.tensor(losses_BT.numel(), dtype=torch.int), total.detach().clone()

    def forward_step(data: Iterator[Any], model: Any) -> Any:
        tokens, targets = next(data)
        return model(tokens, positions.expand_as(tokens), mask, labels=targets), loss_of

    return forward_step


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
    sequence_parallel: bool = False,
    torch_attention: bool = False,
) -> Callable[[Tensor, Tensor], float | None]:
    """step(tokens, targets) of this data rank -> the loss of its share on the last stage, None elsewhere."""
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _on_cpu()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
    # There is no dropout: the tracker that keeps no CUDA states will do.
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    config = _config(shape, tensor, pipeline, sequence_parallel)
    inner = _model(config, shape, torch_attention)
    rank = parallel_state.get_tensor_model_parallel_rank()
    _fill(inner, weights, shape["hidden"] // shape["heads"], rank, tensor)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), inner)
    optimizer = _optimizer(model, adamw)
    loop, forward_step = get_forward_backward_func(), _forward_step(shape["length"])
    count, tokens_each = global_batch // data // microbatch, microbatch * shape["length"]

    def step(tokens: Tensor, targets: Tensor) -> float | None:
        model.zero_grad_buffer()
        losses = loop(
            forward_step_func=forward_step,
            data_iterator=iter(zip(tokens.split(microbatch), targets.split(microbatch), strict=True)),
            model=[model],
            num_microbatches=count,
            seq_length=shape["length"],
            micro_batch_size=microbatch,
        )
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad
        optimizer.step()
        optimizer.zero_grad()  # the next backward must not add into main_grad by itself
        return sum(map(float, losses)) / (count * tokens_each) if losses else None

    return step


if __name__ == "__main__":
    raise SystemExit(f"{os.path.basename(__file__)} is used by training.py")
