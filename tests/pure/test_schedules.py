"""The laws of every registered schedule, and faults that must be refused. A new schedule brings its own tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from parallax.errors import ScheduleError
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import COMPUTE, WHOLE_STAGE, Action, Op, Schedule
from parallax.pipeline.schedules import (
    SCHEDULES,
    forward_only,
    gpipe,
    interleaved,
    make_schedule,
    one_f_one_b,
    zb_h1,
    zb_h2,
)
from parallax.pipeline.simulate import Cost, simulate
from parallax.pipeline.v_schedules import dualpipe_v, v_half, v_min, zb_v
from parallax.pipeline.validate import Wire, validate

SIZES = [
    (p, m) for p in range(1, 9) for m in sorted({1, 2, 3, p - 1, p, p + 1, 2 * p - 1, 2 * p, 3 * p + 2, 4 * p} - {0})
]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_complete_and_ends_on_every_wire(name: str):
    for p, m in SIZES:
        lowered = lower(SCHEDULES[name](p, m))
        for wire in Wire:
            validate(lowered, wire=wire)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_stage_and_microbatch_occurs_once(name: str):
    for p, m in SIZES:
        schedule = SCHEDULES[name](p, m)
        done = [str(action) for _, _, action in schedule.actions()]
        assert len(done) == len(set(done))
        forwards = {(a.stage, a.microbatch) for _, _, a in schedule.actions() if a.op == Op.F}
        assert forwards == {(s, i) for s in range(schedule.num_stages) for i in range(m)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_table_that_runs_takes_as_long_as_the_one_that_is_drawn(name: str):
    """Lowering changes no time when messages are free. A lone microbatch pays for every message there and back."""
    cost = Cost(forward=1.0, input_grad=1.5, weight_grad=0.5)
    slow = Cost(forward=1.0, input_grad=1.5, weight_grad=0.5, send_s=0.25)
    for p, m in [(1, 3), (2, 1), (2, 4), (4, 1), (4, 7), (8, 8)]:
        table = SCHEDULES[name](p, m)
        free = simulate(table, cost).makespan
        assert simulate(lower(table), cost).makespan == pytest.approx(free)
        assert simulate(lower(table), slow).makespan == pytest.approx(simulate(table, slow).makespan)
        if m == 1 and p > 1:
            crossings = sum(a != b for a, b in zip(table.stage_to_rank, table.stage_to_rank[1:], strict=False))
            assert simulate(lower(table), slow).makespan > free + 0.25 * crossings


@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
@pytest.mark.parametrize(("forward", "backward"), [(1.0, 2.0), (1.0, 1.0), (3.0, 1.0)])
def test_makespan_and_bubble_of_the_papers(make: Callable[..., Schedule], forward: float, backward: float):
    for p, m in SIZES:
        timeline = simulate(make(p, m), Cost(forward, backward / 2, backward / 2))
        assert timeline.makespan == pytest.approx((m + p - 1) * (forward + backward))
        assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1))


def test_in_flight_of_the_papers():
    for p, m in SIZES:
        assert simulate(gpipe(p, m), Cost()).in_flight == (m,) * p
        assert simulate(one_f_one_b(p, m), Cost()).in_flight == tuple(min(p - r, m) for r in range(p))


def test_a_slow_stage_sets_the_pace():
    cost = Cost(forward=[1, 1, 5, 1], input_grad=[1, 1, 5, 1], weight_grad=[1, 1, 5, 1])
    timeline = simulate(one_f_one_b(4, 32), cost)
    assert timeline.busy == pytest.approx((96, 96, 480, 96))
    assert 480 <= timeline.makespan < 480 * 1.1


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_form_reads_back(name: str):
    for _, _, action in lower(SCHEDULES[name](4, 6)).actions():
        assert Action.parse(str(action)) == action
    assert str(Action(3, Op.SEND_B, 1)) == "3SEND_B1" and str(Action(0, Op.UNSHARD)) == "0UNSHARD"


@pytest.mark.parametrize("text", ["", "F0", "0X1", "0F", "0UNSHARD3", "-1F0", "0F0 1", "0 F 0"])
def test_text_that_is_no_action_is_refused(text: str):
    with pytest.raises(ScheduleError, match="is no action; write stage, op, microbatch"):
        Action.parse(text)


@pytest.mark.parametrize("name", SCHEDULES)
def test_lowering_adds_the_messages_and_nothing_else(name: str):
    for p, m in [(1, 2), (2, 3), (5, 6)]:
        table = SCHEDULES[name](p, m)
        lowered = lower(table)
        assert lower(lowered) is lowered or p == 1
        for before, after in zip(table.programs, lowered.programs, strict=True):
            assert tuple(a for a in after if a.op in COMPUTE) == before
        counts = {op: sum(a.op == op for _, _, a in lowered.actions()) for op in Op}
        crossings = sum(a != b for a, b in zip(table.stage_to_rank, table.stage_to_rank[1:], strict=False))
        for op in (Op.SEND_F, Op.RECV_F, Op.SEND_B, Op.RECV_B):
            assert counts[op] == crossings * m
        assert counts[Op.UNSHARD] == counts[Op.RESHARD] == counts[Op.REDUCE_GRAD] == table.num_stages


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_stage_is_gathered_before_its_first_use_and_reduced_after_its_last(name: str):
    lowered = lower(SCHEDULES[name](3, 5))
    for stage, rank in enumerate(lowered.stage_to_rank):
        ops = [a.op for a in lowered.programs[rank] if a.stage == stage and a.op in (*COMPUTE, *WHOLE_STAGE)]
        assert ops[0] == Op.UNSHARD and ops[-2:] == [Op.REDUCE_GRAD, Op.RESHARD]
        assert set(ops[1:-2]) <= COMPUTE


@pytest.mark.parametrize("name", SCHEDULES)
def test_evaluation_has_the_forwards_alone(name: str):
    schedule = forward_only(SCHEDULES[name](4, 6))
    lowered = lower(schedule)
    for wire in Wire:
        validate(lowered, wire=wire)
    assert not schedule.trains
    assert {a.op for _, _, a in lowered.actions()} == {Op.F, Op.SEND_F, Op.RECV_F, Op.UNSHARD, Op.RESHARD}
    assert simulate(schedule, Cost()).in_flight == (0, 0, 0, 0)


@pytest.mark.parametrize("stages_per_rank", [1, 2, 3, 4])
def test_interleaved_ends_for_any_number_of_stages_and_microbatches(stages_per_rank: int):
    for p, m in SIZES:
        schedule = interleaved(p, m, stages_per_rank)
        for wire in Wire:
            validate(lower(schedule), wire=wire)
        timeline = simulate(schedule, Cost(1.0, 1.0, 1.0))
        if m >= p:
            assert timeline.makespan == pytest.approx((m * stages_per_rank + p - 1) * 3.0)
        group = m if m < 2 * p else -(-m // (m // p))
        for rank, most in enumerate(timeline.in_flight):
            assert most == min(m * stages_per_rank, 2 * (p - 1 - rank) + (stages_per_rank - 1) * group + 1)
    if stages_per_rank == 1:
        assert simulate(interleaved(4, 8, 1), Cost()).in_flight == (7, 5, 3, 1)


def test_zb_h1_has_a_third_of_the_bubble_in_the_memory_of_1f1b():
    for p, m in SIZES:
        if m < p:
            continue
        for forward, backward, weight in [(1, 1, 1), (2, 2, 2)]:
            timeline = simulate(zb_h1(p, m), Cost(forward, backward, weight))
            assert timeline.makespan == m * (forward + backward + weight) + (p - 1) * (forward + backward - weight)
        assert simulate(zb_h1(p, m), Cost()).in_flight == (min(p, m),) * p
        assert simulate(one_f_one_b(p, m), Cost()).in_flight[0] == min(p, m)


def test_what_is_held_between_i_and_w_is_counted():
    assert simulate(zb_h1(4, 9), Cost()).held == (1, 2, 3, 4)
    assert simulate(zb_h2(4, 9), Cost()).held == (1, 3, 5, 7)
    assert simulate(one_f_one_b(4, 9), Cost()).held == (0, 0, 0, 0)


def test_a_message_costs_its_latency_once_a_hop():
    """gpipe's first microbatch goes down p - 1 hops and its last gradient comes up as many."""
    for p, m in SIZES:
        for table in (gpipe(p, m), lower(gpipe(p, m))):
            timeline = simulate(table, Cost(send_s=0.25))
            assert timeline.makespan == (m + p - 1) * 3 + 2 * (p - 1) * 0.25


def test_zb_h2_has_no_bubble_inside_a_rank():
    for p, m in SIZES:
        timeline = simulate(zb_h2(p, m), Cost())
        assert timeline.in_flight == (min(2 * p - 1, m),) * p
        if m >= 2 * p - 1:
            assert timeline.makespan == 3 * m + p - 1 and timeline.inner_bubble == 0


def test_zb_v_has_no_bubble_inside_a_rank_in_the_memory_of_1f1b():
    for p, m in SIZES:
        timeline = simulate(zb_v(p, m), Cost())
        assert max(timeline.in_flight) <= 2 * p
        if m >= 2 * p - 1:
            assert timeline.makespan == 6 * m + p - 1 and timeline.inner_bubble == 0


def test_dualpipe_v_and_its_memory():
    for p, m in SIZES:
        timeline = simulate(dualpipe_v(p, m), Cost())
        assert max(timeline.in_flight) <= 2 * p + 1
        if m >= 2 * p > 2:
            assert timeline.makespan == 6 * m + p


def test_v_min_and_v_half_trade_memory_for_a_constant_bubble():
    for p, m in SIZES:
        least, half = simulate(v_min(p, m), Cost()), simulate(v_half(p, m), Cost())
        assert max(least.in_flight) <= 2 * p / 3 + 3
        assert max(half.in_flight) <= p + 3
        if p > 1 and m >= p:
            assert least.makespan == 6 * m + 4 * p - 5 + (2 if p % 3 == 0 else 0)
            assert half.makespan <= 6 * m + 3.5 * p


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_reached_by_its_name(name: str):
    schedule = make_schedule(name, 3, 4)
    assert schedule.name == name and schedule.num_ranks == 3
    assert make_schedule(name, 3, 4, schedule.num_stages // 3) == schedule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b", 0, 1), "at least 1 rank and 1 microbatch, not 0 and 1"),
        (("zb-v", 1, 0), "at least 1 rank and 1 microbatch, not 1 and 0"),
        (("ZB_H1", 2, 2), "did you mean zb-h1"),
        (("1f1b", 2, 2, 2), "1f1b has 1 stages a rank, pipeline.stages_per_rank=2"),
        (("zb-v", 2, 2, 3), "zb-v has 2 stages a rank"),
    ],
)
def test_what_is_no_schedule_gets_the_fix(arguments: tuple[str, int, int], message: str):
    with pytest.raises(ScheduleError, match=message):
        make_schedule(*arguments)


# --- faults -----------------------------------------------------------------------------------


def changed(schedule: Schedule, rank: int, change: Callable[[list[Action]], object]) -> Schedule:
    program = list(schedule.programs[rank])
    change(program)
    programs = (*schedule.programs[:rank], tuple(program), *schedule.programs[rank + 1 :])
    return Schedule(schedule.name, schedule.num_microbatches, schedule.stage_to_rank, programs)


def at(text: str) -> Action:
    return Action.parse(text)


def swap(program: list[Action], left: str, right: str) -> None:
    i, j = program.index(at(left)), program.index(at(right))
    program[i], program[j] = program[j], program[i]


FAULTS: list[tuple[str, Callable[[list[Action]], object], str]] = [
    ("lost backward", lambda p: p.remove(at("1B2")), r"stage 1 \(rank 1\) has F for microbatch 2; it needs F and"),
    ("twice", lambda p: p.append(at("1F0")), r"rank 1, column \d+ \(1F0\) is there twice"),
    ("foreign stage", lambda p: p.append(at("0F0")), r"rank 1, column \d+ \(0F0\): stage 0 is on rank 0"),
    ("no such stage", lambda p: p.append(at("9F0")), r"\(9F0\): there are stages 0 to 2"),
    ("no such microbatch", lambda p: p.append(at("1F7")), r"\(1F7\): microbatches are 0 to 3"),
    ("order", lambda p: swap(p, "1B0", "1B1"), r"stage 1 accumulates gradients in the order \[1, 0, 2, 3\]"),
    ("both B and W", lambda p: p.append(at("1W0")), r"stage 1 \(rank 1\) has B, F, W"),
]


@pytest.mark.parametrize(("change", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_faulty_table_is_refused_with_its_place(change: Callable[[list[Action]], object], message: str):
    with pytest.raises(ScheduleError, match=message):
        validate(changed(one_f_one_b(3, 4), 1, change))


def test_a_receive_that_is_missing_is_named():
    broken = changed(lower(one_f_one_b(3, 4)), 1, lambda p: p.remove(at("1RECV_F2")))
    with pytest.raises(ScheduleError, match=r"rank 0, column \d+ \(0SEND_F2\) has no 1RECV_F2 to meet it"):
        validate(broken)


def test_a_send_before_what_it_sends_is_a_deadlock_that_is_named():
    broken = changed(lower(one_f_one_b(3, 4)), 1, lambda p: swap(p, "1SEND_F0", "1F0"))
    with pytest.raises(ScheduleError, match=r"rank 1, column \d+ \(1SEND_F0\) waits for 1F0"):
        validate(broken)


def test_a_reduction_before_the_last_gradient_is_refused():
    broken = changed(lower(one_f_one_b(3, 4)), 1, lambda p: swap(p, "1REDUCE_GRAD", "1B3"))
    with pytest.raises(
        ScheduleError, match=r"stage 1 \(rank 1\) has no REDUCE_GRAD after its last gradient in column 25"
    ):
        validate(broken)


def test_a_weight_gradient_before_its_input_gradient_is_refused():
    broken = changed(zb_h1(3, 4), 0, lambda p: swap(p, "0I0", "0W0"))
    with pytest.raises(ScheduleError, match=r"rank 0, column \d+ \(0W0\) waits for 0I0"):
        validate(broken)


@pytest.mark.parametrize("wire", Wire)
def test_a_receive_that_is_posted_does_not_hide_that_nothing_was_sent(wire: Wire):
    """Rank 0 waits for a gradient of what it has not sent yet; both RECVs are posted all along."""

    def late_send(program: list[Action]) -> None:
        program.append(program.pop(program.index(at("0SEND_F0"))))

    broken = changed(lower(one_f_one_b(2, 1)), 0, late_send)
    with pytest.raises(ScheduleError, match=r"\(0B0\) waits for 1SEND_B0; rank 1, .* \(1F0\) waits for 0SEND_F0"):
        validate(broken, wire=wire)


def test_two_ranks_that_wait_for_each_other_are_both_named():
    table = one_f_one_b(2, 2)
    broken = changed(table, 0, lambda p: swap(p, "0F0", "0B0"))
    with pytest.raises(ScheduleError, match=r"rank 0, column 0 \(0B0\) waits for 0F0.*rank 1, column 0 \(1F0\) waits"):
        validate(broken)
    with pytest.raises(ScheduleError, match="never ends: rank 0 at 0B0; rank 1 at 1F0"):
        simulate(broken, Cost())


def test_an_ordered_wire_refuses_messages_in_another_order():
    """A wire that matches by name does not mind."""
    broken = changed(lower(gpipe(2, 3)), 1, lambda p: swap(p, "1RECV_F0", "1RECV_F1"))
    validate(broken, wire=Wire.TAGGED)
    with pytest.raises(ScheduleError, match=r"message 0 is 0SEND_F0, but rank 1 receives 0SEND_F1"):
        validate(broken, wire=Wire.ORDERED)


def late(schedule: Schedule) -> Schedule:
    """Every RECV moved right before the compute that needs it, as a naive lowering has it."""
    programs = []
    for program in lower(schedule).programs:
        receives = {(a.stage, a.op, a.microbatch): a for a in program if a.op in (Op.RECV_F, Op.RECV_B)}
        out: list[Action] = []
        for action in program:
            if action.op in (Op.RECV_F, Op.RECV_B):
                continue
            need = {Op.F: Op.RECV_F, Op.B: Op.RECV_B}.get(action.op)
            if need and (action.stage, need, action.microbatch) in receives:
                out.append(receives[action.stage, need, action.microbatch])
            out.append(action)
        programs.append(tuple(out))
    return Schedule(schedule.name, schedule.num_microbatches, schedule.stage_to_rank, tuple(programs))


def test_one_f_one_b_with_late_receives_deadlocks_on_an_ordered_wire():
    """Both neighbours send first: with sends that wait, neither ever receives. So lower posts receives early."""
    broken = late(one_f_one_b(4, 8))
    validate(broken, wire=Wire.TAGGED)
    with pytest.raises(ScheduleError, match="cannot finish on a wire that is ordered"):
        validate(broken, wire=Wire.ORDERED)
