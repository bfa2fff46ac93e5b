"""The cross-encoder, which scores pairs of question and passage, in the layout of `CrossEncoder`."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import numpy as np
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rqa.models import loading
from rqa.models.encoder import IDENTITY, computed, in_parts, pool
from rqa.models.layout import GENERAL_FILE, read_modules, read_part, refuse_others, stated, write_parts
from rqa.models.loading import LoadingArguments, choose_collate, load_config, load_model, load_tokenizer
from rqa.packing import TokenBatch, pack
from rqa.runtime import distributed
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import fingerprint
from rqa.runtime.flags import flag
from rqa.runtime.parallelize import WholePass
from rqa.runtime.text import as_text

log = logging.getLogger(__name__)

Pair = tuple[str, str]  # a question, and the text of a passage

READING_FILE, YES_OR_NO = "sentence_bert_config.json", "1_LogitScore"
TASKS = {"Transformer": "sequence-classification", "Transformer LogitScore": "text-generation"}
MODULES = "sentence_transformers.cross_encoder.modules."
ROLES, ANSWERS = ("query", "document"), ("true_token_id", "false_token_id")
WEIGHT, FIRST_STAGE = "rerank_weight", "first_stage"  # our fields in GENERAL_FILE; sentence-transformers ignores them
NEW_LAYERS = r"(^|\.)(classifier|score|pre_classifier|pooler|head)\."
PROBES = [("how old is he", "he is 9"), ("who", "he is 9"), ("how old is he", "salt")]
# A decoder's prompt in Qwen3-Reranker's words; it precedes the chat template that renders the messages.
ASKED = """\
{%- set turns = messages -%}
{%- macro of(role) %}{{ turns | selectattr('role', 'eq', role) | map(attribute='content') | first }}{% endmacro -%}
{%- set task = of('system') or 'Given a web search query, retrieve relevant passages that answer the query' -%}
{%- set asked = '<Instruct>: ' ~ task ~ '\\n<Query>: ' ~ of('query') ~ '\\n<Document>: ' ~ of('document') -%}
{%- set messages = [{'role': 'system', 'content': 'Judge whether the Document meets the requirements based on the \
Query and the Instruct provided. Note that the answer can only be "yes" or "no".'}, {'role': 'user', 'content': asked}]
-%}{%- set add_generation_prompt, enable_thinking = true, false -%}
"""
PLAIN = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@dataclass(kw_only=True)
class RerankerArguments(LoadingArguments):
    """The cross-encoder."""

    max_pair_length: int | None = flag(None, "Tokens of a pair, at most. Default: the checkpoint's.", rare=True)

    def check(self) -> None:
        self.check_bounds("max_pair_length", at_least=8)


class Reranker(WholePass):
    """Maps token ids of pairs to one score each, a logit; a greater score means a better passage."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int,
        reading: dict[str, Any], general: dict[str, Any],  # the contents of READING_FILE and GENERAL_FILE
        answers: Sequence[int] = (),  # a decoder's tokens "yes" and "no"; empty: the model has a head
        precision: torch.dtype | None = None,  # dtype of later matrix products; None: the model's
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.reading, self.general, self.answers = reading | {"max_seq_length": max_length}, general, answers
        self.weight: float = general.get(WEIGHT, 1.0)  # share in a sum with the first stage's scores
        self.prompt = general["prompts"].get(general.get("default_prompt_name")) or ""
        self._collate, self._as_text = choose_collate(model, precision), as_text(tokenizer)
        self._tail = lru_cache(self._end)
        self._counts = [0, 0, 0]  # pairs seen, pairs cut, and pairs seen at the last warning

    def tokenize(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Token ids of each pair, special tokens included; passages of pairs that are too long are cut. [N] -> [N]

        A question that leaves no room for passages is cut itself, and all its pairs get equal scores.
        """

        def encode(part: Sequence[Pair]) -> tuple[list[list[int]], int]:
            part = [(self._as_text(question), self._as_text(passage)) for question, passage in part]
            rows = self._encode(part)["input_ids"]
            long = [number for number, row in enumerate(rows) if len(row) > self.max_length]
            for number in long:
                tail = self._tail(part[number][0])
                rows[number] = rows[number][: self.max_length - len(tail)] + tail
            return rows, len(long)

        warning = f"pairs are longer than --max_pair_length {self.max_length}; the ends of their passages are not read"
        return in_parts(encode, pairs, self._counts, warning)

    def _end(self, question: str) -> list[int]:
        """The common last tokens of a question's pairs: [SEP], or the end of the template."""
        one, other = self._encode([(question, "0"), (question, "1 2 3 4")])["input_ids"]
        common = next((n for n, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), 0)
        return one[len(one) - common :][-self.max_length :]

    def _encode(self, pairs: Sequence[Pair], **options: Any) -> Any:
        """Uncut pairs, tokenized as in `CrossEncoder`: as two texts, or as a conversation by the chat template."""
        options |= {"verbose": False}  # no warnings about length
        if not (chat := self.reading["modality_config"].get("message")):
            return self.tokenizer([(self.prompt + question, passage) for question, passage in pairs], **options)
        system = [("system", self.prompt)] if self.prompt else []
        messages = [[*system, *zip(ROLES, pair, strict=True)] for pair in pairs]
        content = (lambda text: [{"type": "text", "text": text}]) if chat.get("format") == "structured" else str
        turns = [[{"role": role, "content": content(text)} for role, text in each] for each in messages]
        more = self.reading.get("processing_kwargs", {}).get("chat_template", {})
        texts = self.tokenizer.apply_chat_template(turns, tokenize=False, **more)
        return self.tokenizer(texts, add_special_tokens=False, **options)

    def collate(self, sequences: Sequence[Sequence[int]]) -> TokenBatch:
        """A batch of pairs, packed if the model allows it."""
        batch, end = self._collate(sequences), self.tokenizer.sep_token_id
        if "token_type_ids" in self.tokenizer.model_input_names and not self.answers:
            first = [row.index(end) + 1 if end in row else len(row) for row in sequences]
            kinds = [[0] * length + [1] * (len(row) - length) for length, row in zip(first, sequences, strict=True)]
            batch.inputs["token_type_ids"] = self._collate(kinds).inputs["input_ids"]
        return batch

    def forward(self, batch: TokenBatch) -> Tensor:
        """Scores in float32. -> [N]"""
        if self.answers or hasattr(self.model, "score"):  # a decoder: its last state has read the whole pair
            hidden = loading.hidden_states(self.model, batch)
            states = pool("lasttoken", hidden, batch)  # [N, D]
            if not self.answers:
                return self.model.score(states.to(hidden.dtype))[:, 0].float()
            # Two logits in float32: in bfloat16 they are multiples of 1/8, and passages would tie.
            layer: Any = self.model.get_output_embeddings()
            scores = (states * self._odds(layer.weight)).sum(-1)
            return scores if layer.bias is None else scores + self._odds(layer.bias)

        def one_state(base: nn.Module, _: Any, output: Any) -> Any:
            """Give the head one pooled state per pair, as sequences of length 1."""
            hidden = output.last_hidden_state
            states = pool(getattr(self.model.config, "classifier_pooling", "cls"), hidden.flatten(0, 1), batch)
            output.last_hidden_state = states[:, None].to(hidden.dtype)  # [N, 1, D]
            if pooler := getattr(base, "pooler", None):
                output.pooler_output = pooler(output.last_hidden_state)
            return output

        handle = self.model.base_model.register_forward_hook(one_state)
        try:
            return self.model(**batch.inputs).logits[:, 0].float()
        finally:
            handle.remove()

    def _odds(self, values: Tensor) -> Tensor:
        """The difference of "yes" and "no", or a head's only value. [V, ...] or [1] -> [...]"""
        yes, *no = self.answers or (0,)
        return values[yes].float() - (values[no[0]].float() if no else 0)

    @torch.no_grad()
    def refusal(self) -> str | None:
        """Why a batch's scores differ from the model's own for single pairs, tried on three; None if they do not."""
        try:
            rows = self._encode(PROBES)["input_ids"]
            ours = self(self.collate(rows).to(self.model.device))
            alone = (self._encode([pair], return_tensors="pt").to(self.model.device) for pair in PROBES)
            theirs = torch.stack([self._odds(self.model(**inputs).logits.flatten(0, -2)[-1]) for inputs in alone])
        except Exception as error:
            return one_line(error)
        if len(rows[0]) > self.max_length:
            return f"--max_pair_length {self.max_length} is less than the {len(rows[0])} tokens of a very short pair"
        if rows[0] in rows[1:]:
            return "its chat template ignores messages of the role 'query' or 'document'"
        near = torch.finfo(self.model.dtype).eps ** 0.5
        same = torch.allclose(ours, theirs, near, near, equal_nan=True)
        return None if same else "its kind of head is not supported: the model itself gives other scores"

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores without gradient. -> float32 [N]"""
        return computed(self, self.tokenize(pairs), "score", self._collate is not pack)

    def fingerprint(self) -> str:
        """A hash of everything that determines scores."""
        settings = json.dumps([self.answers, self.prompt, self.reading], sort_keys=True)
        return fingerprint(loading.model_fingerprint(self.model, self.tokenizer), settings)

    def save_pretrained(self, directory: str | Path) -> None:
        """Save in the layout that `CrossEncoder` loads; its `predict` applies an activation to our scores."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        files = {READING_FILE: self.reading, GENERAL_FILE: self.general | {WEIGHT: self.weight}}
        modules = {"": f"{MODULES}Transformer"}
        if self.answers:
            modules[YES_OR_NO] = f"{MODULES}LogitScore"
            files[f"{YES_OR_NO}/config.json"] = dict(zip(ANSWERS, self.answers, strict=False))
        write_parts(Path(directory), modules, files)


def load_reranker(
    path: str,
    flags: RerankerArguments = RerankerArguments(dtype="float32"),
    dtype: torch.dtype | None = None,  # None: as for frozen models
    main_only: bool = False,
    new_head: bool = False,  # whether a checkpoint without a head gets an untrained one
) -> Reranker:
    """Load a reranker in the layout of `transformers` or of `sentence_transformers.CrossEncoder`, in eval mode.

    A decoder needs no head: its score is the logit of "yes" minus that of "no".
    """
    tokenizer, config = load_tokenizer(path, flags.trust_remote_code), load_config(path, flags.trust_remote_code)
    if config.is_encoder_decoder:
        raise UserError(f"model {path}: is an encoder-decoder; use an encoder or a decoder")
    reading, general, answers = _layout(path, config)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    kinds = " ".join(config.architectures or [])
    if not reading and "ForCausalLM" in kinds:
        answers = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
        if None in answers or tokenizer.unk_token_id in answers:
            raise UserError(f"model {path}: its tokenizer has no tokens 'yes' and 'no'; use another model")
        if not new_head:
            log.warning("model %s: is a language model; its log odds of 'yes' and 'no' are the scores", path)
        if not all(re.search(f"['\"]{role}['\"]", template) for role in ROLES):
            tokenizer.chat_template = ASKED + (template or PLAIN)
            if not _renders(tokenizer):  # the template rejects system messages
                tokenizer.chat_template = ASKED + PLAIN
    new = not answers and "ForSequenceClassification" not in kinds
    if new and not new_head:
        raise UserError(f"model {path}: is not a reranker; train one from it with bin/train_rerank")
    if new and getattr(flags, "use_lora", False):
        raise UserError("--use_lora true: the new head must be trained in full; remove the flag, or train a decoder")
    kind = transformers.AutoModelForCausalLM if answers else transformers.AutoModelForSequenceClassification
    options = {"new_layers": NEW_LAYERS, "num_labels": 1} if new else {}
    model = load_model(kind, path, flags, dtype, main_only, **options)
    if not answers and model.config.num_labels != 1:
        raise UserError(f"model {path}: gives {model.config.num_labels} scores per pair; use a model that gives one")
    stored = reading.get("max_seq_length") or tokenizer.model_max_length
    length = int(min(stored, loading.positions_of(model, unknown=512)))
    max_length = flags.max_pair_length or length
    if max_length > length:
        raise UserError(f"--max_pair_length {max_length}: {path} takes at most {length} tokens")
    logits = {"method": "forward", "method_output_name": "logits"}
    ways = {"text": logits} | ({"message": logits | {"format": "flat"}} if answers or _renders(tokenizer) else {})
    task, output = ("text-generation", "causal_logits") if answers else ("sequence-classification", "scores")
    reading = {"transformer_task": task, "modality_config": ways, "module_output_name": output} | reading
    reranker = Reranker(model, tokenizer, max_length, reading, general, answers, dtype and flags.precision).eval()
    if reason := distributed.from_main(distributed.is_main() and reranker.refusal()):
        raise UserError(f"model {path}: its scores cannot be computed: {reason}")
    return reranker


def _renders(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template renders questions and passages."""
    try:
        text = tokenizer.apply_chat_template([{"role": role, "content": f"<{role}>"} for role in ROLES], tokenize=False)
    except Exception:
        return False
    return all(f"<{role}>" in text for role in ROLES)


def _layout(path: str, config: Any) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """The reading settings (empty if not a `CrossEncoder` checkpoint), general settings and answer tokens."""
    modules, general = read_modules(path), read_part(path, GENERAL_FILE)
    if not modules or general.get("model_type") != "CrossEncoder":
        own = {"activation_fn": getattr(config, "sbert_ce_default_activation_function", None) or IDENTITY}
        own |= getattr(config, "sentence_transformers", None) or {}
        return {}, {"model_type": "CrossEncoder", "prompts": {}, **own}, []
    kinds = " ".join(kind for _, kind in modules)
    if kinds not in TASKS:
        raise UserError(f"{path}/modules.json: modules {kinds} are not supported; only {' or '.join(TASKS)}")
    file, reading = f"{path}/{READING_FILE}", read_part(path, READING_FILE)
    options, _ = stated(file, reading, "processing_kwargs", {}), stated(file, reading, "max_seq_length", 512)
    refuse_others(file, reading, {"transformer_task": TASKS[kinds], "do_lower_case": False})
    refuse_others(f"{file}: processing_kwargs", options, {name: {} for name in options.keys() - {"chat_template"}})
    file, name = f"{path}/{GENERAL_FILE}", general.get("default_prompt_name")
    prompts = general["prompts"] = stated(file, general, "prompts", {})
    refuse_others(file, general, {"default_prompt_name": name if name in prompts else ""})
    if not isinstance(weight := general.get(WEIGHT, 1.0), int | float) or not 0 <= weight <= 1:
        raise UserError(f"{file}: {WEIGHT} must be a number from 0 to 1, found {weight!r:.50}")
    if kinds == "Transformer":
        return reading, general, []
    tokens = read_part(path, name := f"{modules[-1][0]}/config.json")
    if tokens.get(ANSWERS[0]) is None:
        raise UserError(f"{path}/{name}: {ANSWERS[0]} is missing; copy the original file")
    answers = [stated(f"{path}/{name}", tokens, key, 0) for key in ANSWERS if tokens.get(key) is not None]
    return reading, general, answers
