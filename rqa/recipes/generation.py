"""Training data from a document database: passages sampled and split, questions asked about them, answers given."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from rqa.data.documents import Document
from rqa.data.duplicates import normalize
from rqa.data.examples import Example
from rqa.models.generator import TextGenerator
from rqa.models.loading import LoadingArguments
from rqa.prompts import retrieval_query
from rqa.prompts.estimate import check_price, cost
from rqa.prompts.generation import Conversation, ask_answer, ask_questions, parse_answer, parse_questions
from rqa.retrieval.hits import PassageRetriever
from rqa.runtime.errors import UserError, check_bounds

SPLITS = ("train", "eval", "test")


@dataclass
class GeneratorArguments(LoadingArguments):
    """Who writes, and at what price."""

    model_name_or_path: str = field(
        metadata={"help": "Who writes: a directory, a hub name, or openai::http://host:port/v1."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens of a reply, at most."})
    price: list[float] = field(
        default_factory=list, metadata={"help": "Dollars for a million tokens in, and out, to tell the cost before."}
    )
    estimate_only: bool = field(default=False, metadata={"help": "Say what it would cost, and stop."})

    def __post_init__(self) -> None:
        check_bounds(self, "max_new_tokens", at_least=1)
        check_price("price", self.price)


@dataclass
class SampleArguments:
    """Which passages are asked about."""

    num_train_passages: int = field(default=400, metadata={"help": "Passages of the training split."})
    num_eval_passages: int = field(default=50, metadata={"help": "Passages of the evaluation split."})
    num_test_passages: int = field(default=100, metadata={"help": "Passages of the test split."})
    split_by: str = field(
        default="passage",
        metadata={"help": "Whether passages of one source may be in two splits.", "choices": ["passage", "source"]},
    )
    min_passage_words: int = field(default=20, metadata={"help": "Shorter passages are not asked about."})
    seed: int = field(default=42, metadata={"help": "Decides which passages."})

    def __post_init__(self) -> None:
        if min(self.sizes.values()) < 0 or not any(self.sizes.values()):
            raise UserError("--num_train_passages, --num_eval_passages, --num_test_passages: ask for some passages")

    @property
    def sizes(self) -> dict[str, int]:
        """Passages by split."""
        return dict(zip(SPLITS, (self.num_train_passages, self.num_eval_passages, self.num_test_passages), strict=True))


def sample_passages(documents: Sequence[Document], arguments: SampleArguments) -> dict[str, list[Document]]:
    """Passages of each split, in the database's order; no text, or no source, is in two of them.

    Raises:
        UserError: there are not enough.
    """
    distinct: dict[str, int] = {}
    for number, document in enumerate(documents):
        if len(document.page_content.split()) >= arguments.min_passage_words:
            distinct.setdefault(normalize(document.page_content), number)
    groups: dict[Any, list[int]] = {}
    for number in distinct.values():
        group = number if arguments.split_by == "passage" else documents[number].metadata.get("source", number)
        groups.setdefault(group, []).append(number)
    shuffled = list(groups.values())
    Random(arguments.seed).shuffle(shuffled)
    chosen: dict[str, list[Document]] = {}
    for split, size in arguments.sizes.items():
        numbers: list[int] = []
        while len(numbers) < size:
            if not shuffled:
                asked = sum(arguments.sizes.values())
                raise UserError(
                    f"--num_{split}_passages {size}: the database has {len(distinct)} distinct passages of "
                    f"--min_passage_words {arguments.min_passage_words} or more, too few for {asked} in all"
                )
            numbers += shuffled.pop()
        chosen[split] = [documents[number] for number in sorted(numbers[:size])]
    return chosen


def write_questions(
    generator: TextGenerator, passages: dict[str, list[Document]], template: str, number: int, counts: Counter[str]
) -> dict[str, list[Example]]:
    """Questions about each split's passages; one that is asked of two passages is asked of neither.

    Args:
        number: Questions of a passage, at most.
        counts: Counts what becomes of the replies.

    Raises:
        UserError: no reply holds a question.
    """
    asked = [(split, document) for split, found in passages.items() for document in found]
    replies = generator.generate([ask_questions(template, document, number) for _, document in asked])
    drafts = [
        (split, Example(question, (document,)))
        for (split, document), reply in zip(asked, replies, strict=True)
        for question in parse_questions(reply, number)
    ]
    counts["passages"] = len(asked)
    counts["passages without a readable question"] = len(asked) - len({id(draft.gold_docs[0]) for _, draft in drafts})
    if not drafts:
        raise UserError(
            f"--model_name_or_path: none of {len(asked)} replies holds a question; the first: {replies[0]!r}"
        )
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
    found = retriever.documents_of(retriever.retrieve([retrieval_query(example) for example in examples], k))
    return [
        example
        for example, documents in zip(examples, found, strict=True)
        if normalize(example.gold_docs[0].page_content) in {normalize(document.page_content) for document in documents}
    ]


def question_rows(examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
    """LocalRQA's rows: a passage a line, with its `questions`."""
    grouped: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        grouped.setdefault(example.gold_docs[0].key, []).append(example)
    for group in grouped.values():
        row = group[0].to_json()
        del row["question"]
        yield {**row, "questions": [example.question for example in group]}


def answer_conversations(examples: Sequence[Example], template: str) -> list[Conversation]:
    """What is asked for the answers of these examples, each from its first gold passage.

    Raises:
        UserError: an example has none.
    """
    for example in examples:
        if not example.gold_docs:
            raise UserError(f"{example.where}: field 'gold_docs' is empty; an answer needs a passage")
    return [ask_answer(template, example.gold_docs[0], example.question) for example in examples]


def write_answers(
    generator: TextGenerator, examples: Sequence[Example], template: str, counts: Counter[str]
) -> list[Example]:
    """The examples with their answers; those that the passage does not answer are left out."""
    replies = generator.generate(answer_conversations(examples, template))
    answers = [parse_answer(reply, example.question) for reply, example in zip(replies, examples, strict=True)]
    counts["answers"] += sum(answer is not None for answer in answers)
    counts["questions left out without an answer"] += sum(answer is None for answer in answers)
    pairs = zip(examples, answers, strict=True)
    return [replace(example, gold_answer=answer) for example, answer in pairs if answer is not None]


def estimate(generator: TextGenerator, conversations: Sequence[Conversation], arguments: GeneratorArguments) -> str:
    """What generating will cost at most, before anything is asked."""
    written = arguments.max_new_tokens * len(conversations)
    return cost(f"{len(conversations)} replies", generator.count_tokens(conversations), written, arguments.price)


def answers_path(path: Path, directory: Path) -> Path:
    """`train_w_q.jsonl` becomes `train_w_qa.jsonl`, and any other name receives the ending."""
    return directory / f"{path.stem.removesuffix('_w_q')}_w_qa.jsonl"
