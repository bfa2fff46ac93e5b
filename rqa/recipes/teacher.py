"""The frozen models that are asked, behind their kept scores: RPG's and EMDR2's language model, DCA's reader."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from rqa.data.examples import Example
from rqa.models.causal_lm import load_causal_lm
from rqa.models.endpoint import Endpoint, EndpointArguments, is_endpoint
from rqa.models.fusion import load_fusion, refuse_overflow
from rqa.models.loading import load_tokenizer, model_fingerprint
from rqa.objectives.dca import CrossAttentionScorer, GivenScores
from rqa.objectives.teacher import AnswerScorer, EndpointScorer, Teacher
from rqa.prompts import PassagePromptArguments, PromptArguments, Prompter
from rqa.prompts.estimate import EstimatedTokens
from rqa.runtime.errors import UserError
from rqa.runtime.files import cache_root, fingerprint
from rqa.runtime.precision import compute_dtype
from rqa.training.arguments import LoopArguments


@dataclass
class LanguageModelArguments(EndpointArguments):
    """The language model that finds documents useful, here or behind a server."""

    lm_model_path: str = field(
        metadata={"help": "The frozen language model: a directory, a hub name, or openai::http://host:port/v1."}
    )
    text_maxlength: int = field(default=512, metadata={"help": "Tokens of document, question and answer for the LM."})
    lm_tokens_per_batch: int = field(default=8192, metadata={"help": "Tokens of one forward pass of the LM."})
    lm_tokenizer: str | None = field(
        default=None, metadata={"help": "A server's tokenizer, to cut by; by default three bytes count as a token."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lm_tokenizer and not is_endpoint(self.lm_model_path):
            raise UserError("--lm_tokenizer: a local model brings its own; give it with --lm_model_path openai::URL")


def load_teacher(lm: LanguageModelArguments, loop: LoopArguments, device: torch.device) -> Teacher:
    """The mean log-likelihood of the answer given one document, each pair computed once."""
    prompt = PromptArguments(max_seq_length=lm.text_maxlength, max_new_tokens=1)
    if is_endpoint(lm.lm_model_path):
        scorer, model = _remote_scorer(lm, prompt, loop)
    else:
        scorer, model = _local_scorer(lm, prompt, loop, device)
    identity = fingerprint(model, str(asdict(prompt)), scorer.prompter.instruction)
    return Teacher(scorer, identity, cache_root() / "teacher.sqlite")


def _local_scorer(
    lm: LanguageModelArguments, prompt: PromptArguments, loop: LoopArguments, device: torch.device
) -> tuple[AnswerScorer, str]:
    prompter = Prompter(load_tokenizer(lm.lm_model_path, loop.trust_remote_code), prompt)
    model = load_causal_lm(
        lm.lm_model_path,
        dtype=compute_dtype(loop.bf16, loop.fp16, device),
        flash=loop.use_flash_attention,
        trust_remote_code=loop.trust_remote_code,
    ).to(device)
    return AnswerScorer(model, prompter, lm.lm_tokens_per_batch), model_fingerprint(model, prompter.tokenizer)


def _remote_scorer(
    lm: LanguageModelArguments, prompt: PromptArguments, loop: LoopArguments
) -> tuple[EndpointScorer, str]:
    endpoint = Endpoint(lm.lm_model_path, lm)
    tokenizer = load_tokenizer(lm.lm_tokenizer, loop.trust_remote_code) if lm.lm_tokenizer else EstimatedTokens()
    identity = fingerprint(endpoint.base_url, endpoint.model)
    return EndpointScorer(endpoint, Prompter(tokenizer, prompt)), identity


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
        if self.reader_batch_size < 1:
            raise UserError(f"--reader_batch_size {self.reader_batch_size}: must be at least 1")


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
    options = {"flash": loop.use_flash_attention, "trust_remote_code": loop.trust_remote_code}
    model, prompter = load_fusion(reader.reader_model_path, prompt, dtype=dtype, **options)
    refuse_overflow(model, dtype)
    identity = fingerprint(
        model_fingerprint(model, prompter.tokenizer),
        prompter.template,
        str(prompt.max_encoder_seq_length),
        reader.attention_score,
    )
    scorer = CrossAttentionScorer(model.to(device), prompter, reader.reader_batch_size, reader.attention_score)
    return Teacher(scorer, identity, cache_root() / "teacher.sqlite")
