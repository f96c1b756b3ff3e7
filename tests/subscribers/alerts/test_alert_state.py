"""An alert is raised once, when it was bad for long enough, and resolved once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eventtrain import subscribers as subs
from eventtrain.subscribers.alerts.alert_state import AlertState, RuleAlerts

LOOKS = st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.integers(0, 3)), max_size=60)
"""Whether it is bad, and how many steps and seconds after the look before."""


def judged(state: AlertState, looks: list[tuple[bool, int, int]]) -> list[tuple[int, int, str | None]]:
    step = now = 0
    found: list[tuple[int, int, str | None]] = []
    for bad, steps, seconds in looks:
        step, now = step + steps, now + seconds
        found.append((step, now, state.judge(bad, step, now)))
    return found


def test_without_further_conditions_it_is_raised_at_once_and_not_again() -> None:
    looks = [(True, 1, 1), (True, 1, 1), (False, 1, 1), (False, 1, 1), (True, 1, 1)]
    assert [change for _, _, change in judged(AlertState(), looks)] == [
        "raised",
        None,
        "resolved",
        None,
        "raised",
    ]


@given(looks=LOOKS, for_s=st.integers(0, 5), for_steps=st.integers(0, 5), cooldown_s=st.integers(0, 8))
def test_it_agrees_with_its_definition(
    looks: list[tuple[bool, int, int]], for_s: int, for_steps: int, cooldown_s: int
) -> None:
    changes = judged(AlertState(for_s, for_steps, cooldown_s), looks)
    raised, resolved_at, since = False, None, None
    for (bad, _, _), (step, now, change) in zip(looks, changes, strict=True):
        if not bad:
            assert change == ("resolved" if raised else None)
            resolved_at = now if raised else resolved_at
            raised, since = False, None
            continue
        since = since or (step, now)
        long_enough = step - since[0] >= for_steps and now - since[1] >= for_s
        cooled = resolved_at is None or now >= resolved_at + cooldown_s
        assert change == ("raised" if not raised and long_enough and cooled else None)
        raised = raised or change == "raised"


@given(
    looks=LOOKS,
    cut=st.integers(0, 60),
    pause=st.integers(0, 1000),
    options=st.tuples(*[st.integers(0, 4)] * 3),
)
def test_saved_and_loaded_it_goes_on_as_if_no_time_had_passed(
    looks: list[tuple[bool, int, int]], cut: int, pause: int, options: tuple[int, int, int]
) -> None:
    whole, first, second = AlertState(*options), AlertState(*options), AlertState(*options)
    expected = judged(whole, looks)
    judged(first, looks[:cut])
    step = sum(steps for _, steps, _ in looks[:cut])
    now = sum(seconds for _, _, seconds in looks[:cut])
    saved = first.save(now).model_dump_json()
    second.load(type(first.save(now)).model_validate_json(saved), now + pause)
    for (bad, steps, seconds), (_, _, change) in zip(looks[cut:], expected[cut:], strict=True):
        step, now = step + steps, now + seconds
        assert second.judge(bad, step, now + pause) == change


def test_each_subject_has_a_cooldown_of_its_own_however_often_it_is_looked_at() -> None:
    alerts = RuleAlerts(subs.SlowSubscriberRule(cooldown_s=10.0))
    told = [
        [
            f"{alert.kind} {alert.name}"
            for alert in alerts.update(dict.fromkeys(bad, "behind"), 1, float(now_s))
        ]
        for now_s, bad in enumerate(["a", "", "", "a", "ab", *[""] * 6, "a"])
    ]
    assert told == [
        ["alert_raised slow subscriber: a"],
        ["alert_resolved slow subscriber: a"],
        [],
        [],
        ["alert_raised slow subscriber: b"],
        ["alert_resolved slow subscriber: b"],
        *[[]] * 5,
        ["alert_raised slow subscriber: a"],
    ]
    assert set(alerts.save(11.0).alarms) == {"a", "b"}
    alerts.update({"a": "behind"}, 1, 16.0)
    assert set(alerts.save(16.0).alarms) == {"a"}
