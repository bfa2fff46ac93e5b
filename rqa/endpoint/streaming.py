"""Replies of an OpenAI-compatible server while it writes them; none is kept, as somebody waits for each."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from functools import cache
from typing import Any

from rqa.endpoint.client import CHARACTERS_PER_TOKEN, CUT, TIMEOUT, UNREADABLE, Endpoint, Job
from rqa.runtime.errors import one_line
from rqa.runtime.text import clean_text, without_thoughts

RETRIES = 2  # at most: who waits can ask again
HALF_A_MARK = re.compile(r"\s*[<\[][^>\]]{0,12}")  # perhaps the begin of thoughts, which nobody shall see


@cache
def _client(endpoint: Endpoint, loop: asyncio.AbstractEventLoop) -> Any:
    """The one client of a server in an event loop, which keeps connections."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

    how = {"timeout": Timeout(TIMEOUT, connect=5.0), "max_retries": min(endpoint.flags.endpoint_retries, RETRIES)}
    how["http_client"] = DefaultAsyncHttpxClient(follow_redirects=False)
    return AsyncOpenAI(base_url=endpoint._url, api_key=endpoint._key or "none", **how)


async def stream(
    endpoint: Endpoint, turns: Sequence[dict[str, str]], max_tokens: int, options: dict[str, Any]
) -> AsyncIterator[tuple[str, int, int, str | None]]:
    """The text so far, the prompt's and its tokens, and why it ended: None, "stop" or "length"; or `Refused`.

    The first is empty: the server takes the conversation. Tokens are parts of the stream until the server counts them.
    """
    from openai import APIError, AsyncStream

    async def send(path: str, options: Any, **_: Any) -> Any:
        how = {"cast_to": object, "stream": True, "stream_cls": AsyncStream[object]}
        return await _client(endpoint, asyncio.get_running_loop()).post(path, options=options, **how)

    messages = [{name: clean_text(text) for name, text in turn.items()} for turn in turns]
    body = {"model": endpoint.model, "messages": messages, "max_tokens": max_tokens} | endpoint._options | options
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    said, ended, used, parts = "", None, {}, 0
    try:
        async with await endpoint._send_adapted(send, Job("/chat/completions", "", body, dict)) as replies:
            yield "", 0, 0, None
            async for part in replies:
                used = part.get("usage") or used
                for choice in part["choices"][:1]:
                    new, ended = (choice.get("delta") or {}).get("content") or "", choice.get("finish_reason") or ended
                    said, parts = said + new, parts + bool(new)
                    if new and not HALF_A_MARK.fullmatch(said):
                        yield without_thoughts(said), 0, parts, None
                if len(said) > max_tokens * CHARACTERS_PER_TOKEN:
                    ended = "length"
                    break
        if not ended:
            raise endpoint._error("ended its stream before the end of the reply")
        tokens = used.get("prompt_tokens") or 0, used.get("completion_tokens") or parts
        yield without_thoughts(said), *tokens, "length" if ended in CUT else "stop"
    except UNREADABLE as error:
        raise endpoint._error(f"not the stream of an OpenAI-compatible server ({one_line(error)})") from None
    except APIError as error:
        raise endpoint._failure(error) from None
