"""Samples by order of process 0."""

from __future__ import annotations

from typing import Any, cast

import pytest

import eventtrain as et
from eventtrain.control.control_plane import ControlPlane
from eventtrain.errors import ProcessesDiverged
from eventtrain.loop.agreement.agreement import Alone
from eventtrain.loop.agreement.log import MakeSample
from eventtrain.loop.run_status import RunStatus
from eventtrain.loop.samples import Samples


def test_a_sample_that_another_process_does_not_have_is_refused_there_by_name() -> None:
    unused = cast(Any, None)
    plane = ControlPlane(et.EventBus()._core)
    samples = Samples(
        model=unused, carry=unused, status=RunStatus(5, 0), plane=plane, windows=unused, agreement=Alone()
    )
    with pytest.raises(ProcessesDiverged, match=r"'text' at step 5.*per_host = True"):
        samples.make_ordered(MakeSample(name="text"))
