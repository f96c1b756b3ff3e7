"""``ShownSample``: the newest sample of each name, as a report or a page shows it, in bounded memory. Pure."""

from __future__ import annotations

import base64

import numpy as np
from pydantic import BaseModel, ConfigDict

from eventtrain.events import SampleTaken
from eventtrain.subscribers._shared.display_text import clipped, size_text, table_text

MOST_SAMPLES = 12
MOST_IMAGE_BYTES = 300_000
MOST_TEXT = 4_000


class ShownSample(BaseModel):
    """A sample as text, or as an ``image``: a PNG file in base64. ``time``: seconds since 1970."""

    model_config = ConfigDict(extra="forbid")

    name: str
    step: int
    time: float
    text: str = ""
    image: str = ""

    @classmethod
    def of(cls, event: SampleTaken) -> ShownSample:
        """Returns what is shown of ``event``."""
        text, image, value = "", "", event.value
        match event.media:
            case "text":
                text = value
            case "table":
                text = table_text(value)
            case "array":
                text = _described(value)
            case "image":
                if len(value) <= MOST_IMAGE_BYTES:
                    image = base64.b64encode(value).decode()
                else:
                    text = f"an image of {size_text(len(value))}, too large to be shown here"
        text = clipped(text, MOST_TEXT)
        name = event.name[:100]
        return cls(name=name, step=event.step, time=event.time.timestamp(), text=text, image=image)


def with_sample(samples: list[ShownSample], event: SampleTaken) -> list[ShownSample]:
    """Returns ``samples`` with the one of ``event`` in place of an earlier one of its name."""
    new = ShownSample.of(event)
    if any(one.name == new.name for one in samples):
        return [new if one.name == new.name else one for one in samples]
    return [*samples, new][-MOST_SAMPLES:]


def _described(array: np.ndarray) -> str:
    kind = f"{array.dtype}{list(array.shape)}"
    if not array.size:
        return kind
    low, mean, high = float(array.min()), array.mean(dtype=np.float64), float(array.max())
    return f"{kind}: from {low:.5g} to {high:.5g}, mean {mean:.5g}"
