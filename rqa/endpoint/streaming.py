"""A server's reply while it is being written; none is kept, as somebody waits for each."""

import asyncio
import re
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

from rqa.endpoint.client import CHARACTERS_PER_TOKEN, CUT, TIMEOUT, UNREADABLE, Endpoint, Job
from rqa.runtime.errors import one_line
from rqa.runtime.text import clean_text, without_thoughts

HALF_A_MARK = re.compile(r"\s*[<\[][^>\]]{0,12}")  # thoughts may begin so


@cache
def _client(endpoint: Endpoint, _: asyncio.AbstractEventLoop) -> Any:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

    how = {"timeout": Timeout(TIMEOUT, connect=5.0), "http_client": DefaultAsyncHttpxClient(follow_redirects=False)}
    return AsyncOpenAI(base_url=endpoint._url, api_key=endpoint._key or "none", max_retries=2, **how)


async def stream(
    endpoint: Endpoint, turns: list[dict[str, str]], max_tokens: int, options: dict[str, Any]
) -> AsyncIterator[tuple[str, int, int, str | None]]:
    """The text so far, tokens of prompt and text, and why it ended (None, "stop", "length"); or `Refused`.

    The first text is empty: the server accepts the conversation. It counts the tokens at the end, if at all.
    """
    from openai import APIError, AsyncStream

    async def send(path: str, options: Any, **_: Any) -> Any:
        how = {"options": options, "cast_to": object, "stream": True, "stream_cls": AsyncStream[object]}
        return await _client(endpoint, asyncio.get_running_loop()).post(path, **how)

    messages = [{name: clean_text(text) for name, text in turn.items()} for turn in turns]
    body = {"model": await asyncio.to_thread(lambda: endpoint.model), "messages": messages, "max_tokens": max_tokens}
    body |= endpoint._options | options | {"stream": True, "stream_options": {"include_usage": True}}
    said, ended, used, parts = "", None, {}, 0
    try:
        async with await endpoint._send_adapted(send, Job("/chat/completions", "", body, dict)) as replies:
            yield said, 0, 0, None
            async for part in replies:
                used = part.get("usage") or used
                for choice in part["choices"][:1]:
                    new, ended = (choice.get("delta") or {}).get("content") or "", choice.get("finish_reason") or ended
                    said, parts = said + new, parts + 1
                    if new and not HALF_A_MARK.fullmatch(said) and not "\ud800" <= said[-1] < "\udc00":
                        yield without_thoughts(clean_text(said)), 0, parts, None
                if len(said) > max_tokens * CHARACTERS_PER_TOKEN:
                    ended = "length"
                    break
        if not ended:
            raise ValueError("it ends before the reply does")
        tokens = int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or parts)
        yield without_thoughts(clean_text(said)), *tokens, "length" if ended in CUT else "stop"
    except UNREADABLE as error:
        raise endpoint._error(f"not the stream of an OpenAI-compatible server ({one_line(error)})") from None
    except APIError as error:
        raise endpoint._failure(error) from None
