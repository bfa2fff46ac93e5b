"""train_fid as a user runs it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from trainers import Train, history, scores, written
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rqa.models.encoder_decoder import NEW_LAYERS

LENGTHS = {"max_encoder_seq_length": 64, "max_decoder_seq_length": 16, "num_beams": 2}


def test_training_lowers_the_loss_and_writes_a_plain_checkpoint(
    train: Train, evaluate: Callable[..., dict[str, float]], encoder_path: str, tmp_path: Path
) -> None:
    output = train("train_fid", **LENGTHS, max_steps=24, learning_rate=3e-3, eval_steps=12,
                   gradient_checkpointing="true", gradient_accumulation_steps=2)  # fmt: skip
    losses, found = history(output, "loss"), scores(output)
    assert min(history(output, "eval_loss")) < 0.7 * losses[0]
    assert {"test_loss", "test_retr/recall@4", "test_gen/rougeL"} <= set(found)
    arguments = written(output, "all_args.json")
    assert (arguments["new_layers"], arguments["new_layers_learning_rate"]) == (NEW_LAYERS, pytest.approx(0.021))
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.generation_config.decoder_start_token_id == tokenizer.cls_token_id
    assert model.generation_config.eos_token_id == tokenizer.sep_token_id
    assert model.generate(**tokenizer("What?", return_tensors="pt"), max_new_tokens=4).shape[1] > 1
    again = train("train_fid", **LENGTHS, model_name_or_path=output, output_dir=tmp_path / "again", max_steps=1,
                  learning_rate=0, eval_strategy="no")  # fmt: skip
    assert scores(again)["test_loss"] == pytest.approx(found["test_loss"], rel=1e-5)
    evaluated = evaluate(output, embedding_model=encoder_path, **LENGTHS)
    for name in ("test_gen/rougeL", "test_gen/f1", "test_retr/recall@4"):
        assert scores(again)[name] == evaluated[name] == found[name]
