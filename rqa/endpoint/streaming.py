"""Streamed replies of a server. They are not stored, since a user waits for each."""

import asyncio
import re
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

from rqa.endpoint.client import CHARACTERS_PER_TOKEN, CUT, UNREADABLE, Endpoint, Job
from rqa.runtime.errors import one_line
from rqa.runtime.text import clean_text, without_thoughts

HALF_A_MARK = re.compile(r"\s*[<\[][^>\]]{0,12}")  # a text that may become a mark of thoughts


@cache
def _client(endpoint: Endpoint, _: asyncio.AbstractEventLoop) -> Any:
    from openai import DefaultAsyncHttpxClient

    return endpoint.connect(DefaultAsyncHttpxClient, 2)


async def stream(
    endpoint: Endpoint, turns: list[dict[str, str]], max_tokens: int, options: dict[str, Any]
) -> AsyncIterator[tuple[str, int, int, str | None]]:
    """Yield the text so far, the tokens of prompt and text, and the finish reason (None, "stop" or "length").

    The first text is empty: the server has accepted the conversation. Token counts are exact at the end only, if the
    server gives them. Errors raise `Refused`.
    """
    from openai import APIError, AsyncStream

    async def send(path: str, options: Any, **_: Any) -> Any:
        streamed = {"options": options, "cast_to": object, "stream": True, "stream_cls": AsyncStream[object]}
        return await _client(endpoint, asyncio.get_running_loop()).post(path, **streamed)

    messages = [{name: clean_text(text) for name, text in turn.items()} for turn in turns]
    body = {"model": await asyncio.to_thread(lambda: endpoint.model), "messages": messages, "max_tokens": max_tokens}
    body |= endpoint._options | options | {"stream": True, "stream_options": {"include_usage": True}}
    text, reason, usage, parts = "", None, {}, 0
    try:
        async with await endpoint._send_adapted(send, Job("/chat/completions", "", body, dict)) as replies:
            yield text, 0, 0, None
            async for part in replies:
                usage = part.get("usage") or usage
                for choice in part["choices"][:1]:
                    new = (choice.get("delta") or {}).get("content") or ""
                    reason = choice.get("finish_reason") or reason
                    text, parts = text + new, parts + 1
                    if new and not HALF_A_MARK.fullmatch(text) and not "\ud800" <= text[-1] < "\udc00":
                        yield without_thoughts(clean_text(text)), 0, parts, None
                if len(text) > max_tokens * CHARACTERS_PER_TOKEN:
                    reason = "length"
                    break
        if not reason:
            raise ValueError("it ends before the reply does")
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or parts)
        yield without_thoughts(clean_text(text)), *tokens, "length" if reason in CUT else "stop"
    except UNREADABLE as error:
        raise endpoint._error(f"not the stream of an OpenAI-compatible server ({one_line(error)})") from None
    except APIError as error:
        raise endpoint._failure(error) from None
