"""A reader behind an OpenAI-compatible server."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.models.endpoint import Endpoint
from rqa.models.generation import Answer
from rqa.prompts import DoesNotFit, PromptArguments, Prompter
from rqa.prompts.estimate import EstimatedTokens

log = logging.getLogger(__name__)


class EndpointReader:
    """Answers questions over passages by chat; the instruction is that of every other reader, the format the server's.

    Args:
        prompt: `max_seq_length` bounds what is sent, in tokens of the tokenizer or, without one, by estimate.
    """

    def __init__(
        self, endpoint: Endpoint, prompt: PromptArguments, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.endpoint = endpoint
        self.prompter = Prompter(tokenizer or EstimatedTokens(), replace(prompt, chat_format="prefix"))

    def answer(self, examples: Sequence[Example], passages: Sequence[Sequence[Document]]) -> list[Answer]:
        """One answer at temperature 0 for each question, many asked at once. [Q] -> [Q]

        A question that does not fit by itself is reported and answered by nothing.
        """
        answers = [Answer("", 0)] * len(examples)
        asked = {}
        for number, (example, documents) in enumerate(zip(examples, passages, strict=True)):
            try:
                asked[number] = self.prompter.messages(example, documents)
            except DoesNotFit as error:
                log.warning("%s; it is left unanswered", error)
        replies = self.endpoint.ask(list(asked.values()), self.prompter.arguments.max_new_tokens, desc="generate")
        for number, reply in zip(asked, replies, strict=True):
            answers[number] = Answer(*reply)
        return answers

    def warm_up(self, example: Example, passages: Sequence[Document]) -> None:
        """Nothing: a server is asked no question twice, and may have to be paid."""
