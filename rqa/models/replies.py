"""What is read off the JSON replies of an OpenAI-compatible server."""

from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What a server said, the tokens it generated for that, and the seconds it took; None if it was not asked now."""

    text: str
    num_tokens: int
    seconds: float | None


def answer_tokens(reply: Any, prompt: str, answer: str) -> list[float]:
    """The log-probabilities of the answer's tokens, from a completion of prompt + answer that echoes it.

    Args:
        reply: The completion; its `text_offset` says where each token begins. One token may be generated behind it.
    """
    choice = reply["choices"][0]
    logprobs = choice.get("logprobs") or {}
    tokens, values, offsets = (logprobs.get(name) or [] for name in ("tokens", "token_logprobs", "text_offset"))
    if len(tokens) < 2 or len(choice["text"]) < len(prompt + answer):
        return []  # not echoed
    # A server may show, and count, a token that it puts before every text.
    start = len(prompt) + (0 if prompt.startswith(tokens[0].strip()) else offsets[1] - offsets[0])
    end = start + len(answer)
    generated = (reply.get("usage") or {}).get("completion_tokens", 1)
    last = len(tokens) - (generated if generated and offsets[-generated] >= end else 0)
    ends = [*offsets[1:last], end]
    rows = zip(values[:last], offsets[:last], ends, strict=True)
    return [value for value, begin, stop in rows if value is not None and (begin >= start or stop > start)]


def chat_reply(reply: Any) -> Reply:
    """The text and size of a chat completion."""
    text = reply["choices"][0]["message"]["content"] or ""  # null when all tokens went into reasoning
    if not isinstance(text, str):
        raise TypeError(text)
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    return Reply(text.strip(), len(text.split()) if tokens is None else tokens, None)
