"""EMDR2: the retriever maximises the answer's likelihood, marginalised over documents (Sachan et al. 2021).

The objective is `rpg.ListObjective` with `losses.marginal_nll`, which needs the likelihood of whole answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from rqa.data import Example
from rqa.objectives.rpg import LikelihoodArguments, ListBatch
from rqa.objectives.teacher import is_reranker
from rqa.prompts import Prompter
from rqa.runtime.errors import UserError


@dataclass(kw_only=True)
class EMDRArguments(LikelihoodArguments):
    """EMDR2's own flags."""

    def check(self) -> None:
        if is_reranker(self.lm_model_path):
            raise UserError("--lm_model_path: EMDR2 needs likelihoods, which a reranker does not have; use train_rpg")
        if self.lm_model_path.startswith("openai::") and not self.lm_tokenizer:
            raise UserError("--lm_tokenizer: EMDR2 counts answer tokens; give the tokenizer of the server's model")


class WholeAnswers:
    """A collate function that turns the teacher's mean per answer token into the whole answer's log-likelihood.

    So EMDR2 and RPG share the scores that a teacher has cached.
    """

    def __init__(self, examples: Sequence[Example], collate: Callable[..., ListBatch], prompter: Prompter) -> None:
        self.examples, self.collate, self.prompter = examples, collate, prompter

    def __call__(self, indices: Sequence[int]) -> ListBatch:
        batch = self.collate(indices)
        answers = [self.prompter.encode_answer(self.examples[i].gold_answer or "") for i in indices]
        lengths = torch.tensor(list(map(len, answers))) - len(self.prompter.end_of_turn)
        return replace(batch, teacher=batch.teacher * lengths.clamp(min=1)[:, None])
