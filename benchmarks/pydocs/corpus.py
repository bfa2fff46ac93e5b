"""A corpus without any download: docstrings of installed packages, and questions made from their structure.

    write_corpus(build_corpus(QUICKSTART), "data/pydocs")

A passage is about 128 tokens of one docstring, with the qualified name of its object. Most questions ask about one
entry of a docstring: a parameter, the return value, or an exception. They give the function's full name, its last name,
or only its summary. Other questions ask which function does what another function's "See Also" says about it, which is
a paraphrase by its authors. Passages leave out the "See Also" sections, which lexical search would find word for word.
They also leave out doctests, which would add two thirds to numpy's text, look alike and answer no question.
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
    """Passages, and questions that are split by docstring: each docstring has questions in one split only."""

    documents: list[Document]
    train: list[Example]
    eval: list[Example]
    test: list[Example]


def build_corpus(packages: Sequence[str] = PACKAGES, chunk_tokens: int = 128, seed: int = 0) -> Corpus:
    """Make passages and questions from the docstrings of installed packages; the same versions give the same corpus.

    `packages` are modules to import; each gives its own functions and classes, so submodules are listed separately. A
    passage has at most `chunk_tokens`. `seed` decides which facts are asked about, in which words, and the split.
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
            if gold:  # otherwise the answer is split between passages
                getattr(corpus, split).append(Example(question, gold, fact.answer))
    return corpus


def write_corpus(corpus: Corpus, directory: str | Path) -> None:
    """Write `documents.jsonl` and, for each split, `train_w_qa.jsonl` and so on."""
    directory = Path(directory)
    write_documents(directory / "documents.jsonl", corpus.documents)
    for split in SPLITS:
        write_examples(directory / f"{split}_w_qa.jsonl", getattr(corpus, split))


def count_tokens(text: str) -> int:
    """Estimate the number of MiniLM's word pieces without a tokenizer: 1.00 times as many here, +-15 %."""
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
    """Split a text longer than a passage after sentences, and a sentence longer than that between words."""
    parts = [" ".join(words) for sentence in sentences(text) for words in pack(sentence.split(), count_tokens, limit)]
    return [" ".join(piece) for piece in pack(parts, count_tokens, limit)]
