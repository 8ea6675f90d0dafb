"""PowerSGD (arXiv:1905.13727): each gradient matrix travels as the two thin factors of one power iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from parallax.comm import sum_start
from parallax.data.compress import Compressor, Part, Steps, aligned, message_for, put
from parallax.data.layout import Bucket
from parallax.mesh import Axis
from parallax.rng import derive_key, fill_normal

__all__ = ["PowerSGD"]


class PowerSGD(Compressor):
    """M is approximated by P Q^T: P = orthonormal(sum of M Q), then Q = sum of M^T P, where Q is the last step's.

    Linear in M, so P and Q are sums over the ranks, and their bytes do not grow with the number of ranks. A matrix is a
    parameter's box: on another tensor size the factors are of other matrices. Where the factors have no fewer elements
    than the box, and for vectors, the gradient goes as it is, in the message of the Ps.

    Volume a step and rank over the n data ranks, in two sums a bucket: 2(n-1)/n of the bytes of rank*(rows + columns)
    elements a matrix, and of the rest; each of those padded to 64 elements, each message to 64n.
    """

    kind = "powersgd"

    def __init__(
        self, axis: Axis, parts: Mapping[Bucket, Sequence[Part]], rank: int, seed: int, dtype: torch.dtype
    ) -> None:
        super().__init__(axis, parts)
        self.rank = rank
        self._next: dict[Part, Tensor] = {}
        for bucket, members in parts.items():
            device = bucket.placed[0].parameter.device
            for part in members:
                if self.takes(part):
                    shape = (part.num_blocks, part.block_shape[1], self.rank_of(part))
                    q = torch.empty(1, *shape[1:], dtype=dtype, device=device)
                    box = ((part.block, part.block + 1), (0, shape[1]), (0, shape[2]))
                    fill_normal(q, box, shape, derive_key(seed, "powersgd", part.spec.name), 0.0, 1.0)
                    self.warm[part] = q[0]

    def rank_of(self, part: Part) -> int:
        """The rank of its factors: no more than the matrix can have."""
        return min(self.rank, *part.block_shape)

    def takes(self, part: Part) -> bool:
        rows, columns = part.block_shape
        rank = self.rank_of(part)
        fewer = aligned(rank * rows) + aligned(rank * columns) < aligned(rows * columns)
        return fewer and super().takes(part)

    def reduce(self, bucket: Bucket, delta: Tensor, out: Tensor) -> Steps:
        taken, plain = self.split(bucket)
        if not taken and not plain:
            return
        sizes = [part.rows * self.rank_of(part) for part in taken] + [part.stop - part.start for part in plain]
        message, views = message_for(sizes, delta, self.axis)
        for part, view in zip(taken, views, strict=False):
            torch.mm(part.matrix(delta), self.warm[part], out=view.view(part.rows, -1))
        for part, view in zip(plain, views[len(taken) :], strict=True):
            view.copy_(part.of(delta))
            part.of(delta).zero_()
        yield sum_start(message, self.axis)
        put(plain, views[len(taken) :], out)
        if not taken:
            return
        ps = [orthonormal(view.view(part.rows, -1)) for part, view in zip(taken, views, strict=False)]
        message, views = message_for([self.warm[part].numel() for part in taken], delta, self.axis)
        for part, p, view in zip(taken, ps, views, strict=True):
            matrix, q = part.matrix(delta), view.view(-1, self.rank_of(part))
            torch.mm(matrix.T, p, out=q)
            matrix.addmm_(p, q.T, alpha=-1)  # what this rank's own share of the sum leaves out
        yield sum_start(message, self.axis)
        for part, p, view in zip(taken, ps, views, strict=True):
            q = view.view(-1, self.rank_of(part))
            torch.mm(p, q.T, out=part.matrix(out))
            self._next[part] = q.clone()

    def commit(self) -> None:
        self.warm.update(self._next)
        self._next.clear()

    def forget(self) -> None:
        self._next.clear()


def orthonormal(p: Tensor) -> Tensor:
    """Orthonormal columns that span those of p, in p's shape: with fewer rows than columns, the last ones are zero.

    By Householder reflections, which find orthonormal columns for a p of any rank, even for zeros: a parameter that got
    no gradient for a while must not be stuck there.
    """
    q = torch.linalg.qr(p).Q
    if q.shape == p.shape:
        return q.contiguous()
    whole = torch.zeros_like(p)
    whole[:, : q.shape[1]] = q
    return whole
