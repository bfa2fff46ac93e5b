"""The frozen language model that RPG and EMDR2 ask, behind its kept scores."""

from dataclasses import asdict, dataclass, field

import torch

from rqa.models.causal_lm import load_causal_lm
from rqa.models.loading import load_tokenizer, model_fingerprint
from rqa.objectives.teacher import AnswerScorer, Teacher
from rqa.prompts import PromptArguments, Prompter
from rqa.runtime.files import cache_root, fingerprint
from rqa.runtime.precision import compute_dtype
from rqa.training.arguments import LoopArguments


@dataclass
class LanguageModelArguments:
    """The language model that finds documents useful."""

    lm_model_path: str = field(metadata={"help": "The frozen language model: a directory or a hub name."})
    text_maxlength: int = field(default=512, metadata={"help": "Tokens of document, question and answer for the LM."})
    lm_tokens_per_batch: int = field(default=8192, metadata={"help": "Tokens of one forward pass of the LM."})


def load_teacher(lm: LanguageModelArguments, loop: LoopArguments, device: torch.device) -> Teacher:
    """The mean log-likelihood of the answer given one document, each pair computed once."""
    prompt = PromptArguments(max_seq_length=lm.text_maxlength, max_new_tokens=1)
    prompter = Prompter(load_tokenizer(lm.lm_model_path, loop.trust_remote_code), prompt)
    model = load_causal_lm(
        lm.lm_model_path,
        dtype=compute_dtype(loop.bf16, loop.fp16, device),
        flash=loop.use_flash_attention,
        trust_remote_code=loop.trust_remote_code,
    ).to(device)
    identity = fingerprint(model_fingerprint(model, prompter.tokenizer), str(asdict(prompt)), prompter.instruction)
    return Teacher(AnswerScorer(model, prompter, lm.lm_tokens_per_batch), identity, cache_root() / "teacher.sqlite")
