"""One OpenAI-compatible server: a request is repeated while its failure may pass, and what remains is one line."""

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, OpenAIError

from rqa.runtime.errors import UserError, one_line

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds of the exponential backoff
LONGEST_WAIT = 300.0  # seconds that a server may ask us to wait; beyond, the user should know
PASSING_STATUS = {408, 409, 425, 429}  # and every 5xx


class Malformed(Exception):
    """A reply that is not what the protocol says."""


class Server:
    """A server's client within one event loop; use it as `async with`.

    Args:
        base_url: Up to and with `/v1`.
        key: Sent as a bearer token.
        timeout: Seconds for one reply.
        retries: How often a request is repeated.

    Attributes:
        repeated: Requests sent again so far.
    """

    def __init__(self, base_url: str, key: str | None, timeout: float, retries: int) -> None:
        self.base_url = base_url
        self.timeout = timeout
        self.retries = retries
        self.repeated = 0
        self._answered = False
        self._client = AsyncOpenAI(base_url=base_url, api_key=key or "none", timeout=timeout, max_retries=0)

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def models(self) -> list[str]:
        """The names of the models that the server lists."""
        return await self._request(
            self._client.models.with_raw_response.list, lambda reply: [model["id"] for model in reply["data"]]
        )

    async def ask(self, api: str, body: dict[str, Any], parse: Callable[[Any], T]) -> T:
        """POST /chat/completions or /completions. `parse` makes of the JSON reply what the caller wants."""
        kinds = {"chat/completions": self._client.chat.completions, "completions": self._client.completions}
        return await self._request(kinds[api].with_raw_response.create, parse, body)

    async def _request(
        self, send: Callable[..., Awaitable[Any]], parse: Callable[[Any], T], body: dict[str, Any] | None = None
    ) -> T:
        for attempt in itertools.count():
            try:
                reply = await send(**body or {})
                self._answered = True
                return _parsed(reply.http_response, parse)
            except (OpenAIError, Malformed) as error:
                delay = _delay(error, attempt)
                if attempt == self.retries or delay > LONGEST_WAIT or not self._may_pass(error):
                    raise self._failure(error, attempt + 1) from None
            self.repeated += 1
            await asyncio.sleep(delay)
        raise AssertionError

    def _may_pass(self, error: Exception) -> bool:
        if isinstance(error, APIStatusError):
            self._answered = True
            spent = getattr(error, "code", None) == "insufficient_quota"
            return (error.status_code in PASSING_STATUS or error.status_code >= 500) and not spent
        return self._answered or not _never_connected(error)

    def _failure(self, error: Exception, times: int) -> UserError:
        where, asked = self.base_url, f"asked {times} time{'s' if times > 1 else ''}"
        if isinstance(error, APIStatusError):
            return self._status_failure(error, asked)
        if isinstance(error, APITimeoutError):
            return UserError(
                f"{where}: no answer within {self.timeout:g} seconds, {asked}; raise --endpoint_timeout or lower "
                "--endpoint_concurrency"
            )
        if isinstance(error, APIConnectionError):
            reason = one_line(error.__cause__ or error) or "connection lost"
            return UserError(f"{where}: cannot be reached ({reason}), {asked}; is a server running at this URL?")
        return UserError(f"{where}: not the reply of an OpenAI-compatible server ({one_line(error)}), {asked}")

    def _status_failure(self, error: APIStatusError, asked: str) -> UserError:
        status = error.status_code
        said = f"{self.base_url}: {status}, {_message(error)}"
        if status in (401, 403):
            return UserError(f"{said}; the key is refused: set $OPENAI_API_KEY or the flag of the key")
        if status == 404:
            return UserError(f"{said}; no such model or path: check the model's name, and that the URL ends in /v1")
        if status in PASSING_STATUS or status >= 500:
            return UserError(f"{said}; {asked}")
        return UserError(f"{said}; the server refuses the request")


def _parsed(response: Any, parse: Callable[[Any], T]) -> T:
    try:
        return parse(response.json())
    except (LookupError, TypeError, ValueError, AttributeError):
        raise Malformed(response.text[:200] or "empty") from None


def _delay(error: Exception, attempt: int) -> float:
    """Seconds to wait: what the server asks for, else exponential with jitter, so that clients do not come together."""
    asked = error.response.headers.get("retry-after") if isinstance(error, APIStatusError) else None
    if asked:
        try:
            return max(float(asked), 0.0)
        except ValueError:
            pass
        try:
            return max(parsedate_to_datetime(asked).timestamp() - time.time(), 0.0)
        except ValueError:
            log.debug("Retry-After: %s", asked)
    return min(FIRST_DELAY * 2**attempt, LONGEST_DELAY) * random.uniform(0.5, 1.0)


def _never_connected(error: Exception) -> bool:
    """Whether there is nobody at this address: the HTTP library under openai has changed, its error's name has not."""
    return type(error.__cause__).__name__ == "ConnectError"


def _message(error: APIStatusError) -> str:
    """What the server says, in one line."""
    body = error.body
    said = (
        next((body[name] for name in ("message", "detail") if body.get(name)), body) if isinstance(body, dict) else ""
    )
    return one_line(said or error.response.text or error.response.reason_phrase)
