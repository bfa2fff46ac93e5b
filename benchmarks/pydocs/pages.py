"""Docstrings as pages, collected from installed packages in a new interpreter, without near-duplicates."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import types
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from pydocs.docstrings import Block, parse, sentences
from rqa.runtime.errors import UserError

LEFT_OUT = {"see also", "examples", "references"}
FEWEST_WORDS = 12  # words of a docstring; shorter ones mostly say "Same as ..."
NEAR_DUPLICATE = 0.8  # Jaccard similarity of the words of two docstrings
BOILERPLATE = 3  # a paragraph in more docstrings than that is boilerplate


@dataclass(frozen=True)
class Page:
    """One docstring: the name of its object, its visible blocks, and its "See Also" entries."""

    name: str
    blocks: tuple[Block, ...]
    references: tuple[Block, ...]

    @property
    def short(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def summary(self) -> str:
        return sentences(self.blocks[0].text)[0]


def collect_pages(modules: Sequence[str]) -> tuple[list[Page], dict[str, str]]:
    """Collect the pages of these modules. -> them, and the name of the page for each name of an object"""
    names = _collect_afresh(modules)
    pages = _distinct([page for docstring, called in names.items() if (page := _page(called, docstring))])
    return pages, {name: called[0] for called in names.values() for name in called}


def _collect_afresh(modules: Sequence[str]) -> dict[str, list[str]]:
    """Collect in a new interpreter, because packages change others' docstrings (scipy numpy's, torch `inspect`'s)."""
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    script = "import sys; from pydocs.pages import _print_collected; _print_collected(sys.argv[1:])"
    result = subprocess.run(
        [sys.executable, "-c", script, *modules],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        encoding="utf-8",
    )
    if result.returncode:
        raise UserError((result.stderr.strip() or "the docstrings cannot be collected").splitlines()[-1])
    return json.loads(result.stdout.splitlines()[-1])


def _print_collected(modules: Sequence[str]) -> None:
    try:
        print("\n" + json.dumps(_collect(modules)))
    except UserError as error:
        sys.exit(str(error))


def _collect(modules: Iterable[str]) -> dict[str, list[str]]:
    """Collect each docstring with the names of its objects; the most public names and docstrings come first."""
    called: dict[str, dict[str, tuple[bool, int, int, str]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in modules:
            try:
                module = importlib.import_module(path)
            except ImportError as error:
                raise UserError(f"package {path!r}: cannot be imported ({error})") from None
            for name, member, inherited in _members(module, path):
                docstring = getattr(member, "__doc__", None)
                if isinstance(docstring, str):
                    rank = (inherited, name.count("."), len(name), name)
                    called.setdefault(inspect.cleandoc(docstring), {}).setdefault(name, rank)
    ranked = sorted(called.items(), key=lambda item: min(item[1].values()))
    return {docstring: sorted(names, key=names.__getitem__) for docstring, names in ranked}


def _members(module: types.ModuleType, path: str) -> Iterator[tuple[str, Any, bool]]:
    """Yield (name, object, whether inherited) for a module, its public objects, and the methods of its classes."""
    yield path, module, False
    top = importlib.import_module(_top(path))
    listed = getattr(module, "__all__", None)
    for name in sorted({name for name in listed or dir(module) if not name.startswith("_")}):
        try:
            member = getattr(module, name)
        except Exception:  # its requirements are not installed
            continue
        if callable(member) and (listed or _top(getattr(member, "__module__", None) or path) == _top(path)):
            home = top.__name__ if getattr(top, name, None) is member else path
            yield f"{home}.{name}", member, False
            if inspect.isclass(member):
                yield from _methods(f"{home}.{name}", member)


def _methods(name: str, owner: type) -> Iterator[tuple[str, Any, bool]]:
    for attribute in sorted(attribute for attribute in dir(owner) if not attribute.startswith("_")):
        base = next((base for base in owner.__mro__ if attribute in vars(base)), None)
        if base and _top(base.__module__) == _top(owner.__module__):
            value = getattr(vars(base)[attribute], "__func__", vars(base)[attribute])  # of a static or class method
            if inspect.isroutine(value) or inspect.isdatadescriptor(value):
                yield f"{name}.{attribute}", value, base is not owner


def _top(path: str) -> str:
    """The package of a module; `_io` counts as `io`."""
    return path.partition(".")[0].lstrip("_")


def _page(names: Sequence[str], docstring: str) -> Page | None:
    blocks = parse(docstring, {name.rpartition(".")[2] for name in names})
    shown = tuple(block for block in blocks if block.section not in LEFT_OUT)
    if sum(len(block.text.split()) for block in shown) < FEWEST_WORDS:
        return None
    return Page(names[0], shown, tuple(block for block in blocks if block.section == "see also"))


def _distinct(pages: Sequence[Page]) -> list[Page]:
    """Keep the first of pages that share four fifths of their words, apart from names and boilerplate.

    Sets of a Jaccard similarity of t share one of the `len - ceil(t * len) + 1` rarest words of either, so only pages
    that share one of those are compared.
    """
    words = _own_words(pages)
    frequency = Counter(word for own in words.values() for word in own)
    kept: list[Page] = []
    having: defaultdict[str, list[set[str]]] = defaultdict(list)
    for page in pages:
        own = words[page.name]
        rarest = sorted(own, key=lambda word: (frequency[word], word))[: len(own) - ceil(NEAR_DUPLICATE * len(own)) + 1]
        rivals = (rival for word in rarest for rival in having[word])
        if not any(len(own & rival) >= NEAR_DUPLICATE * len(own | rival) for rival in rivals):
            kept.append(page)
            for word in rarest:
                having[word].append(own)
    return kept


def _own_words(pages: Sequence[Page]) -> dict[str, set[str]]:
    """The words of each page without its name and without boilerplate, such as `out` in every ufunc."""
    said = Counter(text for page in pages for text in {block.text for block in page.blocks})
    words = {}
    for page in pages:
        texts = [block.text for block in page.blocks]
        own = [text for text in texts if said[text] <= BOILERPLATE] or texts
        words[page.name] = set(re.findall(r"\w+", " ".join(own).lower())) - {page.short.lower()}
    return words
