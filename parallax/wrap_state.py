"""The state of an optimizer over flat segments: by parameter, as torch's own optimizers write it, or a rank's part."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parallax.comm import all_gather, gather_json
from parallax.data.layout import Placed
from parallax.errors import ConfigError
from parallax.optimizers import FlatOptimizer

if TYPE_CHECKING:
    from parallax.wrap import DataParallel

__all__ = ["FlatState"]

MARK = "parallax"
"""The entry of a state dict that says whose part it is; what has none is whole, on every rank the same."""

SAME = "build model and optimizer as they were when it was saved, with the same no_decay"
FLAT = "and here all parameters of a group advance together; begin with a new optimizer, or give it a state that agrees"
SHARED = {"step", "mu_product", "eta", "mu"}
"""State of torch's optimizers that is one number for a parameter."""


class FlatState:
    """Writes and reads the state of a FlatOptimizer over the flat buffers of a wrapped module.

    Whole: torch's layout, parameters numbered group after group in the module's order, with their names; an element's
    state has its parameter's shape, and `masters` are there where they are apart from the model. Part: the inner
    optimizer's own state over flat segments, with a mark of rank, level and layout.
    """

    def __init__(self, model: DataParallel, optimizer: FlatOptimizer) -> None:
        self.model, self.optimizer, self.flat = model, optimizer, model.flat
        placed = {p.name: p for p in self.flat.placed if p.start < self.flat.stop}
        self.groups: list[list[Placed]] = [[] for _ in optimizer.inner.param_groups]
        for name, _ in model.module.named_parameters():
            if name in placed:
                self.groups[self._group_of(placed[name].specs[0])].append(placed[name])
        numbers = iter(range(len(placed)))
        self.numbers = [[next(numbers) for _ in group] for group in self.groups]
        layout = [(p.name, p.shape, p.start, self.flat.kind_of(p.specs[0])) for p in self.flat.placed]
        self._layout = hashlib.sha256(repr(layout).encode()).hexdigest()[:16]

    def _group_of(self, spec: Any) -> int:
        return self.optimizer.group_of_kind[self.flat.kind_of(spec)]

    @property
    def cut(self) -> bool:
        """Whether a rank has a part of the state alone."""
        return self.model.shards.size > 1

    def _tensor_mark(self) -> dict[str, Any]:
        axis = self.model.mesh.tensor
        return {"tensor_rank": axis.rank, "tensor_ranks": axis.size} if axis.size > 1 else {}

    def _mark(self) -> dict[str, Any]:
        shards = self.model.shards
        part = {"rank": shards.rank, "ranks": shards.size, "zero": self.flat.level, "layout": self._layout}
        return part | self._tensor_mark()

    # --- writing --------------------------------------------------------------------------------

    def part(self) -> dict[str, Any]:
        """This rank's part. No collective."""
        masters = {"masters": [master.detach() for master in self._masters]} if self.optimizer.apart else {}
        return self.optimizer.inner.state_dict() | masters | {MARK: self._mark()}

    def whole(self) -> dict[str, Any]:
        """All of it, on every rank of the shards. A collective where it is cut: (n-1)/n of the state's bytes."""
        inner = self.optimizer.inner
        told = self._describe()
        state: dict[int, dict[str, Any]] = {number: {} for numbers in self.numbers for number in numbers}
        for key, dtype in {k: v["element"] for keys in told for k, v in keys.items() if "element" in v}.items():
            empty = {m: torch.zeros(m.shape, dtype=getattr(torch, dtype), device=m.device) for m in self._masters}
            values = self._gather([inner.state.get(m, {}).get(key, empty[m]) for m in self._masters])
            for group, numbers, keys in zip(self.groups, self.numbers, told, strict=True):
                for placed, number in zip(group, numbers, strict=True) if key in keys else ():
                    state[number][key] = values[placed]
        for numbers, keys in zip(self.numbers, told, strict=True):
            for key, what in keys.items():
                for number in numbers if "value" in what else ():
                    dtype, value = what["dtype"], what["value"]
                    state[number][key] = torch.tensor(value, dtype=getattr(torch, dtype)) if dtype else value
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            | {"params": numbers, "param_names": [placed.name for placed in members]}
            for group, numbers, members in zip(inner.param_groups, self.numbers, self.groups, strict=True)
        ]
        whole = {"state": {number: found for number, found in state.items() if found}, "param_groups": groups}
        if self.optimizer.apart:
            values = self._gather([master.detach() for master in self._masters])
            pairs = (pair for g, n in zip(self.groups, self.numbers, strict=True) for pair in zip(g, n, strict=True))
            whole["masters"] = {number: values[placed] for placed, number in pairs}
        return whole | ({MARK: mark} if (mark := self._tensor_mark()) else {})

    @property
    def _masters(self) -> list[torch.nn.Parameter]:
        return self.optimizer.masters[0]

    def _describe(self) -> list[dict[str, Any]]:
        """For each group its keys of state: the dtype of an element's, the value of what a whole segment shares."""
        mine: list[dict[str, Any]] = []
        for group in self.optimizer.inner.param_groups:
            states = [(self.optimizer.inner.state.get(m, {}), tuple(m.shape)) for m in group["params"][:1]]
            mine.append({key: _description(value, shape) for found, shape in states for key, value in found.items()})
        every = gather_json(mine, self.model.shards, self.model.mesh.device)
        told: list[dict[str, Any]] = [
            next((keys for keys in column if keys), {}) for column in zip(*every, strict=True)
        ]
        for key, what in ((k, v) for keys in told for k, v in keys.items()):
            if "strange" in what:
                raise ConfigError(
                    f"the optimizer's state {key} is {what['strange']}, no number for each element or for all, and "
                    "cannot be written by parameter; let every rank save its own part: state_dict()"
                )
        return told

    def _gather(self, of_segments: list[Tensor]) -> dict[Placed, Tensor]:
        """Each parameter's values out of those of this rank's segments, which lie end to end as its ranges do."""
        own = of_segments[0] if len(of_segments) == 1 else torch.cat(of_segments)
        found = {}
        for bucket in self.flat.buckets:
            values = own[bucket.own_at : bucket.own_at + bucket.own[1] - bucket.own[0]]
            whole = all_gather(values, self.model.shards)
            found.update({placed: placed.of(whole, bucket.start) for placed in bucket.placed})
        return found

    # --- reading --------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, saved: Mapping[str, Any]) -> None:
        """Take a state over, whole or this rank's part; else ConfigError, the same on every rank.

        Sends 520 bytes to each of the shards and of the tensor ranks, where there are several.
        """
        problem = self._problem(saved)
        for axis in (self.model.mesh.tensor, self.model.shards):
            problem = next((text for text in gather_json(problem, axis, self.model.mesh.device) if text), "")
        if problem:
            raise ConfigError(problem)
        if "layout" in saved.get(MARK, {}):
            self.optimizer.inner.load_state_dict({k: v for k, v in saved.items() if k not in ("masters", MARK)})
            for master, values in zip(self._masters, saved.get("masters", ()), strict=False):
                master.copy_(values)
        else:
            self._load_whole(saved)

    def _problem(self, saved: Mapping[str, Any]) -> str:
        """Why this rank cannot take a state, in words; empty where it can."""
        mark, shards = saved.get(MARK, {}), self.model.shards
        tensor = {key: mark[key] for key in ("tensor_rank", "tensor_ranks") if key in mark}
        if tensor != self._tensor_mark():
            return (
                f"an optimizer's state of tensor rank {tensor.get('tensor_rank', 0)} of {tensor.get('tensor_ranks', 1)}"
                f" does not fit rank {self.model.mesh.tensor.rank} of {self.model.mesh.tensor.size}; let every tensor "
                "rank save and load a file of its own, on a mesh with as many"
            )
        if "layout" not in mark:
            return self._problem_of_whole(saved)
        if (mark["rank"], mark["ranks"], mark["layout"]) == (shards.rank, shards.size, self._layout):
            return ""
        return (
            f"this optimizer's state is the part of rank {mark['rank']} of {mark['ranks']} at zero={mark['zero']}, and "
            f"rank {shards.rank} of {shards.size} at zero={self.flat.level} cannot go on from it; save "
            "optimizer.whole_state_dict(), which all ranks call, one of them writes and any rank loads at any zero; "
            "or let every rank save and load a file of its own, with the same model, mesh and options"
        )

    def _problem_of_whole(self, saved: Mapping[str, Any]) -> str:
        if not {"state", "param_groups"} <= saved.keys():
            return f"an optimizer's state has state and param_groups, and this has {', '.join(map(str, saved))}"
        groups = saved["param_groups"]
        theirs, mine = [len(group["params"]) for group in groups], [len(group) for group in self.groups]
        if theirs != mine:
            return f"the state has groups of {theirs} parameters, this optimizer of {mine}; {SAME}"
        for group, members in zip(groups, self.groups, strict=True):
            names = {placed.name for placed in members}
            if names != set(group.get("param_names") or names):
                name = min(names ^ set(group["param_names"]))
                return f"{name} is in a group of the state or of this optimizer alone; {SAME}"
        numbers = self._saved_numbers(saved)
        for members in self.groups:
            found = {placed: saved["state"].get(numbers[placed], {}) for placed in members}
            for placed, of in found.items():
                if of.keys() != found[members[0]].keys():
                    return f"{placed.name} and {members[0].name} have other kinds of state, {FLAT}"
            for key in found[members[0]]:
                if text := _problem_of_key({placed: of[key] for placed, of in found.items()}, key):
                    return text
        return ""

    def _load_whole(self, saved: Mapping[str, Any]) -> None:
        numbers = self._saved_numbers(saved)
        state: dict[int, dict[str, Any]] = {}
        for number, (index, master) in enumerate(self._numbered()):
            members = self.groups[self.optimizer.group_of_kind[self.flat.segments[index].kind]]
            found = {placed: saved["state"].get(numbers[placed], {}) for placed in members}
            keys = found[members[0]]
            state[number] = {key: self._of_segment({p: of[key] for p, of in found.items()}, index, key) for key in keys}
            if self.optimizer.apart and saved.get("masters"):
                values = {placed: saved["masters"][numbers[placed]] for placed in members}
                master.copy_(self._of_segment(values, index, "masters"))
        numbering = itertools.count()
        groups = [
            {k: v for k, v in group.items() if k not in ("params", "param_names")}
            | {"params": [next(numbering) for _ in own["params"]]}
            for group, own in zip(saved["param_groups"], self.optimizer.inner.param_groups, strict=True)
        ]
        state = {number: found for number, found in state.items() if found}
        self.optimizer.inner.load_state_dict({"state": state, "param_groups": groups})

    def _saved_numbers(self, saved: Mapping[str, Any]) -> dict[Placed, Any]:
        """The number of each parameter in a whole state: by its name, or by its place where there are no names."""
        numbers: dict[Placed, Any] = {}
        for group, members in zip(saved["param_groups"], self.groups, strict=True):
            place = {name: i for i, name in enumerate(group.get("param_names") or [p.name for p in members])}
            numbers.update({placed: group["params"][place[placed.name]] for placed in members})
        return numbers

    def _numbered(self) -> Iterator[tuple[int, torch.nn.Parameter]]:
        """The masters as torch numbers them, group after group, each with the index of its segment."""
        index_of = {id(master): index for index, master in enumerate(self._masters)}
        for group in self.optimizer.inner.param_groups:
            for master in group["params"]:
                yield index_of[id(master)], master

    def _of_segment(self, values: Mapping[Placed, Any], index: int, key: str) -> Any:
        """What parameters have, as one segment has it."""
        segment, example = self.flat.segments[index], next(iter(values.values()))
        if not _by_element(values, key):
            return example.clone() if isinstance(example, Tensor) else example
        flat = torch.zeros(segment.stop - segment.start, dtype=example.dtype, device=self._masters[index].device)
        for placed, tensor in values.items():
            start, stop = max(segment.start, placed.start), min(segment.stop, placed.stop)
            if start < stop:
                cut = tensor.reshape(-1)[start - placed.start : stop - placed.start]
                flat[start - segment.start : stop - segment.start].copy_(cut)
        return flat


def _description(value: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """What JSON can say of a state."""
    if isinstance(value, Tensor) and tuple(value.shape) == shape:
        return {"element": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        return {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value, "dtype": ""}
    return {"strange": f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"}


def _by_element(values: Mapping[Placed, Any], key: str) -> bool:
    """Whether a state has a number for each element, or one for all. Parameters without dims do not tell: by name."""
    shapes = [(placed.shape, tuple(v.shape)) for placed, v in values.items() if isinstance(v, Tensor)]
    telling = [mine == theirs for mine, theirs in shapes if mine]
    return any(telling) if telling else bool(shapes) and key not in SHARED


def _problem_of_key(values: Mapping[Placed, Any], key: str) -> str:
    first, example = next(iter(values.items()))
    by_element = _by_element(values, key)
    for placed, value in values.items():
        if by_element and (not isinstance(value, Tensor) or tuple(value.shape) != placed.shape):
            shape = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            return f"the state {key} of {placed.name} is {shape}, and the parameter {placed.shape}; {SAME}"
        if not by_element and (isinstance(value, Tensor) and value.dim() > 0 or bool(value != example)):
            return f"the state {key} of {first.name} is {example} and of {placed.name} {value}, {FLAT}"
    return ""
