"""The frozen language model that RPG and EMDR2 ask, behind its kept scores."""

from dataclasses import asdict, dataclass, field

import torch

from rqa.models.causal_lm import load_causal_lm
from rqa.models.endpoint import Endpoint, EndpointArguments, is_endpoint
from rqa.models.loading import load_tokenizer, model_fingerprint
from rqa.objectives.teacher import AnswerScorer, EndpointScorer, Teacher
from rqa.prompts import PromptArguments, Prompter
from rqa.prompts.estimate import EstimatedTokens
from rqa.runtime import distributed
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
    dtype = compute_dtype(loop.bf16, loop.fp16, device)
    with distributed.in_turn():
        model = load_causal_lm(lm.lm_model_path, dtype=dtype, **loop.loading).to(device)
    return AnswerScorer(model, prompter, lm.lm_tokens_per_batch), model_fingerprint(model, prompter.tokenizer)


def _remote_scorer(
    lm: LanguageModelArguments, prompt: PromptArguments, loop: LoopArguments
) -> tuple[EndpointScorer, str]:
    endpoint = Endpoint(lm.lm_model_path, lm)
    tokenizer = load_tokenizer(lm.lm_tokenizer, loop.trust_remote_code) if lm.lm_tokenizer else EstimatedTokens()
    identity = fingerprint(endpoint.base_url, endpoint.model)
    return EndpointScorer(endpoint, Prompter(tokenizer, prompt)), identity
