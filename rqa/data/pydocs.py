"""A corpus without any download: the docstrings of installed packages, and questions that their structure answers.

    write_corpus(build_corpus(QUICKSTART), "data/pydocs")

A passage is about 128 tokens of one docstring, under the qualified name of its object. Questions ask for what an entry
says: a parameter, the return value, an exception. They name the function in full, by its last name, or only by its
summary. Others ask which function does what another function's "See Also" says of it: its authors' own paraphrase.
These sections are left out of the passages, where lexical search would find them word for word; so are the doctests,
which would add two thirds to numpy's text, look alike everywhere and answer nothing that is asked.
"""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

from rqa.data.docstrings import PROSE, Block, parse, sentences
from rqa.data.documents import Document, format_content, write_documents
from rqa.data.examples import Example, write_examples
from rqa.runtime.errors import UserError

_MODULES = """
    numpy numpy.char numpy.ctypeslib numpy.dtypes numpy.exceptions numpy.fft numpy.lib.format numpy.lib.scimath
    numpy.lib.stride_tricks numpy.linalg numpy.ma numpy.polynomial numpy.polynomial.chebyshev numpy.polynomial.hermite
    numpy.polynomial.hermite_e numpy.polynomial.laguerre numpy.polynomial.legendre numpy.polynomial.polynomial
    numpy.random numpy.rec numpy.testing numpy.typing

    argparse array ast asyncio base64 bisect builtins calendar codecs collections collections.abc concurrent.futures
    configparser contextlib copy csv ctypes dataclasses datetime decimal difflib dis email.message email.utils enum
    fileinput fnmatch fractions ftplib functools gc getpass gettext glob gzip hashlib heapq hmac html http.client
    http.cookiejar http.server importlib importlib.metadata importlib.resources inspect io ipaddress itertools json
    linecache locale logging logging.handlers lzma mailbox math mimetypes multiprocessing.pool numbers operator os
    os.path pathlib pickle pickletools pkgutil platform plistlib pprint pstats queue random re sched secrets select
    selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl stat statistics string struct
    subprocess symtable sys sysconfig tarfile tempfile textwrap threading time timeit tokenize traceback tracemalloc
    types typing unittest unittest.mock urllib.error urllib.parse urllib.request urllib.robotparser uuid warnings wave
    weakref webbrowser wsgiref.simple_server xml.dom.minidom xml.etree.ElementTree xml.sax xmlrpc.client zipapp zipfile
    zlib

    torch torch.autograd torch.cuda torch.cuda.memory torch.distributions torch.fft torch.func torch.futures torch.hub
    torch.linalg torch.nn torch.nn.functional torch.nn.init torch.nn.utils torch.nn.utils.parametrize
    torch.nn.utils.prune torch.nn.utils.rnn torch.optim torch.optim.lr_scheduler torch.optim.swa_utils torch.profiler
    torch.sparse torch.special torch.utils.checkpoint torch.utils.data

    transformers.audio_utils transformers.cache_utils transformers.configuration_utils transformers.data.data_collator
    transformers.feature_extraction_utils transformers.generation.configuration_utils
    transformers.generation.logits_process transformers.generation.stopping_criteria transformers.generation.streamers
    transformers.generation.utils transformers.hf_argparser transformers.image_transforms transformers.image_utils
    transformers.modeling_outputs transformers.modeling_utils transformers.models.auto transformers.models.bert
    transformers.models.llama transformers.models.t5 transformers.optimization transformers.pipelines
    transformers.pipelines.base transformers.pipelines.text_generation transformers.processing_utils
    transformers.tokenization_utils_base transformers.trainer transformers.trainer_callback transformers.trainer_utils
    transformers.training_args transformers.utils.quantization_config
"""
PACKAGES = tuple(_MODULES.split())
"""The whole corpus. Modules are listed, since importing whatever is found has effects: `antigravity` opens a page."""
QUICKSTART = ("numpy", "numpy.fft", "numpy.linalg", "numpy.random", "json", "shutil", "statistics", "textwrap")
"""Enough for ten minutes on a laptop: about 2,000 passages."""

LEFT_OUT = {"see also", "examples", "references"}
FEWEST_WORDS = 12  # of a docstring; shorter ones say little but "Same as ..."
NEAR_DUPLICATE = 0.8  # Jaccard similarity of the words of two docstrings
BOILERPLATE = 3  # docstrings that may share a paragraph before it counts as nobody's own
LONGEST_ANSWER = 40  # words
ENTRIES_PER_DOCSTRING = 3
PARAPHRASES_PER_DOCSTRING = 2
SPLITS = {"train": 0.6, "eval": 0.1, "test": 0.3}

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
"""How each kind of fact is asked for, in equal parts: by the full name, by the last, by what the function does."""
PARAPHRASE = "What should I use for this: {task}?"

_TOKEN = re.compile(r"[^\W\d_]{1,7}|\d{1,3}|[^\w\s]|_")
_POINTS_ELSEWHERE = re.compile(
    r"(?:the )?(?:see|refer|same|as in|as for|cf|like|ditto|equivalent|alias|identical|similar|corresponding|related)\b"
    r"|.*\b(?:see (?:also )?`|see the\b|refer to\b|(?:see|described|defined|listed|explained|shown) (?:above|below)\b)",
    re.IGNORECASE,
)
_FORMULA_OR_LIST = re.compile(r"\\|:$|(?:^| )[*:-] |\b1[.)] ")
_RAISES = re.compile(r"(?:It |This )?raises? (?:an? )?`?([A-Z]\w+)`?\W.*", re.IGNORECASE)
_IDENTIFIER = re.compile(r"\*{0,2}[\w.]+")
_RETURNS = re.compile(r"Returns? |The (?:return value|result) ")

T = TypeVar("T")


@dataclass
class Corpus:
    """Passages, and questions split by docstring: no docstring is asked about in two splits."""

    documents: list[Document]
    train: list[Example]
    eval: list[Example]
    test: list[Example]


class Fact(NamedTuple):
    """Something to ask for: a key of `QUESTIONS`, the entry's name, what the docstring says, and in which words."""

    kind: str
    part: str
    answer: str
    evidence: str


@dataclass(frozen=True)
class Page:
    """One docstring: the name of its object, the blocks that it shows, its "See Also" entries."""

    name: str
    blocks: tuple[Block, ...]
    references: tuple[Block, ...]

    @property
    def short(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def summary(self) -> str:
        return sentences(self.blocks[0].text)[0]


def build_corpus(packages: Sequence[str] = PACKAGES, chunk_tokens: int = 128, seed: int = 0) -> Corpus:
    """Make passages and questions of the docstrings of installed packages; the same ones for the same versions.

    Args:
        packages: Modules to import. Each gives its own public functions and classes: name submodules too.
        chunk_tokens: The most tokens of a passage, as `count_tokens` counts them.
        seed: Changes which facts are asked for, in which words, and the split.

    Raises:
        UserError: a module cannot be imported, or no docstring is long enough.
    """
    names = _collect_afresh(packages)
    pages = _distinct([page for docstring, called in names.items() if (page := _page(called, docstring))])
    if not pages:
        raise UserError(f"packages {', '.join(packages)}: no docstring of {FEWEST_WORDS} words or more")
    tasks = _paraphrases(pages, {name: called[0] for called in names.values() for name in called})
    passages = {page.name: _passages(page, chunk_tokens) for page in pages}
    corpus = Corpus([passage for found in passages.values() for passage in found], [], [], [])
    drafts = list(_questions(pages, tasks, seed))
    asked = Counter(question for _, question, _ in drafts)
    for page, question, fact in drafts:
        if asked[question] == 1:
            split = Random(f"{seed} split {page.name}").choices(list(SPLITS), list(SPLITS.values()))[0]
            gold = tuple(passage for passage in passages[page.name] if fact.evidence in passage.page_content)
            if gold:  # else the words are cut in two
                getattr(corpus, split).append(Example(question, gold, fact.answer))
    return corpus


def write_corpus(corpus: Corpus, directory: str | Path) -> None:
    """Write `documents.jsonl` and, for each split, `train_w_qa.jsonl` and so on."""
    directory = Path(directory)
    write_documents(directory / "documents.jsonl", corpus.documents)
    for split in SPLITS:
        write_examples(directory / f"{split}_w_qa.jsonl", getattr(corpus, split))


def count_tokens(text: str) -> int:
    """About as many as MiniLM's word pieces, with no tokenizer: on these docstrings 1.00 times as many, +-15 %."""
    return len(_TOKEN.findall(text))


def _collect_afresh(modules: Sequence[str]) -> dict[str, list[str]]:
    """Collect in a new interpreter: packages rewrite the docstrings of others (scipy numpy's, torch `inspect`'s)."""
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    script = "import sys; from rqa.data.pydocs import _print_collected; _print_collected(sys.argv[1:])"
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
    """Each docstring with the names of its objects, the most public name first; most public docstrings first."""
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
    """Yield (name, object, whether inherited) for a module, what it makes public, and the methods of its classes."""
    yield path, module, False
    top = importlib.import_module(_top(path))
    listed = getattr(module, "__all__", None)
    for name in sorted({name for name in listed or dir(module) if not name.startswith("_")}):
        try:
            member = getattr(module, name)
        except Exception:  # listed, but what it needs is not installed
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
    """The package that a module belongs to; `_io` is `io`."""
    return path.partition(".")[0].lstrip("_")


def _page(names: Sequence[str], docstring: str) -> Page | None:
    blocks = parse(docstring, {name.rpartition(".")[2] for name in names})
    shown = tuple(block for block in blocks if block.section not in LEFT_OUT)
    if sum(len(block.text.split()) for block in shown) < FEWEST_WORDS:
        return None
    return Page(names[0], shown, tuple(block for block in blocks if block.section == "see also"))


def _distinct(pages: Sequence[Page]) -> list[Page]:
    """Keep the first of pages that share four fifths of their words, names and boilerplate aside.

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
    """The words of each page but for its name and what several pages say, as every ufunc says what `out` is."""
    said = Counter(text for page in pages for text in {block.text for block in page.blocks})
    words = {}
    for page in pages:
        texts = [block.text for block in page.blocks]
        own = [text for text in texts if said[text] <= BOILERPLATE] or texts
        words[page.name] = set(re.findall(r"\w+", " ".join(own).lower())) - {page.short.lower()}
    return words


def _passages(page: Page, limit: int) -> list[Document]:
    """Pack a page's blocks into passages, under the headings of their sections."""
    pieces = [(block, piece) for block in page.blocks for piece in _pieces(block.text, limit)]
    passages = []
    for group in _pack(pieces, lambda item: count_tokens(item[1]), limit):
        lines = []
        for section, members in groupby(group, key=lambda item: item[0].section):
            lines += [section.capitalize()] * (section != PROSE) + [piece for _, piece in members]
        content = "\n".join(lines)
        metadata = {"source": f"pydoc:{page.name}", "title": page.name}
        passages.append(Document(content, metadata, format_content(content, {"title": page.name})))
    return passages


def _pieces(text: str, limit: int) -> list[str]:
    """Cut what is longer than a passage behind sentences, and a sentence that is still longer between words."""
    parts = [" ".join(words) for sentence in sentences(text) for words in _pack(sentence.split(), count_tokens, limit)]
    return [" ".join(piece) for piece in _pack(parts, count_tokens, limit)]


def _pack(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Group items in their order, as many as fit the limit; an item that is larger stands alone."""
    group: list[T] = []
    filled = 0
    for item in items:
        if group and filled + size(item) > limit:
            yield group
            group, filled = [], 0
        group.append(item)
        filled += size(item)
    if group:
        yield group


def _paraphrases(pages: Sequence[Page], homes: dict[str, str]) -> dict[str, list[str]]:
    """What the "See Also" sections of other pages say about a page, in no words that give it away.

    Args:
        homes: The page's name for every name of an object.
    """
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
    """The page that a reference means: the name as the nearest enclosing class, module or package has it."""
    scopes = context.split(".")
    candidates = (".".join([*scopes[:depth], name]) for depth in range(len(scopes), -1, -1))
    return next((homes[candidate] for candidate in candidates if candidate in homes), "")


def _gives_away(task: str, page: Page) -> bool:
    named = re.search(rf"\b{re.escape(page.short)}\b", task, re.IGNORECASE)
    return bool(named) or any(task.lower() in block.text.lower() for block in page.blocks)


def _questions(pages: Sequence[Page], tasks: dict[str, list[str]], seed: int) -> Iterator[tuple[Page, str, Fact]]:
    """Yield (page, question, fact); what two facts answer word for word is not asked for."""
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
    """What the entries of a page say, and the sentences of its prose that tell a return value or an exception."""
    results = sum(block.section == "returns" for block in page.blocks)
    facts = []
    for block in page.blocks:
        if block.section in ("parameters", "raises") and _IDENTIFIER.fullmatch(block.name):
            facts.append(_fact(block.section, block.name, block.text, block.description))
        elif block.section == "returns" and results == 1:
            facts.append(_fact("returns", "", block.text, block.description))
        elif block.section == "returns" and _IDENTIFIER.fullmatch(block.name):
            facts.append(_fact("results", block.name, block.text, block.description))
        elif block.section == PROSE:  # but not the summary, which the question may quote
            told = sentences(block.description)[block is page.blocks[0] :]
            facts += [_fact("returns", "", sentence, sentence) for sentence in told if _RETURNS.match(sentence)]
            facts += [_fact("raises", match[1], match[0], match[0]) for match in map(_RAISES.match, told) if match]
    asked = Counter((fact.kind, fact.part) for fact in facts)
    return [fact for fact in facts if fact.answer and asked[fact.kind, fact.part] == 1]


def _fact(kind: str, part: str, text: str, description: str) -> Fact:
    answer = _answer(description)
    return Fact(kind, part, answer, text[: text.index(description)] + answer)


def _answer(description: str) -> str:
    """The first sentences, to 40 words at most; empty where they say next to nothing, or that it is said elsewhere."""
    answer = " ".join(next(_pack(sentences(description), lambda sentence: len(sentence.split()), LONGEST_ANSWER), []))
    useful = 3 <= len(answer.split()) <= LONGEST_ANSWER
    return answer if useful and not _POINTS_ELSEWHERE.match(answer) and not _FORMULA_OR_LIST.search(answer) else ""
