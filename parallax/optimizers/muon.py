"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; scaled as in arXiv:2502.16982): momentum whose hidden
matrices are made orthogonal, whole, however they are cut."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parallax.comm import all_gather, all_reduce
from parallax.config import OptimizerConfig
from parallax.data.buckets import FlatBuffers
from parallax.data.layout import Bucket, Placed, Segment
from parallax.mesh import Axis, Mesh
from parallax.optimizers.train import TrainOptimizer
from parallax.params import ParamSpec
from parallax.tensor.products import by_faster_library

__all__ = ["Muon", "orthogonalise"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2
"""Root mean square of AdamW's usual update: with it one learning rate serves both."""


def orthogonalise(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition: five Newton-Schulz iterations, singular values in 0.7 to 1.2.

    matrix: [A, B]. On a GPU the iterations run in bfloat16, but for float64; elsewhere in the matrix's own dtype.
    """
    x = matrix.bfloat16() if matrix.is_cuda and matrix.dtype != torch.float64 else matrix
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    with by_faster_library(x):
        for _ in range(ITERATIONS):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(TrainOptimizer):
    """Muon for the hidden matrices, AdamW for the rest (embeddings, head, norms, biases).

    A hidden matrix is a canonical parameter: q, k and v are one each. Its update is gathered over the shards of ZeRO
    and over tensor, made orthogonal by one of the ranks that share it, and summed back (the others add zeros), so all
    have the same bits. Nesterov momentum optimizer.momentum, update scaled by 0.2 sqrt(max(A, B)).
    Volume a step and rank, for M bytes of this stage's hidden matrices as float32: 2M(n-1)/n over mesh.grad; with ZeRO
    M(n-1)/n more over its shards; over tensor 4M(n-1)/n.
    """

    def __init__(
        self, config: OptimizerConfig, flats: Mapping[int, FlatBuffers], mesh: Mesh, shards: Axis, seed: int = 0
    ) -> None:
        self.mesh, self.shards = mesh, shards
        super().__init__(config, flats, seed)

    def empty_state(self, segment: Segment, master: Tensor) -> dict[str, Tensor]:
        if segment.kind.startswith("hidden"):  # where it is gathered from, and never rounded
            return {"momentum_buffer": torch.zeros_like(master, requires_grad=False)}
        return super().empty_state(segment, master)

    def step_at(self, lr: float) -> None:
        super().step_at(lr)
        with torch.no_grad():
            for stage, flat in self.flats.items():
                for bucket in flat.buckets:
                    matrices = [(p, s) for p in bucket.placed for s in p.specs if flat.kind_of(s).startswith("hidden")]
                    if matrices:
                        self._update_bucket(stage, flat, bucket, matrices, lr)

    def _update_bucket(
        self, stage: int, flat: FlatBuffers, bucket: Bucket, matrices: list[tuple[Placed, ParamSpec]], lr: float
    ) -> None:
        begin, end = bucket.own
        parts = [
            (index, s, max(begin, s.start), min(end, s.stop))
            for index, s in enumerate(flat.segments)
            if s.kind.startswith("hidden") and max(begin, s.start) < min(end, s.stop)
        ]
        own = torch.zeros(end - begin, dtype=_wide(flat.grad_dtype), device=flat.device)
        for index, segment, first, last in parts:
            grad = flat.grads_of(segment)[first - segment.start : last - segment.start].to(own.dtype)
            buffer = self.state[stage][index]["momentum_buffer"][first - segment.start : last - segment.start]
            buffer.lerp_(grad.to(buffer.device), 1 - self.config.momentum)
            own[first - begin : last - begin] = grad.lerp(buffer.to(grad.device), self.config.momentum)
        whole = all_gather(own, self.shards)
        self._orthogonalise(whole, bucket, matrices)
        update = whole[begin - bucket.start : end - bucket.start]
        for index, segment, first, last in parts:
            place = slice(first - segment.start, last - segment.start)
            master = self.masters[stage][index].data[place]
            decay = self.config.weight_decay if segment.kind == "hidden" else 0.0
            master.mul_(1 - lr * decay).add_(update[first - begin : last - begin].to(master), alpha=-lr)
            if self.apart:
                flat.values_of(segment)[place].copy_(master, non_blocking=True)

    def _orthogonalise(self, whole: Tensor, bucket: Bucket, matrices: list[tuple[Placed, ParamSpec]]) -> None:
        """Replace this rank's boxes of the matrices in `whole`, a bucket's updates, by those of the orthogonal ones."""
        mesh = self.mesh
        sizes = [spec.global_shape[0] * spec.global_shape[1] for _, spec in matrices]
        message = whole.new_zeros(sum(sizes))
        every = [m.view(s.global_shape) for m, (_, s) in zip(message.split(sizes), matrices, strict=True)]
        mine = [spec.view(placed.of(whole, bucket.start)) for placed, spec in matrices]
        boxes = [tuple(slice(*cut) for cut in spec.box) for _, spec in matrices]
        for matrix, box, part, (_, spec) in zip(every, boxes, mine, matrices, strict=True):
            if spec.owned:  # one of those that hold the same box
                matrix[box] = part
        all_reduce(message, mesh.tensor)
        turn = mesh.grad.rank * mesh.tensor.size + mesh.tensor.rank
        for number, matrix in enumerate(every):
            if number % (mesh.grad.size * mesh.tensor.size) == turn:
                scale = RMS * max(matrix.shape) ** 0.5
                matrix.copy_(orthogonalise(matrix).mul_(scale))
            else:
                matrix.zero_()
        all_reduce(all_reduce(message, mesh.tensor), mesh.grad)
        for matrix, box, part in zip(every, boxes, mine, strict=True):
            part.copy_(matrix[box])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
