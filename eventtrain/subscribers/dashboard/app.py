"""The web application of a dashboard: the page, the stream of frames, commands and actions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from importlib.resources import files
from time import time
from typing import Any, Protocol

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from eventtrain._version import __version__
from eventtrain.control.issue import first_problem
from eventtrain.errors import BusClosed, CommandRejectedError, ConfigurationError, QueueFull
from eventtrain.events.commands import AnyCommand
from eventtrain.subscribers.dashboard.frames import INTERVAL_S, Frames

KEEP_ALIVE_S = 15.0
"""A reader hears something at least this often."""
ANSWER_TIMEOUT_S = 10.0
"""How long a command may wait for its boundary before the page is told that it is still pending."""
MOST_READERS = 256
QUICK_READERS = 8
"""With more, each gets fewer frames, so that all of them get 40 a second together."""
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/uplot.css": ("vendor/uPlot.min.css", "text/css; charset=utf-8"),
    "/uplot.js": ("vendor/uPlot.iife.min.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path -> file, media type."""


class Steering(Protocol):
    """Sends commands and actions to runs. Any event loop."""

    @property
    def actions(self) -> Mapping[str, str]:
        """Name of each button of the user's own -> what it does."""
        ...

    async def send(self, run: str, command: Any) -> int:
        """Sends a command to a run; returns the step of the boundary at which it took effect.

        Raises:
            CommandRejectedError: the run rejected it, or there is no such run.
            ConfigurationError: it cannot work.
        """
        ...

    def request(self, run: str, action: str) -> None:
        """Publishes ``ActionRequested`` in a run.

        Raises:
            CommandRejectedError: there is no such run, or no such action.
            QueueFull, BusClosed: as ``EventBus.publish``.
        """
        ...


class CommandRequest(BaseModel):
    """A command of the page, for one run."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(max_length=1000)
    command: AnyCommand


class ActionRequest(BaseModel):
    """A press of one of the user's own buttons."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(max_length=1000)
    action: str = Field(max_length=1000)


def make_app(frames: Frames, steering: Steering | None, is_closed: Callable[[], bool]) -> Starlette:
    """Returns the app, to be wrapped by a ``Guard``. Reads the files of the page.

    Args:
        frames: of the runs that are shown.
        steering: None: the page only shows.
        is_closed: once it returns True, streams end.
    """
    readers = idle = 0

    async def stream(request: Request) -> Response:
        if request.method != "GET":
            return Response(media_type="text/event-stream")
        if readers >= MOST_READERS:
            return JSONResponse({"error": f"there are {MOST_READERS} readers already"}, 503)
        is_steerable = steering is not None and request.scope["eventtrain.role"] == "control"
        hello = {
            "version": __version__,
            "time": time(),
            "control": is_steerable,
            "actions": dict(steering.actions) if steering is not None and is_steerable else {},
        }
        # no-transform and X-Accel-Buffering: a proxy in between must not collect frames.
        headers = {"X-Accel-Buffering": "no"}
        return StreamingResponse(frames_of(hello), media_type="text/event-stream", headers=headers)

    async def frames_of(hello: Any) -> AsyncIterator[str]:
        nonlocal readers, idle
        readers += 1
        try:
            yield f"event: hello\ndata: {json.dumps(hello)}\n\n"
            seen, silent_s = None, 0.0
            while not is_closed():
                seen, text = frames.after(seen)
                if text is not None:
                    silent_s = 0.0
                    yield f"data: {text}\n\n"
                elif silent_s >= KEEP_ALIVE_S:
                    silent_s = 0.0
                    yield ":\n\n"
                # Those that are sent something now, or do not read it, are not counted.
                idle += 1
                interval_s = INTERVAL_S * max(1.0, idle / QUICK_READERS)
                try:
                    await anyio.sleep(interval_s)
                finally:
                    idle -= 1
                silent_s += interval_s
        finally:
            readers -= 1

    async def post_command(request: Request) -> Response:
        if steering is None:
            return JSONResponse({"error": "this dashboard only shows"}, 403)
        try:
            wanted = CommandRequest.model_validate_json(await request.body())
        except ValidationError as error:
            return _invalid(error)
        try:
            with anyio.fail_after(ANSWER_TIMEOUT_S):
                step = await steering.send(wanted.run, wanted.command)
        except CommandRejectedError as error:
            return JSONResponse({"error": error.reason}, 409)
        except ConfigurationError as error:
            return JSONResponse({"error": str(error)}, 422)
        except TimeoutError:
            return JSONResponse({"pending": f"the run has not answered within {ANSWER_TIMEOUT_S:g} s"}, 202)
        return JSONResponse({"step": step})

    async def post_action(request: Request) -> Response:
        if steering is None:
            return JSONResponse({"error": "this dashboard only shows"}, 403)
        try:
            wanted = ActionRequest.model_validate_json(await request.body())
            steering.request(wanted.run, wanted.action)
        except ValidationError as error:
            return _invalid(error)
        except CommandRejectedError as error:
            return JSONResponse({"error": error.reason}, 409)
        except (QueueFull, BusClosed) as error:
            return JSONResponse({"error": str(error)}, 503)
        return JSONResponse({"requested": wanted.action})

    return Starlette(
        routes=[
            *(Route(path, _page(*page)) for path, page in PAGE.items()),
            Route("/api/stream", stream),
            Route("/api/commands", post_command, methods=["POST"]),
            Route("/api/actions", post_action, methods=["POST"]),
        ]
    )


def _page(name: str, media_type: str) -> Callable[[Request], Any]:
    content = files("eventtrain.subscribers.dashboard").joinpath("page", name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return page


def _invalid(error: ValidationError) -> Response:
    return JSONResponse({"error": first_problem(error)}, 422)
