"""Two systems' answers side by side, for people who do not know whose is whose."""

from datetime import UTC, datetime
from typing import Any

from rqa.data import parse_example
from rqa.endpoint.requests import BadRequest
from rqa.evaluation.comparison import pair, read_predictions, shown
from rqa.evaluation.ratings import rated, read_ratings
from rqa.runtime.errors import UserError
from rqa.runtime.files import append_line, fingerprint


class Comparison:
    """The questions of two evaluated runs, in a random order for all, and who has rated which, as the file says."""

    def __init__(self, first: str, second: str, path: str) -> None:
        self.path, items = path, {}
        for a, b in pair(read_predictions(first), read_predictions(second)):
            asked, sides = parse_example(a, first)[0].to_json(), {"A": shown(a, first), "B": shown(b, second)}
            about = {name: asked.get(name) for name in ("question", "chat_history", "gold_answer")}
            systems = {"A": first, "B": second} | {f"answer_{name}": side["answer"] for name, side in sides.items()}
            items[rated(about | systems)] = about, systems, sides
        self.items = dict(sorted(items.items()))
        with open(path, "ab"):  # where nothing can be written, this fails, and not the first rating
            self.ratings = {number: raters for number, (_, raters) in read_ratings(path).items()}
        if not self.ratings.keys() <= items.keys():
            raise UserError(f"--ratings_path {path}: holds ratings of other systems or answers; name another file")

    def next(self, rater: Any) -> dict[str, Any]:
        """How far a rater is, and the first question that is left, whose sides do not say which system they are."""
        if not isinstance(rater, str) or not (rater := rater.strip()) or min(rater) < " ":
            raise BadRequest("'rater' must be a name", "rater")
        left = [number for number in self.items if rater not in self.ratings.get(number, ())]
        progress = {"done": len(self.items) - len(left), "total": len(self.items), "item": None}
        if left:
            (about, _, sides), (first, second) = self.items[left[0]], _order(rater, left[0])
            progress["item"] = {"number": left[0]} | about | {"left": sides[first], "right": sides[second]}
        return progress

    def rate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Keep a rater's choice, which replaces an earlier one. -> what is next"""
        self.next(rater := body.get("rater", ""))  # refuses what is no name
        if type(number := body.get("number")) is not int or number not in self.items:
            raise BadRequest("'number' must be that of a question", "number")
        rater, (about, systems, _) = rater.strip(), self.items[number]
        first, second = _order(rater, number)
        meanings = {"left": first, "right": second, "tie": "tie", "both_bad": "both_bad"}
        if not (choice := meanings.get(str(body.get("choice")))):
            raise BadRequest(f"'choice' must be one of {', '.join(meanings)}", "choice")
        time = datetime.now(UTC).isoformat(timespec="seconds")
        append_line(self.path, {"rater": rater} | about | {"choice": choice} | systems | {"time": time})
        self.ratings.setdefault(number, {})[rater] = choice
        return self.next(rater)


def _order(rater: str, number: int) -> str:
    """The systems on the left and on the right: random for each question and rater, the same at every call."""
    return "AB" if fingerprint(rater, str(number)) < "8" else "BA"
