"""Training data from a document database: passages sampled and split, questions asked about them, answers given."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rqa.data import Document, Example, normalize
from rqa.endpoint.client import Endpoint, EndpointArguments, check_price, is_endpoint
from rqa.models.causal_lm import load_causal_lm
from rqa.models.loading import LoadingArguments, load_tokenizer, model_fingerprint
from rqa.models.reader import CausalLMReader
from rqa.prompts import PromptArguments, Prompter, fill, retrieval_query
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.files import Store, cache_root, fingerprint
from rqa.runtime.flags import Arguments, flag

log = logging.getLogger(__name__)

Conversation = list[dict[str, str]]

KEPT_AT_ONCE = 128  # conversations between two writes of the store: what an interruption costs at most

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

NO_ANSWER = "no answer"
FEWEST_WORDS = 3  # of a question; what is shorter asks for nothing in particular
_MARK = re.compile(r"^[\s\-*\u2022>#]*(?:(?:Q|Question)?\s*\d*\s*[.):]\s)?", re.IGNORECASE)
# Small models write 'The answer to the question: What ...?'.
_LABEL = re.compile(r"^.*\bquestion\s*\d*:[\s*]*", re.IGNORECASE)
_UNSEEN = re.compile(r"\b(?:the|this) passage\b", re.IGNORECASE)  # no reader of a question or an answer sees one
_QUESTION_END = re.compile(r"[?\uff1f\u061f]$")  # also full-width and Arabic


@dataclass(kw_only=True)
class GeneratorArguments(LoadingArguments, EndpointArguments):
    """The language model that writes, and its price."""

    model_name_or_path: str = flag(help="Model that writes: a directory, a hub name, or openai::http://host:port/v1.")
    max_new_tokens: int = flag(256, "Tokens of a reply, at most.")
    prompt_template: str | None = flag(None, "Text file that replaces the prompt and keeps its placeholders.")
    price: list[float] = flag([], "Prices in dollars of a million tokens in and a million out, for the estimate.")
    estimate_only: bool = flag(False, "Whether to log what it would cost and stop.")

    def check(self) -> None:
        self.check_bounds("max_new_tokens", at_least=1)
        check_price("price", self.price)


@dataclass(kw_only=True)
class SampleArguments(Arguments):
    """Passages to ask about, and their splits."""

    num_train_passages: int = flag(1000, "Number of passages in the training split.")
    num_eval_passages: int = flag(100, "Number of passages in the evaluation split.")
    num_test_passages: int = flag(100, "Number of passages in the test split.")
    split_by: str = flag("passage", "What no two splits share: a passage, or a source.", ["passage", "source"])
    min_passage_words: int = flag(20, "Words of a passage, at least; shorter ones are not asked about.")
    seed: int = flag(42, "Seed that decides which passages are chosen.")

    def check(self) -> None:
        if min(self.sizes.values()) < 0 or not any(self.sizes.values()):
            raise UserError("--num_train_passages, --num_eval_passages, --num_test_passages: ask for some passages")

    @property
    def sizes(self) -> dict[str, int]:
        return {split: getattr(self, f"num_{split}_passages") for split in ("train", "eval", "test")}


def parse_questions(reply: str, number: int) -> list[str]:
    """The first lines that end in a question mark and do not speak of the passage; none twice."""
    # Numbers, bullets, quotes and whatever leads to "question:" are taken off.
    lines = (_LABEL.sub("", _MARK.sub("", line, count=1)) for line in reply.splitlines())
    lines = (line.strip().strip('*"\u201c\u201d ') for line in lines)
    lines = [line for line in lines if len(line.split()) >= FEWEST_WORDS and _QUESTION_END.search(line)]
    return list(dict.fromkeys(line for line in lines if not _UNSEEN.search(line)))[:number]


def parse_answer(reply: str, question: str) -> str | None:
    """The answer on one line; None where the model found none, speaks of the passage or says the question again."""
    answer = " ".join(re.sub(r"^\s*answer\s*:", "", reply, flags=re.IGNORECASE).split())
    bare = re.sub(r"[^\w\s]", "", answer).strip().lower()
    echo = bare == re.sub(r"[^\w\s]", "", question).strip().lower()
    return None if not bare or echo or bare.startswith(NO_ANSWER) or _UNSEEN.search(answer) else answer


class LocalGenerator:
    """A decoder in this process, or a copy of it in each of several; its own chat template is used."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self.tokenizer = tokenizer
        prompt = PromptArguments(chat_format="template", max_new_tokens=max_new_tokens)
        self.reader = CausalLMReader(model, Prompter(tokenizer, prompt))
        self._limit = (getattr(model.config, "max_position_embeddings", None) or 10**9) - max_new_tokens
        self._store = Store(cache_root() / "generated.sqlite")
        self._identity = fingerprint(model_fingerprint(model, tokenizer), str(max_new_tokens))

    def generate(self, conversations: Sequence[Conversation]) -> list[str]:
        """The reply to each conversation, greedily; what an earlier run was told is not asked again. [Q] -> [Q]"""
        keys = [fingerprint(self._identity, json.dumps(turns)) for turns in conversations]
        waiting = dict(zip(keys, conversations, strict=True))
        kept = distributed.from_main(self._store.get(waiting))
        missing = [key for key in waiting if key not in kept]
        for start in range(0, len(missing), KEPT_AT_ONCE):
            log.info("generate: %d of %d conversations done", len(keys) - len(missing) + start, len(keys))
            part = missing[start : start + KEPT_AT_ONCE]
            kept |= zip(part, self._reply([waiting[key] for key in part]), strict=True)
            if distributed.is_main():
                self._store.put({key: kept[key] for key in part})
        return [kept[key] for key in keys]

    def _reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """Each process replies to its share; a conversation longer than the model can read gets an empty reply."""
        prompter = self.reader.prompter
        said = ([turn | {"content": prompter.as_text(turn["content"])} for turn in turns] for turns in conversations)
        texts = map(prompter.apply_template, distributed.share(list(said)))
        prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        if longer := sum(len(prompt) > self._limit for prompt in prompts):
            log.warning("%d passages are longer than the model can read; nothing is made of them", longer)
        prompts = [prompt if len(prompt) <= self._limit else [] for prompt in prompts]
        answers = self.reader.answer_prompts(prompts, progress=distributed.is_main())
        return distributed.gather([answer.text for answer in answers])


def generate(conversations: Sequence[Conversation], flags: GeneratorArguments) -> list[str]:
    """The reply to each conversation by the server or the local model that the flags name. [Q] -> [Q]"""
    name = flags.model_name_or_path
    if is_endpoint(name):
        endpoint = Endpoint(name, flags)
        replies = endpoint.ask(conversations, flags.max_new_tokens) if distributed.is_main() else []
        return distributed.from_main([reply.text for reply in replies])
    tokenizer = load_tokenizer(name, flags.trust_remote_code)
    if not tokenizer.chat_template:
        raise UserError(f"--model_name_or_path {name}: has no chat template; name a model tuned to instructions")
    return LocalGenerator(load_causal_lm(name, flags), tokenizer, flags.max_new_tokens).generate(conversations)


def question_conversations(passages: dict[str, list[Document]], template: str, number: int) -> list[Conversation]:
    """What is asked about each passage of each split."""
    texts = [document.fmt_content for found in passages.values() for document in found]
    return [_ask(template, passage=text, number=str(number)) for text in texts]


def answer_conversations(examples: Sequence[Example], template: str) -> list[Conversation]:
    """What is asked for the answer of each example, from its first gold passage."""
    for example in examples:
        if not example.gold_docs:
            raise UserError(f"{example.where}: field 'gold_docs' is empty; an answer needs a passage")
    return [_ask(template, passage=each.gold_docs[0].fmt_content, question=each.question) for each in examples]


def _ask(template: str, **fields: str) -> Conversation:
    return [{"role": "user", "content": fill(template, fields)}]


def sample_passages(documents: Sequence[Document], flags: SampleArguments) -> dict[str, list[Document]]:
    """Passages of each split, in the database's order; no text, or no source, is in two of them."""
    distinct: dict[str, int] = {}
    for number, document in enumerate(documents):
        if len(document.page_content.split()) >= flags.min_passage_words:
            distinct.setdefault(normalize(document.page_content), number)
    groups: dict[Any, list[int]] = {}
    for number in distinct.values():
        group = number if flags.split_by == "passage" else documents[number].metadata.get("source", number)
        groups.setdefault(group, []).append(number)
    shuffled = list(groups.values())
    Random(flags.seed).shuffle(shuffled)
    chosen: dict[str, list[Document]] = {}
    for split, size in flags.sizes.items():
        numbers: list[int] = []
        while len(numbers) < size:
            if not shuffled:
                has = f"{len(distinct)} distinct passages of --min_passage_words {flags.min_passage_words} or more"
                few = f"too few for {sum(flags.sizes.values())} in all; lower --num_..._passages"
                raise UserError(f"--num_{split}_passages {size}: the database has {has}, {few}")
            numbers += shuffled.pop()
        chosen[split] = [documents[number] for number in sorted(numbers[:size])]
    return chosen


def read_questions(
    passages: dict[str, list[Document]], replies: Sequence[str], number: int, counts: Counter[str]
) -> dict[str, list[Example]]:
    """Questions by split, `number` a passage at most, none asked of two; `counts` gets what became of the replies."""
    asked = [(split, document) for split, found in passages.items() for document in found]
    drafts = [
        (split, Example(question, (document,)))
        for (split, document), reply in zip(asked, replies, strict=True)
        for question in parse_questions(reply, number)
    ]
    counts["passages"] = len(asked)
    counts["passages without a readable question"] = len(asked) - len({id(draft.gold_docs[0]) for _, draft in drafts})
    if not drafts:
        first = f"the first: {replies[0]!r}"
        raise UserError(f"--model_name_or_path: none of {len(asked)} replies holds a question; {first}")
    frequency = Counter(normalize(draft.question) for _, draft in drafts)
    unique = [(split, draft) for split, draft in drafts if frequency[normalize(draft.question)] == 1]
    counts["questions left out as asked of several passages"] = len(drafts) - len(unique)
    return {name: [draft for split, draft in unique if split == name] for name in passages}


def round_trip(retriever: PassageRetriever, examples: Sequence[Example], k: int) -> list[Example]:
    """The examples whose passage, or one of the same text, is among the k that the retriever finds.

    What no retriever brings back from the whole database is a question that many passages answer, or none (Alberti et
    al. 2019 keep questions by the answer; Dai et al. 2023, Promptagator, by the passage).
    """
    if not examples:
        return []
    found = retriever.documents_of(retriever.retrieve(list(map(retrieval_query, examples)), k))
    texts = [{normalize(document.page_content) for document in documents} for documents in found]
    pairs = zip(examples, texts, strict=True)
    return [example for example, near in pairs if normalize(example.gold_docs[0].page_content) in near]


def question_rows(examples: Iterable[Example]) -> Iterable[dict[str, Any]]:
    """LocalRQA's rows: a passage a line, with its `questions`."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for example in examples:
        row = rows.setdefault(example.gold_docs[0].key, example.to_json() | {"questions": []})
        row.pop("question", None)
        row["questions"].append(example.question)
    return rows.values()


def read_answers(examples: Sequence[Example], replies: Iterator[str]) -> list[Example]:
    """The examples with the answers of the next replies; those that the passage does not answer are left out."""
    pairs = [(example, parse_answer(next(replies), example.question)) for example in examples]
    return [replace(example, gold_answer=answer) for example, answer in pairs if answer is not None]
