"""Training a reader over a frozen retriever."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rqa.data import Document
from rqa.evaluation.answers import ReaderEvaluation
from rqa.evaluation.judge import JudgeArguments, judge_results
from rqa.models.loading import freeze_pooler, train_adapters
from rqa.objectives.sft import encode_examples
from rqa.recipe.run import Rows, Run, Scores, TrainingArguments
from rqa.retrieval.hybrid import RetrieverArguments, open_retriever
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import load_whole_weights
from rqa.training.loop import Batches


@dataclass(kw_only=True)
class ReaderTraining(TrainingArguments, RetrieverArguments, JudgeArguments):
    """Flags of runs that train a reader."""


class ReaderRun(Run):
    """A run that trains a reader; its retriever is frozen."""

    flags: Any  # ReaderTraining and the flags that the objective's `load` and `reader` use

    def __init__(self, flags: Any, objective: type) -> None:
        """`objective` is the class to train: `AnswerLikelihood` or `FiDLikelihood`."""
        retrieves = bool(flags.embedding_model) or flags.retriever == "bm25"
        if not retrieves and (flags.reranker or flags.retriever == "hybrid"):
            name = "--reranker" if flags.reranker else "--retriever hybrid"
            raise UserError(f"{name}: needs an encoder that finds passages; set --embedding_model")
        if not retrieves and flags.gen_gpt4eval:
            hint = "set --embedding_model or --retriever bm25"
            raise UserError(f"--gen_gpt4eval true: no answers are generated without a retriever; {hint}")
        super().__init__(flags, answers=True)
        self.objective = objective.load(self.source, flags)
        self.model = self.objective.model
        train_adapters(self.model, flags, self.source)
        if self.model.config.is_encoder_decoder:
            freeze_pooler(self.model.get_encoder())
        self.retriever = open_retriever(flags, flags.embedding_model, self.documents, self.eval) if retrieves else None

    def finish(self, passages: Sequence[Sequence[Document]]) -> Scores:
        """Train on prompts with these passages, then test. -> scores on the test file"""
        self.on_eval = ReaderEvaluation(self.retriever, self.eval, self.flags)
        self.on_test = ReaderEvaluation(self.retriever, self.test, self.flags)
        self.retriever = None  # every search is done; this frees its models' memory
        sequences = encode_examples(self.objective.prompter, self.train, passages)
        fitting = list(sequences)  # numbers of the examples that fit

        def collate(indices: Sequence[int]) -> Any:
            numbers = [fitting[i] for i in indices]
            return self.objective.batch([sequences[number] for number in numbers], numbers)

        return self.train_and_test(self.objective, Batches(len(sequences), collate, self.flags, ahead=True))

    def score_eval(self, step: int) -> tuple[Scores, Rows]:
        return self.on_eval(self.objective, self.objective.reader(self.flags))

    def score_test(self) -> tuple[Scores, Rows]:
        best = type(self.objective).load(self.flags.output_dir, self.flags)
        load_whole_weights(self.model, best.model.state_dict())
        return self.on_test(self.objective, self.objective.reader(self.flags), warm_up=True)

    def publish(self, scores: Scores, rows: Rows) -> Scores:
        return judge_results(self.output, scores, rows, self.flags)[0]
