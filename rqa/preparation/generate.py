"""Training data from a document database: passages are sampled and split, a model writes questions and answers."""

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rqa.data import Document, Example, normalize
from rqa.documents import normalized_of, prints
from rqa.endpoint.client import Endpoint, EndpointArguments, check_price, cost, is_endpoint
from rqa.models.loading import LoadingArguments, load_causal_lm, load_tokenizer, model_fingerprint, positions_of
from rqa.models.reader import CausalLMReader
from rqa.prompts import ChatTemplateArguments, PromptArguments, Prompter, fill, retrieval_query
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.files import Store, cache_root, fingerprint, write_jsonl
from rqa.runtime.flags import Arguments, flag
from rqa.runtime.text import words

log = logging.getLogger(__name__)

Conversation = list[dict[str, str]]

FIRST, AT_ONCE = 10, 64  # conversations in the first batch, and at least in later ones
KEPT_AT_ONCE = 32  # conversations between two writes of the store, the most that an interruption costs
LOOP = 64  # characters or tokens: a reply whose end of this length occurred before is a loop, as small models make
SHOWN = 3  # rejected replies that are logged

ASK_QUESTIONS = """\
Here is a passage of a larger collection.

{passage}

Write {number} questions that people who look for help would ask and that this passage answers by itself. Nobody who \
asks has seen the passage: name the things that a question is about, and never speak of "the passage" or "the text". \
Let the questions differ in what they ask for. Write one question a line, and nothing else."""

ASK_ANSWER = """\
Here is a passage of a larger collection.

{passage}

Answer this question in one to three full sentences, with what the passage says and nothing else. Do not speak of "the \
passage". If the passage does not answer the question, reply with the words NO ANSWER alone.

Question: {question}"""

FEWEST_WORDS = 3  # of a question; shorter ones are not specific
_MARK = re.compile(r"^[\s\-*\u2022>#]*(?:(?:Q|Question)?\s*\d*\s*[.):]\s)?", re.IGNORECASE)
# Small models write 'The answer to the question: What ...?'.
_LABEL = re.compile(r"^.*\bquestion\s*\d*:[\s*]*", re.IGNORECASE)
_UNSEEN = re.compile(r"\b(?:the|this) passage\b", re.IGNORECASE)  # people who ask do not see the passage
_QUESTION_END = re.compile(r"[?\uff1f\u061f]$")  # ASCII, full-width and Arabic


@dataclass(kw_only=True)
class GeneratorArguments(LoadingArguments, EndpointArguments, ChatTemplateArguments):
    """The language model that writes, and its price."""

    model_name_or_path: str = flag(help="Model that writes: a directory, a hub name, or openai::http://host:port/v1.")
    max_new_tokens: int = flag(256, "Maximum tokens of a reply.")
    prompt_template: str | None = flag(None, "Text file that replaces the prompt, with the same placeholders.")
    price: list[float] = flag([], "Dollars per million input tokens, and per million output tokens, to estimate costs.")
    estimate_only: bool = flag(False, "Whether to log the estimated cost and stop.")

    def check(self) -> None:
        self.check_bounds("max_new_tokens", at_least=1)
        check_price("price", self.price)


@dataclass(kw_only=True)
class SampleArguments(Arguments):
    """Sampled passages, and their splits."""

    num_train_passages: int = flag(1000, "Number of passages in the training split.")
    num_eval_passages: int = flag(100, "Number of passages in the evaluation split.")
    num_test_passages: int = flag(100, "Number of passages in the test split.")
    split_by: str = flag("passage", "Unit that no two splits share.", ["passage", "source"])
    min_passage_words: int = flag(20, "Minimum words of a passage; shorter ones are not asked about.")
    seed: int = flag(42, "Seed of the choice of passages.")

    def check(self) -> None:
        if min(self.sizes.values()) < 0 or not any(self.sizes.values()):
            raise UserError("--num_train_passages, --num_eval_passages, --num_test_passages: set one or more, above 0")

    @property
    def sizes(self) -> dict[str, int]:
        return {split: getattr(self, f"num_{split}_passages") for split in ("train", "eval", "test")}


def parse_questions(reply: str, number: int) -> list[str]:
    """The first `number` distinct lines that end in a question mark and do not mention the passage, or a ValueError."""
    # Numbers, bullets, quotes and any text up to "question:" are removed.
    lines = (_LABEL.sub("", _MARK.sub("", line, count=1)) for line in reply.splitlines())
    lines = (line.strip().strip('*"\u201c\u201d ') for line in lines)
    lines = [line for line in lines if len(words(line)) >= FEWEST_WORDS and _QUESTION_END.search(line)]
    questions = list(dict.fromkeys(line for line in lines if not _UNSEEN.search(line)))
    if not questions:
        raise ValueError("mentions the passage" if lines else "holds no question")
    return questions[:number]


def parse_answer(reply: str, question: str) -> str:
    """The answer on one line; a ValueError if it is missing, mentions the passage, or repeats the question."""
    answer = " ".join(re.sub(r"^\s*answer\s*:", "", reply, flags=re.IGNORECASE).split())
    answer_words = words(answer)
    if not answer_words or answer_words == words(question) or answer_words[:2] == ["no", "answer"]:
        raise ValueError("holds no answer")
    if _UNSEEN.search(answer):
        raise ValueError("mentions the passage")
    return answer


class LocalGenerator:
    """A decoder with its own chat template, loaded by every process."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: GeneratorArguments) -> None:
        self.tokenizer, limit, variables = tokenizer, flags.max_new_tokens, flags.chat_template_kwargs
        prompt = PromptArguments(chat_format="template", max_new_tokens=limit, chat_template_kwargs=variables)
        self.reader = CausalLMReader(model, Prompter(tokenizer, prompt))
        self.reader.loop = LOOP
        self._longest = positions_of(model) - limit
        self._store = Store(cache_root() / "generated.sqlite")
        self._identity = fingerprint(model_fingerprint(model, tokenizer), f"{limit} {LOOP} {variables}")

    def generate(self, conversations: Sequence[Conversation]) -> list[tuple[str, bool]]:
        """Each greedy reply, and whether it is cut; replies of earlier runs are reused. [Q] -> [Q]"""
        keys = [fingerprint(self._identity, json.dumps(turns)) for turns in conversations]
        waiting = dict(zip(keys, conversations, strict=True))
        kept = distributed.from_main(self._store.get(waiting))
        missing = [key for key in waiting if key not in kept]
        for start in range(0, len(missing), KEPT_AT_ONCE):
            part = missing[start : start + KEPT_AT_ONCE]
            kept |= zip(part, self._reply([waiting[key] for key in part]), strict=True)
            if distributed.is_main():
                self._store.put({key: kept[key] for key in part})
        return [(text, cut) for text, cut in (kept[key] for key in keys)]

    def _reply(self, conversations: Sequence[Conversation]) -> list[tuple[str, bool]]:
        """Generate a share of the replies in each process, and gather all; a prompt that is too long gets ""."""
        prompter = self.reader.prompter
        safe = ([turn | {"content": prompter.as_text(turn["content"])} for turn in turns] for turns in conversations)
        texts = map(prompter.apply_template, distributed.share(list(safe)))
        prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        if longer := sum(len(prompt) > self._longest for prompt in prompts):
            log.warning("%d passages are longer than the model can read and are left out", longer)
        prompts = [prompt if len(prompt) <= self._longest else [] for prompt in prompts]
        answers = self.reader.answer_prompts(prompts)
        return distributed.gather([(answer.text, answer.cut) for answer in answers])


def _writer(flags: GeneratorArguments) -> Callable[[Sequence[Conversation]], list[tuple[str, bool]]]:
    """The function that generates replies with the model that the flags name, here or behind a server."""
    name = flags.model_name_or_path
    if is_endpoint(name):
        endpoint = Endpoint(name, flags, flags.template_options)

        def ask(conversations: Sequence[Conversation]) -> list[tuple[str, bool]]:
            replies = endpoint.ask(conversations, flags.max_new_tokens) if distributed.is_main() else []
            return distributed.from_main([(reply.text, reply.cut) for reply in replies])

        return ask
    tokenizer = load_tokenizer(name, flags.trust_remote_code)
    if not tokenizer.chat_template:
        raise UserError(f"--model_name_or_path {name}: has no chat template; name an instruction-tuned model")
    return LocalGenerator(load_causal_lm(name, flags), tokenizer, flags).generate


def generate(
    conversations: Sequence[Conversation], flags: GeneratorArguments, wanted: str, accepted: Path,
    read: Callable[[int, str], list[Example]],
) -> list[list[Example]]:  # fmt: skip
    """Generate a reply to each conversation, and parse it by `read(number, reply)` into examples. [Q] -> [Q]

    A ValueError of `read` says why a reply is left out. The examples so far are in the file `accepted`, which the
    caller deletes. With `--estimate_only true`, the process ends after the cost is logged.
    """
    log.info("%s", cost(f"{len(conversations)} replies", conversations, flags.max_new_tokens, flags.price))
    if flags.estimate_only:
        raise SystemExit
    write, made, rejected, unfinished = _writer(flags), [], 0, 0
    while (done := len(made)) < len(conversations):
        started = time.monotonic()
        for text, cut in write(conversations[done : done + (max(AT_ONCE, done // 4) if done else FIRST)]):
            repeats = text.count(text[-LOOP:]) > 1
            unfinished += not text or (cut and not repeats)
            try:
                whole = text.rpartition("\n")[0] if cut or repeats else text  # drops the unfinished last line
                made.append(read(len(made), whole))
            except ValueError as error:
                made.append([])
                rejected += 1
                if rejected <= SHOWN:
                    why = "repeats itself" if repeats else "is cut" if cut else error
                    log.info("a reply is left out, since it %s: %r", why, text[:200])
        if any(made) and distributed.is_main():
            write_jsonl(accepted, (example.to_json() for examples in made for example in examples))
        if left := len(conversations) - len(made):
            seconds = left * (time.monotonic() - started) / (len(made) - done)
            log.info("%d replies, %d left out; the other %d take about %.0f s", len(made), rejected, left, seconds)
        if not done and rejected > len(made) / 2:
            log.warning("%d of the first %d replies hold no %s; name a larger model", rejected, len(made), wanted)
    if unfinished:
        log.warning("%d of %d replies were empty or cut; raise --max_new_tokens", unfinished, len(made))
    return made


def asked_once(made: Sequence[list[Example]]) -> list[list[Example]]:
    """The questions written about one passage only; those about several do not tell passages apart."""
    frequency = Counter(normalize(draft.question) for drafts in made for draft in drafts)
    return [[draft for draft in drafts if frequency[normalize(draft.question)] == 1] for drafts in made]


def divide(made: Iterable[list[Example]], asked: Mapping[Any, Sequence[Any]]) -> dict[Any, list[Example]]:
    """The examples of all conversations, divided among the splits or files that were asked about, in their order."""
    each = iter(made)
    return {name: [example for _ in items for example in next(each)] for name, items in asked.items()}


def conversation(template: str, **fields: str) -> Conversation:
    return [{"role": "user", "content": fill(template, fields)}]


def sample_passages(documents: Sequence[Document], flags: SampleArguments) -> dict[str, list[Document]]:
    """Passages of each split, in the database's order; no two splits share a text, or a source."""
    distinct = np.sort(np.unique(normalized_of(documents), return_index=True)[1])  # positions of distinct texts. [T]
    groups = np.arange(len(distinct))
    if flags.split_by == "source":
        sources = (repr(documents[number].metadata.get("source", number)) for number in distinct.tolist())
        groups = np.unique(prints((source,) for source in sources), return_inverse=True)[1]
    shuffled = np.random.default_rng(flags.seed).permutation(len(distinct))[groups]
    # Passages are read lazily: a database can be much larger than the sample.
    drawn = ((shuffled[at], int(distinct[at])) for at in np.argsort(shuffled, kind="stable"))
    long_enough = (at for at in drawn if len(words(documents[at[1]].page_content)) >= flags.min_passage_words)
    each_group = ([number for _, number in group] for _, group in groupby(long_enough, itemgetter(0)))
    chosen: dict[str, list[Document]] = {}
    read = 0
    for split, size in flags.sizes.items():
        numbers: list[int] = []
        while len(numbers) < size:
            if not (more := next(each_group, [])):
                has = f"{read} distinct passages of --min_passage_words {flags.min_passage_words} or more"
                few = f"too few for {sum(flags.sizes.values())} in all; lower --num_..._passages"
                raise UserError(f"--num_{split}_passages {size}: the database has {has}, {few}")
            read += len(more)
            numbers += more
        chosen[split] = [documents[number] for number in sorted(numbers[:size])]
    return chosen


def round_trip(retriever: PassageRetriever, examples: Sequence[Example], k: int) -> list[Example]:
    """Keep the examples whose passage, or one with the same text, is among the k that the retriever finds.

    A question that does not retrieve its passage from the database fits many passages, or none (Alberti et al. 2019
    keep questions by the answer; Dai et al. 2023, Promptagator, by the passage).
    """
    if not examples:
        return []
    found = retriever.documents_of(retriever.retrieve_shared(list(map(retrieval_query, examples)), k))
    texts = [{normalize(document.page_content) for document in documents} for documents in found]
    pairs = zip(examples, texts, strict=True)
    return [example for example, near in pairs if normalize(example.gold_docs[0].page_content) in near]


def question_rows(examples: Iterable[Example]) -> Iterable[dict[str, Any]]:
    """LocalRQA's rows: one per passage, with its `questions`."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for example in examples:
        row = rows.setdefault(example.gold_docs[0].key, example.to_json() | {"questions": []})
        row.pop("question", None)
        row["questions"].append(example.question)
    return rows.values()
