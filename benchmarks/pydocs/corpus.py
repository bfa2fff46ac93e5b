"""A corpus without any download: the docstrings of installed packages, and questions that their structure answers.

    write_corpus(build_corpus(QUICKSTART), "data/pydocs")

A passage is about 128 tokens of one docstring, under the qualified name of its object. Questions ask for what an entry
says: a parameter, the return value, an exception. They name the function in full, by its last name, or only by its
summary. Others ask which function does what another function's "See Also" says of it: its authors' own paraphrase.
These sections are left out of the passages, where lexical search would find them word for word; so are the doctests,
which would add two thirds to numpy's text, look alike everywhere and answer nothing that is asked.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random

from pydocs.docstrings import PROSE, pack, sentences
from pydocs.pages import FEWEST_WORDS, Page, collect_pages
from pydocs.questions import draft_questions
from rqa.data import Document, Example, format_content, write_examples
from rqa.documents import write_documents
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

SPLITS = {"train": 0.6, "eval": 0.1, "test": 0.3}

_TOKEN = re.compile(r"[^\W\d_]{1,7}|\d{1,3}|[^\w\s]|_")


@dataclass
class Corpus:
    """Passages, and questions split by docstring: no docstring is asked about in two splits."""

    documents: list[Document]
    train: list[Example]
    eval: list[Example]
    test: list[Example]


def build_corpus(packages: Sequence[str] = PACKAGES, chunk_tokens: int = 128, seed: int = 0) -> Corpus:
    """Make passages and questions of the docstrings of installed packages; the same ones for the same versions.

    Args:
        packages: Modules to import. Each gives its own public functions and classes: name submodules too.
        chunk_tokens: The most tokens of a passage, as `count_tokens` counts them.
        seed: Changes which facts are asked for, in which words, and the split.
    """
    pages, homes = collect_pages(packages)
    if not pages:
        raise UserError(f"packages {', '.join(packages)}: no docstring of {FEWEST_WORDS} words or more")
    passages = {page.name: _passages(page, chunk_tokens) for page in pages}
    corpus = Corpus([passage for found in passages.values() for passage in found], [], [], [])
    drafts = list(draft_questions(pages, homes, seed))
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


def _passages(page: Page, limit: int) -> list[Document]:
    """Pack a page's blocks into passages, under the headings of their sections."""
    pieces = [(block, piece) for block in page.blocks for piece in _pieces(block.text, limit)]
    passages = []
    for group in pack(pieces, lambda item: count_tokens(item[1]), limit):
        lines = []
        for section, members in groupby(group, key=lambda item: item[0].section):
            lines += [section.capitalize()] * (section != PROSE) + [piece for _, piece in members]
        content = "\n".join(lines)
        metadata = {"source": f"pydoc:{page.name}", "title": page.name}
        passages.append(Document(content, metadata, format_content(content, {"title": page.name})))
    return passages


def _pieces(text: str, limit: int) -> list[str]:
    """Cut what is longer than a passage behind sentences, and a sentence that is still longer between words."""
    parts = [" ".join(words) for sentence in sentences(text) for words in pack(sentence.split(), count_tokens, limit)]
    return [" ".join(piece) for piece in pack(parts, count_tokens, limit)]
