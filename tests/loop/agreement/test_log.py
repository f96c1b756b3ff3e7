"""The laws of the log, on two loops without JAX: random commands, promises, and delays of delivery."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventtrain import errors
from eventtrain.events.commands import SetHyperparam, Stop
from eventtrain.loop.agreement.log import (
    END,
    NOTHING,
    RECORD,
    ApplyCommand,
    DatedOrder,
    FollowerLog,
    LeaderLog,
    Moment,
    Promise,
    Record,
    TakeCheckpoint,
)
from eventtrain.loop.run_status import RunStatus

PHASES = st.lists(st.integers(0, 6), min_size=1, max_size=6)
"""How many steps are dispatched in each phase."""


def order(number: int) -> ApplyCommand:
    return ApplyCommand(command=SetHyperparam(name="learning_rate", value=number))


@dataclass
class Loop:
    """What both loops do at each moment: carry out orders, then dispatch a step or begin the next phase."""

    phases: list[int]
    status: RunStatus = field(default_factory=lambda: RunStatus(0, 0))
    carried_out: list[tuple[Moment, int]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.status.phase >= len(self.phases)

    def carry_out(self, command: ApplyCommand) -> None:
        assert isinstance(command.command, SetHyperparam)
        self.carried_out.append((self.status.moment, int(command.command.value)))

    def move_on(self) -> None:
        if self.status.moment.count < self.phases[self.status.phase]:
            self.status.step += 1
        else:
            self.status.begin_phase()


def follow(loop: Loop, log: FollowerLog, deliver: Callable[[], None] = lambda: None) -> bool:
    """One look of the follower at its log. Returns whether it moved on.

    Args:
        loop: of the follower.
        log: its log.
        deliver: may add records between the look for orders and the question how far the loop may go.
    """
    if loop.ended:
        return False
    is_promised = log.is_promised(loop.status.moment, loop.status.phase_step)
    while (found := log.take(loop.status.moment)) is not None:
        assert isinstance(found, ApplyCommand)
        loop.carry_out(found)
    if is_promised:
        deliver()
        phase, free = loop.status.phase, log.free(loop.status.moment)
        while free and loop.status.phase == phase and not loop.ended:  # as the hot path, which does not look
            loop.move_on()
            free -= 1
    return is_promised


@settings(max_examples=300, deadline=None)
@given(phases=PHASES, data=st.data())
def test_every_process_carries_out_the_same_orders_at_the_same_moments(phases, data):
    leader, follower = Loop(phases), Loop(phases)
    written, read = LeaderLog(), FollowerLog()
    under_way: deque[str] = deque()
    beside: deque[Promise] = deque()
    records = 0
    held: list[int] = []
    issued = 0
    while not leader.ended:
        for _ in range(data.draw(st.integers(0, 2), label="commands")):
            issued += 1
            held.append(issued)
        if written.is_open(leader.status.moment):
            for number in held:
                written.add(leader.status.moment, order(number), leader.status.phase_step)
                leader.carry_out(order(number))
            held.clear()
        ahead = 0 if held else data.draw(st.integers(0, 5), label="ahead")
        moment = leader.status.moment
        written.promise(Moment(moment.phase, moment.count + ahead), leader.status.phase_step)
        if data.draw(st.booleans(), label="sent") and (record := written.take_record()) is not None:
            if not record.orders and data.draw(st.booleans(), label="beside"):
                beside.append(Promise(records, record.promised, record.phase_step))
            else:
                records += 1
                under_way.append(RECORD.dump_json(record).decode())

        def deliver() -> None:
            for _ in range(data.draw(st.integers(0, 2), label="delivered")):
                if under_way:
                    read.add(RECORD.validate_json(under_way.popleft()))
            while beside and data.draw(st.booleans(), label="delivered beside"):
                promise = beside.popleft()
                if not data.draw(st.booleans(), label="lost"):
                    read.add_promise(promise)

        deliver()
        for _ in range(data.draw(st.integers(0, 3), label="looks")):
            follow(follower, read, deliver)
        assert (
            follower.status.moment <= written.promised or follower.status.phase <= written.promised.phase + 1
        )
        leader.move_on()
    written.promise(END)
    if (record := written.take_record()) is not None:
        under_way.append(RECORD.dump_json(record).decode())
    while under_way:
        read.add(RECORD.validate_json(under_way.popleft()))
    while follow(follower, read):
        pass
    assert follower.ended
    assert follower.carried_out == leader.carried_out
    assert follower.status == leader.status


@settings(max_examples=300, deadline=None)
@given(phases=PHASES, size=st.integers(1, 4), data=st.data())
def test_every_process_divides_the_groups_of_batches_alike(phases, size, data):
    written, read = LeaderLog(), FollowerLog()
    leader, follower = Loop(phases), Loop(phases)
    calls: list[tuple[Moment, int]] = []
    followed: list[tuple[Moment, int]] = []
    issued = 0

    def left_in_group(loop: Loop) -> int:
        count = loop.status.moment.count
        return min(size - count % size, loop.phases[loop.status.phase] - count)

    def follow_groups() -> None:
        while not follower.ended:
            moment = follower.status.moment
            is_promised = read.is_promised(moment, follower.status.phase_step)
            while (found := read.take(moment)) is not None:
                if isinstance(found, ApplyCommand):
                    follower.carry_out(found)
            if not is_promised:
                return
            left = left_in_group(follower)
            if left == 0:
                follower.move_on()
                continue
            steps = read.steps_of_call(moment, left)
            if steps is None:
                return
            followed.append((moment, steps))
            follower.status.step += steps

    while not leader.ended:
        moment, left = leader.status.moment, left_in_group(leader)
        for _ in range(data.draw(st.integers(0, 2), label="commands")):
            issued += 1
            written.add(moment, order(issued), leader.status.phase_step)
            leader.carry_out(order(issued))
        if left == 0:
            leader.move_on()
            continue
        steps = data.draw(st.integers(1, left), label="steps")
        written.promise_call(moment, steps, left, leader.status.phase_step)
        if data.draw(st.booleans(), label="sent") and (record := written.take_record()) is not None:
            read.add(RECORD.validate_json(RECORD.dump_json(record)))
        calls.append((moment, steps))
        leader.status.step += steps
        follow_groups()
        assert follower.status.moment <= leader.status.moment
    written.promise(END)
    record = written.take_record()
    assert record is not None
    read.add(record)
    follow_groups()
    assert follower.ended
    assert followed == calls
    assert follower.carried_out == leader.carried_out


def test_the_length_of_a_call_is_known_with_its_promise_and_not_before() -> None:
    leader, log = LeaderLog(), FollowerLog()
    leader.promise_call(Moment(0, 0), 4, 4)
    leader.promise_call(Moment(0, 4), 3, 4)  # it does not wait for process 0 to reach its end
    record = leader.take_record()
    assert record is not None
    log.add(Record(orders=record.orders[:0], promised=Moment(0, 2)))
    assert log.steps_of_call(Moment(0, 0), 4) is None
    log.add(record)
    assert (log.steps_of_call(Moment(0, 0), 4), log.steps_of_call(Moment(0, 4), 4)) == (4, 3)


def test_a_promise_beside_the_log_counts_when_the_records_before_it_are_there() -> None:
    log = FollowerLog()
    log.add(Record(promised=Moment(0, 1)))
    log.add_promise(Promise(2, Moment(0, 7), 0))
    assert log.promised == Moment(0, 1)
    log.add(Record(orders=(DatedOrder(moment=Moment(0, 3), order=order(1)),), promised=Moment(0, 3)))
    assert log.promised == Moment(0, 7)
    log.add_promise(Promise(1, Moment(0, 2), 0))
    assert log.promised == Moment(0, 7), "promises only rise"
    assert log.free(Moment(0, 0)) == 3


def test_the_last_promise_can_be_taken_again() -> None:
    log = LeaderLog()
    log.promise(Moment(0, 3), 9)
    assert log.take_record() == log.take_record(again=True)
    assert log.take_record() is None


def test_process_0_decides_only_at_moments_that_are_not_promised():
    log = LeaderLog()
    assert log.promised == NOTHING
    log.add(Moment(0, 0), order(1))
    log.promise(Moment(0, 3))
    assert [log.is_open(Moment(0, count)) for count in (0, 3, 4)] == [False, False, True]
    assert log.is_open(Moment(1, 0))
    with pytest.raises(ValueError, match="after the promise"):
        log.add(Moment(0, 3), order(2))
    log.promise(Moment(0, 1))
    assert log.promised == Moment(0, 3), "promises only rise"


def test_an_order_promises_every_moment_before_its_own_so_that_the_others_come_to_it():
    leader, log = LeaderLog(), FollowerLog()
    leader.add(Moment(2, 0), order(1), 7)
    record = leader.take_record()
    assert record is not None
    log.add(record)
    assert [log.is_promised(Moment(1, 12), 7), log.is_promised(Moment(2, 0), 7)] == [True, False]
    leader.add(Moment(2, 0), order(2), 7)  # still open


def test_a_record_holds_every_order_added_before_its_promise_was_given():
    log = LeaderLog()
    assert log.take_record() is None
    log.add(Moment(0, 0), order(1))
    log.promise(Moment(0, 2))
    log.add(Moment(0, 3), order(2))
    record = log.take_record()
    assert record is not None
    assert record.promised == Moment(0, 2)
    assert [dated.moment for dated in record.orders] == [Moment(0, 0), Moment(0, 3)]
    assert log.take_record() is None


def test_a_follower_waits_for_the_promise_and_takes_no_later_order():
    log = FollowerLog()
    assert not log.is_promised(Moment(0, 0), 0)
    leader = LeaderLog()
    leader.add(Moment(0, 1), order(1))
    leader.promise(Moment(0, 1))
    record = leader.take_record()
    assert record is not None
    log.add(record)
    assert log.is_promised(Moment(0, 1), 0)
    assert not log.is_promised(Moment(0, 2), 0)
    assert log.take(Moment(0, 0)) is None
    assert log.take(Moment(0, 1)) == order(1)
    assert log.take(Moment(0, 1)) is None


def test_an_order_that_was_missed_is_an_error_that_says_where():
    log = FollowerLog()
    leader = LeaderLog()
    leader.add(Moment(0, 1), order(1))
    record = leader.take_record()
    assert record is not None
    log.add(record)
    with pytest.raises(errors.ProcessesDiverged, match=r"Moment\(phase=0, count=2\).*apply_command"):
        log.take(Moment(0, 2))


def test_another_number_of_batches_than_on_process_0_is_an_error():
    log = FollowerLog()
    log.add(Record(promised=Moment(2, 0), phase_step=7))
    assert log.is_promised(Moment(1, 9), 0)
    with pytest.raises(errors.ProcessesDiverged, match="after 8 steps here and after 7 on process 0"):
        log.is_promised(Moment(2, 0), 8)


def test_an_early_stop_is_seen_behind_other_commands_and_stays_in_the_log() -> None:
    start, log = Moment(0, 0), FollowerLog()
    stop = ApplyCommand(command=Stop(reason="preempted"), signal=15)
    log.add(Record(orders=(DatedOrder(moment=start, order=order(1)),)))
    assert log.early_stop(start) is None
    log.add(Record(orders=(DatedOrder(moment=start, order=stop),)))
    assert log.early_stop(start) == stop
    assert [log.take(start), log.take(start)] == [order(1), stop]


@pytest.mark.parametrize("at", [Moment(0, 0), Moment(0, 1)])
def test_a_stop_behind_a_checkpoint_or_later_is_not_an_early_one(at: Moment) -> None:
    log = FollowerLog()
    checkpoint = TakeCheckpoint(tag=None, requested_by=None, owners=())
    orders = [DatedOrder(moment=at, order=ApplyCommand(command=Stop()))]
    if at == Moment(0, 0):
        orders.insert(0, DatedOrder(moment=at, order=checkpoint))
    log.add(Record(orders=tuple(orders)))
    assert log.early_stop(Moment(0, 0)) is None
