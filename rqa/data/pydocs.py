"""A corpus without any download: the docstrings of installed packages, and questions that their structure answers.

    write_corpus(build_corpus(QUICKSTART), "data/pydocs")

A passage is about 128 tokens of one docstring, under the qualified name of its object. Questions ask for what an entry
says: a parameter, the return value, an exception. They name the function in full, by its last name, or not at all but
by what it does, best in the words that another function's "See Also" has for it. Those sections are left out of the
passages, where lexical search would find the words verbatim; so are the doctests, a third of numpy's text, which look
alike everywhere and answer nothing that is asked.
"""

import importlib
import inspect
import re
import types
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
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

QUICKSTART = ("numpy", "numpy.fft", "numpy.linalg", "numpy.random", "json", "shutil", "statistics", "textwrap")
"""Enough for ten minutes on a laptop: about 2,000 passages."""

_STANDARD_LIBRARY = """
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
""".split()
_NUMPY = """
    numpy numpy.char numpy.ctypeslib numpy.dtypes numpy.exceptions numpy.fft numpy.lib.format numpy.lib.scimath
    numpy.lib.stride_tricks numpy.linalg numpy.ma numpy.polynomial numpy.polynomial.chebyshev numpy.polynomial.hermite
    numpy.polynomial.hermite_e numpy.polynomial.laguerre numpy.polynomial.legendre numpy.polynomial.polynomial
    numpy.random numpy.rec numpy.testing numpy.typing
""".split()
_TORCH = """
    torch torch.autograd torch.cuda torch.cuda.memory torch.distributions torch.fft torch.func torch.futures torch.hub
    torch.linalg torch.nn torch.nn.functional torch.nn.init torch.nn.utils torch.nn.utils.parametrize
    torch.nn.utils.prune torch.nn.utils.rnn torch.optim torch.optim.lr_scheduler torch.optim.swa_utils torch.profiler
    torch.sparse torch.special torch.utils.checkpoint torch.utils.data
""".split()
_TRANSFORMERS = """
    transformers.audio_utils transformers.cache_utils transformers.configuration_utils transformers.data.data_collator
    transformers.feature_extraction_utils transformers.generation.configuration_utils
    transformers.generation.logits_process transformers.generation.stopping_criteria transformers.generation.streamers
    transformers.generation.utils transformers.hf_argparser transformers.image_transforms transformers.image_utils
    transformers.modeling_outputs transformers.modeling_utils transformers.models.auto transformers.models.bert
    transformers.models.llama transformers.models.t5 transformers.optimization transformers.pipelines
    transformers.pipelines.base transformers.pipelines.text_generation transformers.processing_utils
    transformers.tokenization_utils_base transformers.trainer transformers.trainer_callback transformers.trainer_utils
    transformers.training_args transformers.utils.quantization_config
""".split()
PACKAGES = (*_NUMPY, *_STANDARD_LIBRARY, *_TORCH, *_TRANSFORMERS)
"""The whole corpus. Modules are listed, since importing whatever is found has effects: `antigravity` opens a browser."""

LEFT_OUT = {"see also", "examples", "references"}
FEWEST_WORDS = 12
NEAR_DUPLICATE = 0.8
BOILERPLATE = 3
LONGEST_ANSWER = 40
ENTRIES_PER_DOCSTRING = 3
SPLITS = {"train": 0.65, "eval": 0.1, "test": 0.25}

QUESTIONS = {
    "parameters": (
        "What does `{part}` do in `{name}`?",
        "What is the argument `{part}` of `{short}` for?",
        "What does `{part}` mean in the function for this: {task}?",
    ),
    "returns": (
        "What does `{name}` return?",
        "What is the return value of `{short}`?",
        "What is returned by the function for this: {task}?",
    ),
    "results": (
        "What is `{part}` in what `{name}` returns?",
        "What does `{short}` return as `{part}`?",
        "What is the returned `{part}` of the function for this: {task}?",
    ),
    "raises": (
        "When does `{name}` raise `{part}`?",
        "What makes `{short}` raise `{part}`?",
        "When is `{part}` raised by the function for this: {task}?",
    ),
    "paraphrases": ("What should I use for this: {task}?",),
}
"""How each kind of fact is asked for. Named, half named, and unnamed questions are equally frequent where possible."""

_TOKEN = re.compile(r"[^\W\d_]{1,7}|\d{1,3}|[^\w\s]|_")
_POINTS_ELSEWHERE = re.compile(
    r"(?:see|refer|same|as (?:in|for|above)|cf|like|ditto|equivalent|alias|identical|similar|corresponding|related|alternative)\b"
    r"|.*(?:\bsee (?:also )?`|\bsee the\b|\brefer to\b|\babove\b|\bbelow\b)",
    re.IGNORECASE,
)
_FORMULA_OR_LIST = re.compile(r"\\|:$| [*-] |^[*-] ")
_RAISES = re.compile(r"(?:It |This )?raises? (?:an? )?`?([A-Z]\w+)`?\W.*", re.IGNORECASE)
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
    """Something to ask for: a key of `QUESTIONS`, the entry's name, what the docstring says, and where it says so."""

    kind: str
    part: str
    answer: str
    block: Block


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
    names = _collect(packages)
    pages = _distinct([page for docstring, called in names.items() if (page := _page(called, docstring))])
    if not pages:
        raise UserError(f"packages {', '.join(packages)}: no docstring of {FEWEST_WORDS} words or more")
    paraphrases = _paraphrases(pages, {name: called[0] for called in names.values() for name in called})
    corpus = Corpus([], [], [], [])
    for page, examples in _ask(pages, paraphrases, chunk_tokens, seed):
        pass
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
