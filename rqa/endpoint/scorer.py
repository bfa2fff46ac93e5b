"""Likelihoods of answers under a server's language model, for RPG and EMDR2."""

from collections.abc import Iterable, Sequence
from typing import Any

from rqa.endpoint.client import Endpoint, EstimatedTokens
from rqa.models.loading import load_tokenizer
from rqa.objectives.teacher import NOT_TOLD_APART, Pair
from rqa.prompts import Prompter, fitting, warn_once
from rqa.runtime.files import fingerprint


class EndpointScorer:
    """`AnswerScorer` for a server that returns the log-probabilities of a prompt.

    The server tokenizes prompt and answer together: if its tokenizer merges text across their border, scores differ
    slightly from those of a local model.
    """

    def __init__(self, endpoint: Endpoint, prompter: Prompter) -> None:
        self.endpoint, self.prompter = endpoint, prompter

    def __call__(self, pairs: Sequence[Pair]) -> Iterable[tuple[int, float]]:
        rows = ((pair.example, [pair.document], pair.example.gold_answer) for pair in pairs)
        texts = fitting(self.prompter.text, rows, NOT_TOLD_APART, warn_once)
        scores = self.endpoint.answer_logprobs(*zip(*texts.values(), strict=True)) if texts else []
        known = dict(zip(texts, scores, strict=True))
        scored = {number: score for number, score in known.items() if score is not None}
        for number in known.keys() - scored.keys():  # a refused pair gets the mean score of the example's other pairs
            others = [score for i, score in scored.items() if pairs[i].example is pairs[number].example]
            known[number] = sum(others) / max(len(others), 1)
        return [(position, known.get(position) or 0.0) for position in range(len(pairs))]


def remote_scorer(flags: Any) -> tuple[EndpointScorer, str]:
    """The scorer at `--lm_model_path openai::URL` (of `TeacherArguments`), and its model's fingerprint."""
    endpoint, name = Endpoint(flags.lm_model_path, flags), flags.lm_tokenizer
    tokenizer = load_tokenizer(name, flags.trust_remote_code) if name else EstimatedTokens()
    scorer = EndpointScorer(endpoint, Prompter(tokenizer, flags.lm_prompt(tokenizer)))
    return scorer, fingerprint(endpoint.base_url, endpoint.model)
