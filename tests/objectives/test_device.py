"""Python reads no value from the device within a step: it would wait for the GPU."""

from dataclasses import replace

import torch
import pytest
from torch import nn
from fakes import Lengths
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedTokenizerBase, masking_utils

from rqa.data import Document, Example
from rqa.models import attention
from rqa.models.encoder import EncoderArguments, load_encoder
from rqa.models.encoder_decoder import load_encoder_decoder
from rqa.models.loading import load_causal_lm
from rqa.models.reranker import load_reranker
from rqa.objectives.ctl import Contrastive, Contrasts, CTLArguments
from rqa.objectives.fid import FiDArguments, FiDLikelihood
from rqa.objectives.losses import distillation, marginal_nll
from rqa.objectives.rerank import Lists, ListwiseReranking, RerankArguments
from rqa.objectives.rpg import ListObjective, ScoredCandidates
from rqa.objectives.sft import AnswerLikelihood
from rqa.packing import Batch, pad
from rqa.prompts import PromptArguments, Prompter

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


@pytest.fixture(params=["sft and swr", "sft padded", "fid t5", "fid bert", "ctl", "ctl chunks", "ctl cls padded",
                        "rpg and dca", "emdr chunks", "rerank"])  # fmt: skip
def step(
    request: pytest.FixtureRequest, lm_path: str, t5_path: str, encoder_path: str, examples: list[Example],
    documents: list[Document], tokenizer: PreTrainedTokenizerBase,
) -> tuple[nn.Module, Batch]:  # fmt: skip
    """An objective, and a batch as training makes it."""
    name, *words = request.param.split()
    asked = [(example, documents[:number], example.gold_answer) for number, example in enumerate(examples[:4], start=1)]
    if name == "sft":
        sft = AnswerLikelihood(load_causal_lm(lm_path), Prompter(tokenizer, PromptArguments(max_new_tokens=16)))
        sft._collate = pad if "padded" in words else sft._collate
        return sft, sft.batch([sft.prompter.encode(*each) for each in asked])
    if name == "fid":
        path = t5_path if "t5" in words else f"bert::{encoder_path}"
        flags = FiDArguments(embedding_model="bm25", max_encoder_seq_length=64, max_decoder_seq_length=16)
        fid = FiDLikelihood(*load_encoder_decoder(path, flags))
        return fid, fid.batch([fid.prompter.encode(*each) for each in asked])
    encoder = load_encoder(encoder_path, EncoderArguments(pooling_type="cls" if "cls" in words else "mean"))
    encoder.collate = pad if "padded" in words else encoder.collate
    size = 2 if "chunks" in words else 0
    if name == "ctl":
        rows = [replace(example, hard_neg_docs=documents[n : n + 3]) for n, example in enumerate(examples[:4])]
        flags = CTLArguments(num_hard_negatives=2, chunk_size=size)
        collate = Contrasts(rows, documents, encoder, None, flags, seed=1)
        return Contrastive(encoder, 0.1), collate(range(4))
    if name == "rerank":
        reranker, flags = load_reranker(encoder_path, new_head=True), RerankArguments(negatives_from="file")
        return ListwiseReranking(reranker), Lists(examples, documents, reranker, None, flags, seed=1)(range(4))
    chosen = [[0, 1, 2], [3], [], [5, 0]]
    batch = ScoredCandidates(examples, documents, encoder, lambda _: chosen, Lengths(), chunk_size=size)(range(4))
    return ListObjective(encoder, 0.1, marginal_nll if name == "emdr" else distillation), batch


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=NO_CUDA)])
def test_a_step_reads_no_value(device: str, step: tuple[nn.Module, Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is none. On CUDA, PyTorch refuses to wait.

    Before its first layer `transformers` asks whether a mask hides anything, unless it is compiled.
    """
    monkeypatch.setattr(masking_utils, "is_tracing", lambda mask: mask is not None)
    if device == "meta":  # it has no kernel for packed rows
        kernel = lambda query, key, value, *_: scaled_dot_product_attention(query, key, value, enable_gqa=True)  # noqa: E731
        monkeypatch.setattr(attention, "_one_by_one", kernel)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)
    objective, batch = step
    objective.train().to(device, torch.bfloat16)
    for mode in ("default", "error"):  # the first step sets up libraries
        torch.cuda.set_sync_debug_mode(mode)
        try:
            objective(batch.to(torch.device(device)))[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert any(parameter.grad is not None for parameter in objective.parameters())
