"""Requests of OpenAI's API, checked field by field."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from rqa.data import Example, Turn
from rqa.prompts import DoesNotFit
from rqa.runtime.errors import UserError, one_line

ROLES = ("system", "developer", "user", "assistant")
MOST = 4096  # maximum number of texts or messages in a field
LONGEST = 2**19  # maximum characters of a conversation
TURNS = 99  # number of latest turns that are used; since turns alternate, the first is a user's
# Settings that would change an answer and are not supported -> values that are accepted, as they change nothing.
UNSUPPORTED = {"n": [1], "tools": [[]], "functions": [[]], "logprobs": [False], "top_logprobs": [0], "audio": [],
               "logit_bias": [{}], "presence_penalty": [0], "frequency_penalty": [0], "modalities": [["text"]],
               "response_format": [{"type": "text"}]}  # fmt: skip


class BadRequest(UserError):
    """An error in a request, with the name of its field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(BadRequest):
    """The name of a model that is not served here."""


def need(right: bool, param: str, expected: str) -> None:
    if not right:
        raise BadRequest(f"'{param}' must be {expected}", param)


def number(body: dict[str, Any], name: str, kind: type, low: float, high: float) -> Any:
    """A number within bounds; None if absent."""
    fits = body.get(name) is None or (type(body[name]) in (int, kind) and low <= body[name] <= high)
    need(fits, name, f"{'an integer' if kind is int else 'a number'} from {low} to {high}")
    return body.get(name)


def texts(body: dict[str, Any], name: str) -> list[str]:
    """The text or list of texts in a field, as a list."""
    found = [body[name]] if isinstance(body.get(name), str) else body.get(name)
    fits = isinstance(found, list) and 0 < len(found) <= MOST and all(t and isinstance(t, str) for t in found)
    need(fits, name, f"a text, or a list of 1 to {MOST} texts; none may be empty")
    return found or []


def known_model(body: dict[str, Any], name: str | None) -> None:
    """Refuse a request for another model than `name`, or for any if that is None."""
    if name is None or body.get("model") not in (None, name):
        unknown = f"model '{one_line(body['model'])}'" if body.get("model") else "such model"
        raise UnknownModel(f"there is no {unknown} here; /v1/models lists the models", "model")


def conversation(messages: Any) -> tuple[Example, Example]:
    """The question for the retriever, and for the reader: there instructions precede the user's first turn."""
    turns, instructions = list[Turn](), list[str]()
    need(isinstance(messages, list) and len(messages) <= MOST, "messages", f"a list of at most {MOST} messages")
    for place, message in enumerate(messages):
        role, parts = (message.get("role"), message.get("content") or "") if isinstance(message, dict) else ("", "")
        need(role in ROLES, f"messages[{place}].role", ", ".join(ROLES))
        parts = [{"text": parts}] if isinstance(parts, str) else parts
        fits = isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts)
        need(fits, f"messages[{place}].content", "a text, or a list of texts")
        text = "\n".join(part["text"] for part in parts)
        if role in ROLES[:2]:
            instructions.append(text)
        elif turns and turns[-1].speaker == role:  # chat templates need turns that alternate
            turns[-1] = Turn(role, f"{turns[-1].message}\n\n{text}")
        else:
            turns.append(Turn(role, text))
    if sum(map(len, instructions)) + sum(len(turn.message) for turn in turns) > LONGEST:
        raise DoesNotFit(f"the conversation has more than {LONGEST} characters")
    turns = turns[-TURNS:] or [Turn("", "")]
    fits = turns[-1].speaker == "user" and turns[-1].message.strip() != ""
    need(fits, "messages", "a conversation that ends with a question")
    searched = Example(turns[-1].message, chat_history=tuple(turns[:-1]))
    first = next(place for place, turn in enumerate(turns) if turn.speaker == "user")
    turns[first] = Turn("user", "\n\n".join([*instructions, turns[first].message]))
    return searched, Example(turns[-1].message, chat_history=tuple(turns[:-1]))


@dataclass(frozen=True)
class Settings:
    """A request's settings of its answer; None means the server's own."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()

    @property
    def sampling(self) -> dict[str, Any] | None:
        """The fields of `GenerationArguments` that differ from the server's."""
        if self.temperature is None and self.top_p is None:
            return None
        if self.temperature == 0:
            return {"do_sample": False, "temperature": 1.0, "top_p": 1.0}
        return {"do_sample": True, "temperature": self.temperature or 1.0, "top_p": self.top_p or 1.0, "num_beams": 1}


def settings(body: dict[str, Any]) -> Settings:
    """Read a request's settings; those that this server does not support are refused."""
    for name, harmless in UNSUPPORTED.items():
        need(body.get(name) in [None, *harmless], name, "left out: this server does not support it")
    tokens = number(body, "max_completion_tokens", int, 1, 2**31), number(body, "max_tokens", int, 1, 2**31)
    temperature, top_p = number(body, "temperature", float, 0, 2), number(body, "top_p", float, 0.01, 1)
    if temperature:
        temperature = max(temperature, 0.01)  # dividing by less may give infinite logits
    return Settings(tokens[0] or tokens[1], temperature, top_p, tuple(texts(body, "stop")) if body.get("stop") else ())


class Question(NamedTuple):
    """A request for a chat completion."""

    searched: Example  # for the retriever: without instructions
    read: Example  # for the reader
    settings: Settings
    k: int | None  # number of passages; None: the server's
    streams: bool
    wants_usage: bool  # whether a stream ends with the token counts


def question(body: dict[str, Any]) -> Question:
    for name, kind in (("rqa", dict), ("stream_options", dict), ("stream", bool)):
        need(isinstance(body.get(name), kind | None), name, "true or false" if kind is bool else "an object")
    options, k = body.get("stream_options") or {}, number(body.get("rqa") or {}, "k", int, 1, 100)
    streams, usage = bool(body.get("stream")), bool(options.get("include_usage"))
    return Question(*conversation(body.get("messages")), settings(body), k, streams, usage)
