"""The one place where passages, chat history and question become text, and text becomes token ids.

Training and generation build what a reader sees through one `encode`: what a trained model sees at inference is, token
for token, what it saw in training.
"""

from rqa.prompts.decoder import PromptArguments, Prompter, TokenSequence
from rqa.prompts.fusion import FusionPromptArguments, FusionPrompter, FusionSequence
from rqa.prompts.text import DoesNotFit, retrieval_query

__all__ = [
    "DoesNotFit",
    "FusionPromptArguments",
    "FusionPrompter",
    "FusionSequence",
    "PromptArguments",
    "Prompter",
    "TokenSequence",
    "retrieval_query",
]
