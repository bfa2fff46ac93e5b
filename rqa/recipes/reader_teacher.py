"""The frozen reader whose cross-attention DCA distils, behind its kept scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rqa.data.examples import Example
from rqa.models.fusion import load_fusion, refuse_overflow
from rqa.models.loading import model_fingerprint
from rqa.objectives.dca import CrossAttentionScorer, GivenScores
from rqa.objectives.teacher import Teacher
from rqa.prompts import PassagePromptArguments
from rqa.runtime import distributed
from rqa.runtime.errors import UserError, check_bounds
from rqa.runtime.files import cache_root, fingerprint
from rqa.runtime.precision import compute_dtype
from rqa.training.arguments import LoopArguments


@dataclass
class ReaderTeacherArguments:
    """The reader whose cross-attention is distilled."""

    reader_model_path: str | None = field(
        default=None,
        metadata={"help": "The frozen encoder-decoder: a directory or a hub name. Not needed with --with_score true."},
    )
    with_score: bool = field(default=False, metadata={"help": "Take the scores that stand beside the ctxs instead."})
    reader_batch_size: int = field(default=4, metadata={"help": "Questions that the reader reads at once."})
    attention_score: str = field(
        default="plain",
        metadata={
            "help": "The score before the softmax, or the probability times the norm of the value (Atlas).",
            "choices": ["plain", "value_norm"],
        },
    )

    def __post_init__(self) -> None:
        if self.with_score == bool(self.reader_model_path):
            raise UserError("--reader_model_path: give it, or --with_score true to read scores from the data file")
        check_bounds(self, "reader_batch_size", at_least=1)


def load_reader_teacher(
    reader: ReaderTeacherArguments,
    prompt: PassagePromptArguments,
    loop: LoopArguments,
    examples: Sequence[Example],
    device: torch.device,
) -> Teacher | GivenScores:
    """How much the reader attends to each passage of a list, each list read once."""
    if reader.with_score:
        return GivenScores(examples)
    dtype = compute_dtype(loop.bf16, loop.fp16, device)
    with distributed.in_turn():
        model, prompter = load_fusion(reader.reader_model_path, prompt, dtype=dtype, **loop.loading)
        refuse_overflow(model, dtype)
        model.to(device)
    identity = fingerprint(
        model_fingerprint(model, prompter.tokenizer),
        prompter.template,
        str(prompt.max_encoder_seq_length),
        reader.attention_score,
    )
    scorer = CrossAttentionScorer(model, prompter, reader.reader_batch_size, reader.attention_score)
    return Teacher(scorer, identity, cache_root() / "teacher.sqlite")
