"""What clients of OpenAI's API send, checked field by field."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from rqa.data import Example, Turn
from rqa.prompts import DoesNotFit
from rqa.runtime.errors import UserError, one_line

ROLES = ("system", "developer", "user", "assistant")
MOST = 4096  # texts or messages in a field
LONGEST = 2**19  # characters of a conversation
TURNS = 99  # the latest, which are read; as turns alternate, the first is a user's
# What would change an answer and is not offered, and the values with which nobody asks for it.
UNSUPPORTED = {"n": [1], "tools": [[]], "functions": [[]], "logprobs": [False], "top_logprobs": [0], "audio": [],
               "logit_bias": [{}], "presence_penalty": [0], "frequency_penalty": [0], "modalities": [["text"]],
               "response_format": [{"type": "text"}]}  # fmt: skip


class BadRequest(UserError):
    """What is wrong with a request, and in which of its fields."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(BadRequest):
    """A name that is no model's here."""


def need(right: bool, param: str, expected: str) -> None:
    if not right:
        raise BadRequest(f"'{param}' must be {expected}", param)


def number(body: dict[str, Any], name: str, kind: type, low: float, high: float) -> Any:
    """A number within bounds; None where it is absent."""
    fits = body.get(name) is None or (type(body[name]) in (int, kind) and low <= body[name] <= high)
    need(fits, name, f"{'an integer' if kind is int else 'a number'} from {low} to {high}")
    return body.get(name)


def texts(body: dict[str, Any], name: str) -> list[str]:
    """The text or texts in a field."""
    found = [body[name]] if isinstance(body.get(name), str) else body.get(name)
    fits = isinstance(found, list) and 0 < len(found) <= MOST and all(t and isinstance(t, str) for t in found)
    need(fits, name, f"a text, or a list of 1 to {MOST} texts; none may be empty")
    return found or []


def known_model(body: dict[str, Any], name: str | None) -> None:
    """Refuse a request for another model, or for one where there is none."""
    if name is None or body.get("model") not in (None, name):
        asked = f"model '{one_line(body['model'])}'" if body.get("model") else "such model"
        raise UnknownModel(f"there is no {asked} here; /v1/models lists those that are", "model")


def conversation(messages: Any) -> tuple[Example, Example]:
    """The question as it is searched with, and as it is read: instructions stand before the first turn of the user."""
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
        elif turns and turns[-1].speaker == role:  # chat templates want turns to alternate
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
    """What a request says of its answer; None: as the server was started."""

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
    """What is asked for of an answer; what this server does not offer is refused."""
    for name, harmless in UNSUPPORTED.items():
        need(body.get(name) in [None, *harmless], name, "left out: this server does not offer it")
    tokens = number(body, "max_completion_tokens", int, 1, 2**31), number(body, "max_tokens", int, 1, 2**31)
    temperature, top_p = number(body, "temperature", float, 0, 2), number(body, "top_p", float, 0.01, 1)
    if temperature:
        temperature = max(temperature, 0.01)  # logits divided by less may be infinite
    return Settings(tokens[0] or tokens[1], temperature, top_p, tuple(texts(body, "stop")) if body.get("stop") else ())


class Question(NamedTuple):
    """What a chat completion is asked for."""

    searched: Example  # without instructions
    read: Example
    settings: Settings
    k: int | None  # passages; None: as the server was started
    streams: bool
    wants_usage: bool  # in a stream


def question(body: dict[str, Any]) -> Question:
    for name, kind in (("rqa", dict), ("stream_options", dict), ("stream", bool)):
        need(isinstance(body.get(name), kind | None), name, "true or false" if kind is bool else "an object")
    options, k = body.get("stream_options") or {}, number(body.get("rqa") or {}, "k", int, 1, 100)
    streams, usage = bool(body.get("stream")), bool(options.get("include_usage"))
    return Question(*conversation(body.get("messages")), settings(body), k, streams, usage)
