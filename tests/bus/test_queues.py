from __future__ import annotations

import gc
import threading
from collections import deque
from itertools import pairwise

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventtrain as et


class Ping(et.Event):
    number: int = 0


def alert(number: int) -> et.AlertRaised:
    return et.AlertRaised(name=str(number))


POLICIES = st.one_of(
    st.just(et.KeepLatest()),
    st.integers(1, 5).map(et.DropOldest),
    st.integers(1, 5).map(et.DropNewest),
    st.integers(1, 5).map(et.Lossless),
)


class Reference:
    """What each policy means, written for clarity and not for speed."""

    def __init__(self, policy: et.Queue) -> None:
        self.limit = {et.KeepLatest: 1}.get(type(policy)) or getattr(policy, "limit", 0)
        self.drops = not isinstance(policy, et.Lossless)
        self.drop_newest = isinstance(policy, et.DropNewest)
        self.items: list[et.Event] = []
        self.dropped = 0

    def put(self, item: et.Event) -> None:
        droppable = [event for event in self.items if not event.lifecycle]
        if self.drops and not item.lifecycle and len(droppable) >= self.limit:
            self.dropped += 1
            if self.drop_newest:
                return
            self.items.remove(droppable[0])
        self.items.append(item)


@given(POLICIES, st.lists(st.sampled_from(["put", "lifecycle", "many", "take"]), max_size=60))
def test_every_queue_holds_and_drops_what_its_policy_says(policy: et.Queue, actions: list[str]) -> None:
    queue, reference = policy.open(), Reference(policy)
    for number, action in enumerate(actions):
        if action == "take":
            if reference.items:
                assert queue.take() is reference.items.pop(0)
            else:
                with pytest.raises(IndexError):
                    queue.take()
        elif action == "many":
            events = [Ping(number=number), alert(number), Ping(number=number)]
            queue.put_many(events)
            for event in events:
                reference.put(event)
        else:
            event = Ping(number=number) if action == "put" else alert(number)
            queue.put(event)
            reference.put(event)
        assert len(queue) == len(reference.items)
        assert queue.dropped == reference.dropped
        assert queue.oldest() is (reference.items[0] if reference.items else None)
    assert [queue.take() for _ in range(len(queue))] == reference.items


@given(POLICIES, st.integers(0, 4), st.integers(0, 12))
def test_choosing_before_building_keeps_and_counts_the_same_as_putting_all(
    policy: et.Queue, waiting: int, steps: int
) -> None:
    chosen, put = policy.open(), policy.open()
    for queue in (chosen, put):
        queue.put_many([Ping(number=-1)] * waiting)
    wanted = chosen.choose(range(steps))
    chosen.put_many([Ping(number=step) for step in wanted])
    put.put_many([Ping(number=step) for step in range(steps)])
    assert [chosen.take().number for _ in range(len(chosen))] == [put.take().number for _ in range(len(put))]
    assert chosen.dropped == put.dropped


@pytest.mark.parametrize("policy", [et.Lossless(4), et.KeepLatest(), et.DropOldest(4), et.DropNewest(4)])
def test_clearing_counts_nothing_as_dropped_and_dropping_all_counts_everything(policy: et.Queue) -> None:
    queue = policy.open()
    queue.put(Ping())
    assert queue.clear() == 1
    assert (len(queue), queue.dropped) == (0, 0)
    queue.put_many([Ping(), alert(1)])
    queue.drop_all()
    assert (len(queue), queue.dropped) == (0, 2)


@pytest.mark.parametrize(
    "policy", [et.Lossless(100_000), et.DropOldest(3), et.DropNewest(3), et.KeepLatest()]
)
def test_taking_in_one_thread_while_another_puts_loses_and_doubles_nothing(policy: et.Queue) -> None:
    queue, count = policy.open(), 20_000
    taken: deque[int] = deque()
    done = threading.Event()

    def take() -> None:
        while not done.is_set() or len(queue):
            try:
                taken.append(queue.take().number)
            except IndexError:
                continue

    taker = threading.Thread(target=take)
    taker.start()
    for number in range(count):
        queue.put(Ping(number=number))
    done.set()
    taker.join()
    assert len(taken) + queue.dropped == count
    assert all(first < second for first, second in pairwise(taken))


@pytest.mark.parametrize(
    ("policy", "waiting"),
    [(et.KeepLatest(), 1), (et.DropOldest(50), 50), (et.DropNewest(50), 50), (et.Lossless(50), 50)],
)
async def test_behind_a_stalled_subscriber_memory_is_bounded_drops_are_counted_and_lifecycle_events_kept(
    anyio_backend: object, policy: et.Queue, waiting: int
) -> None:
    count, every = 20_000, 1_000
    go_on = anyio.Event()
    numbers: list[int] = []
    alerts: list[str] = []
    accepted: list[int] = []
    accepted_alerts: list[str] = []

    async def stall(event: Ping | et.AlertRaised) -> None:
        if isinstance(event, Ping):
            numbers.append(event.number)
        else:
            alerts.append(event.name)
        await go_on.wait()

    async with et.EventBus() as bus:
        subscription = bus.subscribe(Ping | et.AlertRaised, stall, queue=policy)
        for number in range(count):
            try:
                bus.publish(Ping(number=number))
                accepted.append(number)
                if number % every == 0:
                    bus.publish(alert(number))
                    accepted_alerts.append(str(number))
            except et.QueueFull:
                assert isinstance(policy, et.Lossless)
            if number % 100 == 0:
                await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        pings_alive = sum(isinstance(thing, Ping) for thing in gc.get_objects())
        assert pings_alive <= waiting + 2  # those waiting, the one being handled, and one of the bus' routing
        go_on.set()
        assert await bus.drain() == {}
        dropped = subscription.statistics().dropped
    assert alerts == accepted_alerts
    assert len(numbers) + dropped == len(accepted)
    if isinstance(policy, et.Lossless):
        assert numbers == accepted
        assert waiting <= len(accepted) + len(accepted_alerts) <= waiting + 1
    else:
        assert len(accepted) == count
        assert len(alerts) == count // every
        assert dropped > count - 2 * waiting - 200


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
@pytest.mark.parametrize("policy", [et.Lossless, et.DropOldest, et.DropNewest])
def test_a_limit_that_is_no_positive_whole_number_is_refused_by_name(policy: type, limit: object) -> None:
    with pytest.raises(
        et.ConfigurationError, match=rf"{policy.__name__}\(limit={limit!r}\): limit must be an integer >= 1"
    ):
        policy(limit)


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
def test_a_stall_timeout_that_is_not_positive_is_refused(timeout_s: float) -> None:
    with pytest.raises(et.ConfigurationError, match="stall_timeout_s"):
        et.Lossless(stall_timeout_s=timeout_s)
