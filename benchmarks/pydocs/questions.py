"""Questions about pages of docstrings, and their answers: parameters, results, exceptions, paraphrases."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

from pydocs.docstrings import PROSE, pack, sentences
from pydocs.pages import Page

LONGEST_ANSWER = 40  # words
ENTRIES_PER_DOCSTRING = 3
PARAPHRASES_PER_DOCSTRING = 2

QUESTIONS = {
    "parameters": (
        "What does the parameter `{part}` of `{name}` do?",
        "What is the parameter `{part}` of `{short}`?",
        "What is the parameter `{part}` when I want this: {task}?",
    ),
    "returns": ("What does `{name}` return?", "What does `{short}` return?"),
    "results": ("What is `{part}` in what `{name}` returns?", "What does `{short}` return as `{part}`?"),
    "raises": ("When does `{name}` raise `{part}`?", "What makes `{short}` raise `{part}`?"),
}
"""Questions for each kind of fact, used equally often: with the full name, the last name, or the function's task."""
PARAPHRASE = "What should I use for this: {task}?"

_POINTS_ELSEWHERE = re.compile(
    r"(?:the )?(?:see|refer|same|as in|as for|cf|like|ditto|equivalent|alias|identical|similar|corresponding|related)\b"
    r"|.*\b(?:see (?:also )?`|see the\b|refer to\b|(?:see|described|defined|listed|explained|shown) (?:above|below)\b)",
    re.IGNORECASE,
)
_FORMULA_OR_LIST = re.compile(r"\\|:$|(?:^| )[*:-] |\b1[.)] ")
_RAISES = re.compile(r"(?:It |This )?raises? (?:an? )?`?([A-Z]\w+)`?\W.*", re.IGNORECASE)
_IDENTIFIER = re.compile(r"\*{0,2}[\w.]+")
_RETURNS = re.compile(r"Returns? |The (?:return value|result) ")


class Fact(NamedTuple):
    """A fact to ask about: a key of `QUESTIONS`, the entry's name, the answer, and the docstring's words for it."""

    kind: str
    part: str
    answer: str
    evidence: str


def draft_questions(pages: Sequence[Page], homes: dict[str, str], seed: int) -> Iterator[tuple[Page, str, Fact]]:
    """Yield (page, question, fact); facts with the same answer, word for word, are left out."""
    tasks = _paraphrases(pages, homes)
    facts = {page.name: _facts(page) for page in pages}
    given = Counter(fact.answer.lower() for found in facts.values() for fact in found)
    bearers = Counter(page.short for page in pages)
    for page in pages:
        random = Random(f"{seed} {page.name}")
        own = [fact for fact in facts[page.name] if given[fact.answer.lower()] == 1]
        about = tasks.get(page.name, [])
        for fact in random.sample(own, min(len(own), ENTRIES_PER_DOCSTRING)):
            forms = [form for form in QUESTIONS[fact.kind] if bearers[page.short] == 1 or "{short}" not in form]
            yield page, _word(random.choice(forms), page, fact.part, page.summary), fact
        if _answer(page.summary) == page.summary:
            for task in random.sample(about, min(len(about), PARAPHRASES_PER_DOCSTRING)):
                fact = Fact("paraphrases", "", f"`{page.name}`: {page.summary}", page.summary)
                yield page, _word(PARAPHRASE, page, "", task), fact


def _word(form: str, page: Page, part: str, task: str) -> str:
    task = task[0].lower() + task[1:] if task[1:2].islower() or task[1:2] == " " else task
    return form.format(name=page.name, short=page.short, part=part, task=task.rstrip("."))


def _facts(page: Page) -> list[Fact]:
    """Facts of a page: its entries, and sentences of its prose about a return value or an exception."""
    results = sum(block.section == "returns" for block in page.blocks)
    facts = []
    for block in page.blocks:
        if block.section in ("parameters", "raises") and _IDENTIFIER.fullmatch(block.name):
            facts.append(_fact(block.section, block.name, block.text, block.description))
        elif block.section == "returns" and results == 1:
            facts.append(_fact("returns", "", block.text, block.description))
        elif block.section == "returns" and _IDENTIFIER.fullmatch(block.name):
            facts.append(_fact("results", block.name, block.text, block.description))
        elif block.section == PROSE:  # without the summary, which the question may quote
            told = sentences(block.description)[block is page.blocks[0] :]
            facts += [_fact("returns", "", sentence, sentence) for sentence in told if _RETURNS.match(sentence)]
            facts += [_fact("raises", match[1], match[0], match[0]) for match in map(_RAISES.match, told) if match]
    asked = Counter((fact.kind, fact.part) for fact in facts)
    return [fact for fact in facts if fact.answer and asked[fact.kind, fact.part] == 1]


def _fact(kind: str, part: str, text: str, description: str) -> Fact:
    answer = _answer(description)
    return Fact(kind, part, answer, text[: text.index(description)] + answer)


def _answer(description: str) -> str:
    """The first sentences, at most 40 words; empty if they say almost nothing, or refer elsewhere."""
    answer = " ".join(next(pack(sentences(description), lambda sentence: len(sentence.split()), LONGEST_ANSWER), []))
    useful = 3 <= len(answer.split()) <= LONGEST_ANSWER
    return answer if useful and not _POINTS_ELSEWHERE.match(answer) and not _FORMULA_OR_LIST.search(answer) else ""


def _paraphrases(pages: Sequence[Page], homes: dict[str, str]) -> dict[str, list[str]]:
    """Descriptions of a page in the "See Also" sections of other pages, without words that reveal its name."""
    about = {page.name: page for page in pages}
    tasks: defaultdict[str, list[str]] = defaultdict(list)
    for page in pages:
        for block in page.references:
            target = about.get(_resolve(block.name, page.name, homes))
            task = block.description.rstrip(".")
            if target and target is not page and _answer(task) == task and not _gives_away(task, target):
                tasks[target.name].append(task)
    return {name: list(dict.fromkeys(found)) for name, found in tasks.items()}


def _resolve(name: str, context: str, homes: dict[str, str]) -> str:
    """Find the page of a reference: the name is looked up in the nearest enclosing class, module or package."""
    scopes = context.split(".")
    candidates = (".".join([*scopes[:depth], name]) for depth in range(len(scopes), -1, -1))
    return next((homes[candidate] for candidate in candidates if candidate in homes), "")


def _gives_away(task: str, page: Page) -> bool:
    named = re.search(rf"\b{re.escape(page.short)}\b", task, re.IGNORECASE)
    return bool(named) or any(task.lower() in block.text.lower() for block in page.blocks)
