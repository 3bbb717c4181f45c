"""What goes wrong, as OpenAI's clients understand it: a status, and JSON that says what, where and how to name it.

A client learns nothing of the machine: no traceback, and no path but the one that it sent itself. What it is not told
stands in the server's log, under the number of the request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from lorafit.errors import ConfigError, DataError, LorafitError, StateError
from lorafit.serve.names import UnknownAdapterError
from lorafit.serve.requests import BusyError
from lorafit.serve.schemas import UNKNOWN, Asking, ChatCompletionRequest, CompletionRequest, Message, TextPart
from lorafit.serve.templates import NoTemplateError

INVALID = "invalid_request_error"
BROKEN = "server_error"
NO_TEMPLATE = "no_chat_template"
RETRY_SECONDS = 1
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:[\\/]|~?/)[\w.-]")
_FIELDS = frozenset(
    name for kind in (Asking, ChatCompletionRequest, CompletionRequest, Message, TextPart) for name in kind.model_fields
)


class Problem(Exception):  # noqa: N818 (it is an answer, not an error of this program)
    """An answer that says what is wrong.

    Args:
        status: the HTTP status.
        message: a sentence for people.
        kind: OpenAI's `type`.
        param: the field of the request that is meant.
        code: OpenAI's `code`, for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def broken(number: str) -> Problem:
    """The answer where the fault is the server's. It says under which number the log has more."""
    return Problem(500, f"the server failed on this request; its log says why, under {number}", kind=BROKEN)


def too_large(limit: int, *, close: bool = False) -> Problem:
    """The body is larger than bodies may be."""
    headers = {"connection": "close"} if close else {}
    message = f"the body is larger than {limit:,} bytes"
    return Problem(413, message, code="request_too_large", headers=headers)


def too_long(tokens: int, context: int) -> Problem:
    """The prompt leaves no room for an answer."""
    message = f"the prompt has {tokens:,} tokens, and prompt and answer together may have {context:,}"
    return Problem(400, message, code="context_length_exceeded")


def timed_out(seconds: float | None) -> Problem:
    """The answer took too long. The same request would take as long again, so clients are told not to repeat it."""
    length = "" if seconds is None else f" of {seconds:g} s"
    return Problem(
        504,
        f"the answer took longer than the time limit{length}; ask for fewer tokens",
        kind="timeout",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def stopping() -> Problem:
    """The server is about to end."""
    return Problem(503, "the server is stopping", kind=BROKEN, code="stopping", headers={"retry-after": "5"})


def no_model(name: str, near: tuple[str, ...]) -> Problem:
    """There is no such model."""
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    message = f"the model '{name[:200]}' does not exist{hint}"
    return Problem(404, message, param="model", code="model_not_found")


def of_error(error: LorafitError, number: str) -> Problem:
    """What a client is told of an error of this library."""
    if isinstance(error, BusyError):
        return Problem(
            429,
            "as many requests wait as may: try again in a moment",
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"retry-after": str(RETRY_SECONDS)},
        )
    if isinstance(error, UnknownAdapterError):
        return no_model(str(error.found or ""), ())
    if isinstance(error, NoTemplateError):
        return Problem(400, said(error), param="messages", code=NO_TEMPLATE)
    if isinstance(error, DataError | ConfigError):
        return Problem(400, said(error), param=_field(error.where))
    if isinstance(error, StateError):
        return stopping()
    return broken(number)


def of_loading(error: LorafitError) -> Problem:
    """What a client is told of an adapter that cannot be loaded, with vLLM's types and statuses."""
    if isinstance(error, UnknownAdapterError):
        return Problem(404, said(error), kind="NotFoundError", param="lora_path")
    if isinstance(error, ConfigError):
        return Problem(400, said(error), kind="InvalidUserInput", param="lora_name")
    if isinstance(error, StateError):
        return Problem(409, said(error), kind="InvalidUserInput", param="lora_name")
    return Problem(400, said(error), kind="BadRequestError", param="lora_path")


def of_validation(error: ValidationError) -> Problem:
    """The first thing that is wrong with a body; the deepest, where a field may be several things."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = found[0]["loc"][:1]
    one = max(
        (fault for fault in found if fault["loc"][:1] == first),
        key=lambda fault: len(fault["loc"]),
    )
    param = place(one["loc"])
    code = UNKNOWN if one["type"] == UNKNOWN else None
    where = f"{param}: " if param else ""
    return Problem(400, f"{where}{one['msg']}", param=param, code=code)


def place(loc: tuple[int | str, ...]) -> str | None:
    """A field as one writes it; names of the alternatives of a type are left out.

    >>> place(("messages", 0, "content", "str"))
    'messages[0].content'
    """
    written = ""
    for part in loc:
        if isinstance(part, int):
            written += f"[{part}]"
        elif part in _FIELDS or not written:
            written += f".{part}" if written else part
    return written or None


def said(error: LorafitError) -> str:
    """An error in one line, without whatever looks like a path of this machine.

    >>> said(ConfigError("too long", found=9, expected="at most 8", where="/home/me/x"))
    'too long (found: 9; expected: at most 8)'
    """
    parts = [f"{label}: {value}" for label, value in (("found", error.found), ("expected", error.expected)) if value]
    parts = [part for part in parts if not _PATH.search(part)]
    message = "the adapter cannot be served" if _PATH.search(error.message) else error.message
    return message + (f" ({'; '.join(parts)})" if parts else "")


def _field(where: object) -> str | None:
    return where if isinstance(where, str) and where in _FIELDS else None
