"""What a language model is asked when training data are made of passages, and what is read from its replies."""

import re
from dataclasses import dataclass, field

from rqa.data.documents import Document
from rqa.prompts.text import fill

Conversation = list[dict[str, str]]

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
_LABEL = re.compile(
    r"^.*\bquestion\s*\d*:[\s*]*", re.IGNORECASE
)  # small models write 'The answer to the question: What ...?'
_UNSEEN = re.compile(r"\b(?:the|this) passage\b", re.IGNORECASE)  # no reader of a question or an answer sees one
_QUESTION_END = re.compile(r"[?\uff1f\u061f]$")  # also full-width and Arabic


@dataclass
class GenerationPromptArguments:
    """Prompts of one's own."""

    prompt_template: str | None = field(
        default=None, metadata={"help": "A text file that replaces the prompt; its placeholders as in the default."}
    )


def ask_questions(template: str, document: Document, number: int) -> Conversation:
    """The conversation that asks for questions about a passage."""
    return [{"role": "user", "content": fill(template, {"passage": document.fmt_content, "number": str(number)})}]


def ask_answer(template: str, document: Document, question: str) -> Conversation:
    """The conversation that asks for the answer to a question."""
    return [{"role": "user", "content": fill(template, {"passage": document.fmt_content, "question": question})}]


def parse_questions(reply: str, number: int) -> list[str]:
    """The first lines that end in a question mark and do not speak of the passage; none twice.

    Numbers, bullets, quotes and whatever leads to "question:" are taken off.
    """
    questions: dict[str, None] = {}
    for line in reply.splitlines():
        question = _LABEL.sub("", _MARK.sub("", line, count=1)).strip().strip('*"\u201c\u201d ')
        long_enough = len(question.split()) >= FEWEST_WORDS
        if long_enough and _QUESTION_END.search(question) and not _UNSEEN.search(question):
            questions.setdefault(question)
    return list(questions)[:number]


def parse_answer(reply: str, question: str) -> str | None:
    """The answer on one line; None where the model found none, speaks of the passage or says the question again."""
    answer = " ".join(re.sub(r"^\s*answer\s*:", "", reply, flags=re.IGNORECASE).split())
    bare = re.sub(r"[^\w\s]", "", answer).strip().lower()
    echo = bare == re.sub(r"[^\w\s]", "", question).strip().lower()
    return None if not bare or echo or bare.startswith(NO_ANSWER) or _UNSEEN.search(answer) else answer
