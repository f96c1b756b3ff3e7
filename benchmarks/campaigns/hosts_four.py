"""The faults of the campaign ``hosts`` in a run of four processes."""

from __future__ import annotations

from functools import partial

from benchmarks.campaign import Campaign
from benchmarks.campaigns import hosts

CAMPAIGN = Campaign(
    name="hosts_four",
    trial=partial(hosts.trial, count=4),
    trials=96,
    slice=1,
    batch=4,
    least=hosts.CAMPAIGN.least,
    packages=hosts.CAMPAIGN.packages,
)
