"""Tensor-parallel layers on several ranks against the dense ones, with and without sequence parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallax import comm
from parallax.errors import ConfigError
from parallax.gradients import GradSink, attach
from parallax.mesh import Axis, init_mesh
from parallax.params import Layout
from parallax.tensor import layers as layers_file
from parallax.tensor.layers import ColumnParallelLinear, Piece, RowParallelLinear, VocabParallelEmbedding, vocab_range
from parallax.tensor.loss import vocab_parallel_cross_entropy
from parallax.tensor.ops import gather_tokens, slice_tokens
from parallax.tensor.plan import Column, shard_module

F64 = torch.float64
TOKENS, WIDTH, HIDDEN, VOCAB = 24, 6, 24, 11


def tensor_axis(size: int) -> Axis:
    return init_mesh(f"1x{size}x1", device_type="cpu").tensor


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def whole_gradient(layer: nn.Module, name: str, axis: Axis) -> Tensor:
    """The gradient of the global tensor, from every rank's boxes: added up where ranks hold parts of a sum."""
    parameter = dict(layer.named_parameters())[name]
    (layout,) = [layer.layouts[name]] if isinstance(layer.layouts[name], Layout) else layer.layouts[name]
    whole = torch.zeros(layout.global_shape, dtype=F64)
    box = layout.box or tuple((0, size) for size in layout.global_shape)
    if layout.shards or layout.sum_over or axis.rank == 0:
        assert parameter.grad is not None
        whole[tuple(slice(a, b) for a, b in box)] = parameter.grad[: box[0][1] - box[0][0]]
    return comm.all_reduce(whole, axis)


def copy_whole(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    for name, whole in (("weight", weight), ("bias", bias)):
        layouts = layer.layouts[name] if whole is not None else ()
        for layout in [layouts] if isinstance(layouts, Layout) else layouts:
            assert whole is not None
            box = layout.box or tuple((0, size) for size in layout.global_shape)
            getattr(layer, name).data[: box[0][1] - box[0][0]] = whole[tuple(slice(a, b) for a, b in box)]


def column_then_row(size: int, sequence_parallel: bool) -> None:
    axis = tensor_axis(size)
    torch.manual_seed(0)
    up, down = nn.Linear(WIDTH, HIDDEN, dtype=F64), nn.Linear(HIDDEN, WIDTH, dtype=F64)
    x = torch.randn(TOKENS, WIDTH, dtype=F64, requires_grad=True)
    y = down(F.gelu(up(x)))
    y.square().sum().backward()
    options = {"sequence_parallel": sequence_parallel, "dtype": F64}
    column = ColumnParallelLinear(WIDTH, HIDDEN, axis, **options)
    row = RowParallelLinear(HIDDEN, WIDTH, axis, **options)
    copy_whole(column, up.weight.detach(), up.bias.detach())
    copy_whole(row, down.weight.detach(), down.bias.detach())
    mine = x.detach().clone().requires_grad_()
    if sequence_parallel:
        z = row(F.gelu(column(slice_tokens(mine, axis))))
        assert z.shape == (TOKENS // size, WIDTH)
        z = gather_tokens(z, axis)
        # Behind the gather every rank computes the same, so each takes 1/size of the loss.
        (z.square().sum() / size).backward()
    else:
        z = row(F.gelu(column(mine)))
        z.square().sum().backward()
    close(z, y)
    close(mine.grad, x.grad)
    for layer, dense in ((column, up), (row, down)):
        for name, parameter in dense.named_parameters():
            close(whole_gradient(layer, name, axis), parameter.grad)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence-parallel"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_column_then_row_is_two_dense_layers(ranks, size: int, sequence_parallel: bool):
    ranks(size, column_then_row, size, sequence_parallel)


def embedding_and_loss(size: int, sequence_parallel: bool) -> None:
    axis = tensor_axis(size)
    torch.manual_seed(0)
    table = nn.Embedding(VOCAB, WIDTH, dtype=F64)
    ids, targets = torch.randint(0, VOCAB, (TOKENS,)), torch.randint(0, VOCAB, (TOKENS,))
    targets[::5] = -100
    F.cross_entropy(table(ids) @ table.weight.detach().T, targets, reduction="sum").backward()
    layer = VocabParallelEmbedding(VOCAB, WIDTH, axis, sequence_parallel=sequence_parallel, dtype=F64)
    copy_whole(layer, table.weight.detach())
    start, stop, rows = vocab_range(VOCAB, axis)
    assert layer.weight.shape == (rows, WIDTH)
    head = torch.zeros(rows, WIDTH, dtype=F64)
    head[: stop - start] = table.weight.detach()[start:stop]
    x = layer(ids)
    if sequence_parallel:
        x = gather_tokens(x, axis)
    logits = x @ head.T
    logits.data[:, stop - start :] = 50.0  # padded columns take no part
    loss = vocab_parallel_cross_entropy(logits, targets, axis, vocab_range=(start, stop))
    expected = F.cross_entropy(table(ids) @ table.weight.T, targets, reduction="sum")
    close(loss.detach(), expected.detach())
    # The gradient of x is a partial sum over the columns of each rank; a column layer would reduce it.
    grad = torch.autograd.grad(loss, x)[0]
    if sequence_parallel:
        x.backward(grad)
    else:
        x.backward(comm.all_reduce(grad, axis))
    close(whole_gradient(layer, "weight", axis), table.weight.grad)
    assert not layer.weight.grad[stop - start :].any(), "padding gets no gradient"


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence-parallel"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_vocabulary_that_does_not_divide(ranks, size: int, sequence_parallel: bool):
    ranks(size, embedding_and_loss, size, sequence_parallel)


def tiny_vocabulary() -> None:
    """Five ids on four ranks in rows of two: the last rank holds padding alone."""
    axis = tensor_axis(4)
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 5, dtype=F64), torch.tensor([0, 1, 2, 3, 4, -100])
    start, stop, rows = vocab_range(5, axis)
    assert (stop - start == 0) == (axis.rank == 3)
    mine = torch.full((6, rows), 9.0, dtype=F64)
    mine[:, : stop - start] = logits[:, start:stop]
    mine.requires_grad_()
    loss = vocab_parallel_cross_entropy(mine, targets, axis, vocab_range=(start, stop))
    loss.backward()
    close(loss.detach(), F.cross_entropy(logits, targets, reduction="sum"))
    assert bool(mine.grad.isfinite().all()) and not mine.grad[:, stop - start :].any()


def test_a_rank_without_any_vocabulary(ranks):
    ranks(4, tiny_vocabulary)


def order_of_backward(sequence_parallel: bool) -> list[str]:
    """What a column layer does in its backward, in order."""
    axis = tensor_axis(2)
    layer = ColumnParallelLinear(WIDTH, HIDDEN, axis, sequence_parallel=sequence_parallel)
    sink, events = GradSink(), []
    attach(layer, sink)
    buffers = {p: torch.zeros_like(p) for p in layer.parameters()}
    sink.buffer_of = buffers.__getitem__
    sink.on_accumulated = lambda parameter: events.append("weight" if parameter is layer.weight else "bias")
    for name in ("all_reduce_start", "reduce_scatter_start"):
        honest = getattr(layers_file, name)

        def spy(tensor: Tensor, axis: Axis, honest: Any = honest, name: str = name) -> Any:
            events.append(name)
            pending = honest(tensor, axis)
            wait = pending.wait

            class Watched:
                def wait(self) -> Tensor:
                    events.append("wait")
                    return wait()

            return Watched()

        setattr(layers_file, name, spy)
    layer(torch.randn(4, WIDTH, requires_grad=True)).sum().backward()
    return events


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_input_gradient_travels_while_the_weight_gradient_is_computed(ranks, sequence_parallel: bool):
    start = "reduce_scatter_start" if sequence_parallel else "all_reduce_start"
    for events in ranks(2, order_of_backward, sequence_parallel):
        assert events == [start, "weight", "bias", "wait"]


class Plain(nn.Module):
    """A small transformer that knows nothing of parallax: fused query-key-value, tied head."""

    def __init__(self, vocab: int, heads: int = 4) -> None:
        super().__init__()
        self.head_dim = 4
        width = heads * self.head_dim
        self.embed = nn.Embedding(vocab, width, dtype=F64)
        self.norm = nn.LayerNorm(width, dtype=F64)
        self.qkv = nn.Linear(width, 3 * width, dtype=F64)
        self.out = nn.Linear(width, width, dtype=F64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"up": nn.Linear(width, 2 * width, dtype=F64), "down": nn.Linear(2 * width, width, dtype=F64)}
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, vocab, bias=False, dtype=F64)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.view(*ids.shape, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        for block in self.blocks:
            x = x + block["down"](F.gelu(block["up"](x)))
        return self.head(x)


PLAN = {
    "embed": "vocab",
    "qkv": Column(pieces=[Piece("q", 16), Piece("k", 16), Piece("v", 16)]),
    "out": "row",
    "blocks.*.up": "column",
    "blocks.*.down": "row",
    "head": Column(gather_output=True),
}


def sharded_model(size: int) -> None:
    axis = tensor_axis(size)
    torch.manual_seed(0)
    dense = Plain(12)
    torch.manual_seed(axis.rank)  # ranks that started from other weights get those of rank 0
    model = Plain(12)
    model.load_state_dict(dense.state_dict()) if axis.rank == 0 else None
    assert shard_module(model, PLAN, axis) is model
    assert model.qkv.weight.shape == (48 // size, 16) and model.out.weight.shape == (16, 16 // size)
    assert model.head.weight is model.embed.weight, "what was tied stays tied"
    ids = torch.randint(0, 12, (2, 5), generator=torch.Generator().manual_seed(3))
    y, z = dense(ids), model(ids)
    close(z, y)
    for out in (y, z):
        (out * torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)).sum().backward()
    close(whole_gradient(model.embed, "weight", axis), dense.embed.weight.grad)
    close(whole_gradient(model.out, "weight", axis), dense.out.weight.grad)
    close(whole_gradient(model.blocks[1]["up"], "weight", axis), dense.blocks[1]["up"].weight.grad)
    close(model.norm.weight.grad, dense.norm.weight.grad)
    close(model.out.bias.grad, dense.out.bias.grad)
    q, k, v = dense.qkv.weight.grad.chunk(3)
    step = 16 // size
    mine = slice(axis.rank * step, (axis.rank + 1) * step)
    close(model.qkv.weight.grad, torch.cat([q[mine], k[mine], v[mine]]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_plain_module_is_sharded_by_name(ranks, size: int):
    ranks(size, sharded_model, size)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"heed": "column"}, "no module is named 'heed'; did you mean head"),
        ({"out": "rows"}, "asks for 'rows'; the styles are column, row, vocab"),
        ({"norm": "column"}, "norm is a LayerNorm; Column cuts a plain Linear"),
        ({"embed": "vocab"}, "head shares a weight with embed"),
        ({"blocks.0.up": "column", "blocks.*.up": "row"}, "blocks.0.up is matched by two patterns"),
        ({"out": Column(pieces=[Piece("a", 16, num_shards=1)])}, "pieces that several ranks repeat"),
        ({"out": Column(pieces=[Piece("a", 16)], gather_output=True)}, "exclude each other"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_changes(plan: dict[str, Any], message: str):
    axis = Axis("tensor", rank=0, ranks=(0, 1), group=object())
    model = Plain(12)
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match=message):
        shard_module(model, plan, axis)
    assert dict(model.named_modules()) == before


def test_a_plan_for_sizes_that_do_not_divide_names_the_layer():
    axis = Axis("tensor", rank=0, ranks=tuple(range(5)), group=object())
    with pytest.raises(ConfigError, match=r"plan: out: in_features=16 does not divide by tensor=5"):
        shard_module(Plain(12), {"out": "row"}, axis)
    with pytest.raises(ConfigError, match="share a weight but are cut differently"):
        shard_module(Plain(12), {"embed": "vocab", "head": "row"}, Axis("tensor", 0, (0, 1, 2, 3), object()))
