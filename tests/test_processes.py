"""Two processes do what one does: all trainers with DDP, seven with FSDP2, evaluation on. One torchrun runs all.

And they end together, by real signals.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import faiss
import numpy as np
import pytest
from torch import Tensor
from divided_index import FACTORIES, search_all
from fakes import edit
from openai_server import serve
from safetensors.torch import load_file
from trainers import BIN, TORCHRUN, Flags, Run, history, scores, wait_for_checkpoint

from rqa.data import Example, write_examples
from rqa.documents import read_documents, write_documents
from rqa.models.encoder import load_encoder
from rqa.models.reranker import load_reranker
from rqa.retrieval.retriever import Retriever
from rqa.runtime.cli import as_words
from rqa.runtime.files import damage
from rqa.training.checkpoint import checkpoints

HERE = Path(__file__).parent
TRAINERS = {
    "sft": ("train_sft", {"eval_embedding_model": "ENCODER"}),
    "swr": ("train_swr", {"embedding_model": "ENCODER", "gradient_checkpointing": "true"}),
    "adapters": ("train_swr", {"embedding_model": "ENCODER", "gradient_checkpointing": "true", "use_lora": "true"}),
    "ctl": ("train_ctl", {"mine_negatives": "false", "num_hard_negatives": 1}),
    "ctl in chunks": ("train_ctl", {"mine_negatives": "false", "grad_cache_chunk_size": 3,
                                    "gradient_checkpointing": "true"}),
    # All mined negatives of a question, so that none is chosen by chance.
    "ctl, mined": ("train_ctl", {"mine_negatives": "true", "num_hard_negatives": 7, "negatives_from_rank": 18,
                                 "negatives_to_rank": 24, "refresh_step": 2}),
    "rpg": ("train_rpg", {"lm_model_path": "LM", "num_docs": 24, "refresh_step": 2, "text_maxlength": 256}),
    "emdr": ("train_emdr", {"lm_model_path": "LM", "num_docs": 24, "refresh_step": 2, "text_maxlength": 256}),
    "dca": ("train_dca", {"reader_model_path": "FID", "n_context": 6, "projection": "true", "indexing_dimension": 8,
                          "max_encoder_seq_length": 64}),
    "fid": ("train_fid", {"embedding_model": "ENCODER", "max_encoder_seq_length": 64, "max_decoder_seq_length": 16}),
    "rerank": ("train_rerank", {"negatives_from": "both", "embedding_model": "ENCODER", "mine_negatives": "true",
                                "num_hard_negatives": 5, "negatives_from_rank": 18, "negatives_to_rank": 22,
                                "refresh_step": 2, "num_other_gold": 0, "rerank_depth": 24}),
}  # fmt: skip
SHARDED = ("swr", "adapters", "ctl in chunks", "rpg", "dca", "fid", "rerank")  # FSDP2, too
WAYS = {False: ("no",), True: ("no", "full_shard")}  # of --fsdp
DECODERS = ("sft", "swr", "adapters")


@pytest.fixture(scope="module")
def paths(
    lm_path: str, encoder_path: str, t5_path: str, reranker_path: str, examples: list[Example], data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:  # fmt: skip
    """The models, the encoder without dropout, and files whose sizes two does not divide."""
    root = tmp_path_factory.mktemp("processes")
    encoder, fid = (shutil.copytree(path, root / Path(path).name) for path in (encoder_path, t5_path))
    load_reranker(encoder_path, new_head=True).save_pretrained(root / "reranker")
    for path in (encoder, fid, root / "reranker"):
        edit(path / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, dropout_rate=0.0)
    for name, part in (("train", examples[:15]), ("eval", examples[15:18]), ("test", examples[19:])):
        rows = [replace(example, hard_neg_docs=examples[n].gold_docs) for n, example in enumerate(part)]
        write_examples(root / f"{name}.jsonl", rows)
    paths = {"ROOT": root, "LM": lm_path, "ENCODER": encoder, "FID": fid, "RERANKER": reranker_path,
             "DOCUMENTS": data / "documents.jsonl"}  # fmt: skip
    return {name: str(path) for name, path in paths.items()}


def flags(trainer: str, processes: int, paths: dict[str, str], **more: object) -> dict[str, object]:
    """The same four examples a micro-batch and eight a step, whatever the number of processes.

    With this epsilon an update is proportional to its gradient, so that weights compare as gradients do.
    """
    root = paths["ROOT"]
    own = {flag: paths.get(str(value), value) for flag, value in TRAINERS[trainer][1].items()}
    model = f"{root}/reranker" if trainer == "rerank" else paths["FID" if trainer == "fid" else "ENCODER"]
    return {
        "model_name_or_path": paths["LM"] if trainer in DECODERS else model,
        **{f"{name}_file": f"{root}/{name}.jsonl" for name in ("train", "eval", "test")},
        "full_dataset_file_path": paths["DOCUMENTS"], "max_steps": 3, "per_device_train_batch_size": 4 // processes,
        "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2, "adam_epsilon": 1.0, "learning_rate": 0.3,
        "lr_scheduler_type": "constant", "eval_steps": 2, "save_steps": 2, "logging_steps": 3,
        **({"max_new_tokens": 6, "max_seq_length": 256} if trainer in DECODERS else {}), **own, **more,
    }  # fmt: skip


def reranked(paths: dict[str, str], output: Path) -> dict[str, object]:
    """Flags of an evaluation of five questions."""
    asked = {"document_path": paths["DOCUMENTS"], "eval_data_path": f"{paths['ROOT']}/test.jsonl", "output_dir": output}
    return asked | {"embedding_model": paths["ENCODER"], "reranker": paths["RERANKER"], "dtype": "float32"}


@pytest.fixture(scope="module")
def two(paths: dict[str, str]) -> Path:
    """Every trainer in every way, by two processes; the folder of their outputs."""
    root = Path(paths["ROOT"]) / "two"
    jobs = [
        (TRAINERS[trainer][0], flags(trainer, 2, paths, output_dir=f"{root}/{trainer}/{fsdp}", fsdp=fsdp))
        for trainer in TRAINERS
        for fsdp in WAYS[trainer in SHARDED]
    ]
    again = flags("swr", 2, paths, output_dir=f"{root}/resumed", fsdp="full_shard", max_steps=4,
                  resume_from_checkpoint=f"{root}/swr/full_shard/checkpoint-2")  # fmt: skip
    background = flags("rpg", 2, paths, output_dir=f"{root}/background", max_steps=30, eval_strategy="no",
                       logging_steps=1, refresh_async="true", refresh_step=1)  # fmt: skip
    jobs += [("train_swr", again), ("train_rpg", background)]
    jobs += [("../tests/divided_index.py", {"output": f"{root}/divided"})]
    write_documents(root.parent / "fewer.jsonl", list(read_documents(paths["DOCUMENTS"]))[::2])
    for database in (root.parent / "fewer.jsonl", paths["DOCUMENTS"]):
        index = {"document_path": database, "index_path": f"{root}/index", "update": "true", "dtype": "float32"}
        jobs += [("build_index", {"embedding_model": paths["ENCODER"]} | index)]
    jobs += [("evaluate_retriever", reranked(paths, root / "reranked"))]
    served = {"embedding_model_name_or_path": "bm25", "document_path": paths["DOCUMENTS"], "gen_gpt4eval": "true"}
    served |= {"eval_data_path": f"{paths['ROOT']}/test.jsonl", "judge_model": "tiny", "output_dir": f"{root}/served"}
    command = [*TORCHRUN, str(HERE / "run_several.py"), str(root.parent / "jobs.json")]
    environment = {**os.environ, "RQA_CACHE": str(root / "cache")}
    with serve() as server:
        server.say = lambda messages: '{"verdict": "correct"}' if messages[0]["role"] == "system" else "So."
        served |= {"qa_model_name_or_path": f"openai::{server.url}", "judge_base_url": server.url}
        (root.parent / "jobs.json").write_text(json.dumps([*jobs, ("evaluate_rqa", served)], default=str))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    (root / "served/asked.json").write_text(json.dumps(server.of("chat/completions")))
    return root


def test_two_processes_divide_an_index_and_find_what_one_finds(
    two: Path, paths: dict[str, str], tmp_path: Path
) -> None:
    """Ids and scores, equals too; and what they save is the whole."""
    search_all(tmp_path)
    ours, theirs = (np.load(each / "found.npz") for each in (tmp_path, two / "divided"))
    for name in ours.files:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for factory in FACTORIES:
        kept = [faiss.read_index(str(each / factory / "index.faiss")) for each in (tmp_path, two / "divided")]
        assert kept[0].ntotal == kept[1].ntotal == 2000
    kept = [np.sort(np.load(each / "Flat/passages.npy")) for each in (tmp_path, two / "divided")]
    np.testing.assert_array_equal(*kept)
    retriever = Retriever(load_encoder(paths["ENCODER"]), read_documents(paths["DOCUMENTS"]))
    stamp, found = retriever.stamp(), []
    for path in (None, two / "index"):  # which two processes built of half the documents, and then updated
        found.append(retriever.open(path).retrieve(["copper", "amber", "Who founded it?"], 10))
    assert retriever.index.stamp == stamp
    assert retriever.index.version != stamp
    np.testing.assert_array_equal(found[0].ids, found[1].ids)
    np.testing.assert_allclose(found[0].scores, found[1].scores, atol=1e-6)


def test_two_processes_rank_anew_as_one_does(
    two: Path, paths: dict[str, str], run_executable: Run, tmp_path: Path
) -> None:
    assert run_executable("evaluate_retriever", reranked(paths, tmp_path)) == 0
    one, both = ([line.split() for line in (each / "run.trec").open()] for each in (tmp_path, two / "reranked"))
    assert [line[:4] for line in one] == [line[:4] for line in both]  # question, document and rank
    assert [float(line[4]) for line in one] == pytest.approx([float(line[4]) for line in both], abs=1e-4)


def weights(path: Path) -> dict[str, Tensor]:
    """Those of the model or of its adapters, and of modules in folders of their own."""
    adapters = path / "adapter_model.safetensors"
    if adapters.exists():
        return load_file(adapters)
    return {
        f"{file.parent.relative_to(path)}/{name}": weight
        for file in path.rglob("model.safetensors")
        for name, weight in load_file(file).items()
    }


def largest_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Of any weight; of adapters only those count that begin at zero."""
    old = {name: before.get(name, torch.zeros(())) for name in after if "lora_A" not in name and "/" not in name[2:]}
    return max(float((after[name] - weight).abs().max()) for name, weight in old.items())


def losses(path: Path) -> dict[int, float]:
    """The mean loss since the line before, by step."""
    log = json.loads((path / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def score(path: Path) -> dict[str, float]:
    return {name: value for name, value in scores(path).items() if not re.search("second|latency|per_batch", name)}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_reach_the_weights_and_scores_of_one(
    trainer: str, two: Path, paths: dict[str, str], run_executable: Callable[..., int]
) -> None:
    one = Path(paths["ROOT"]) / "one" / trainer
    assert run_executable(TRAINERS[trainer][0], flags(trainer, 1, paths, output_dir=one)) == 0
    before = weights(Path(str(flags(trainer, 1, paths)["model_name_or_path"])))
    expected = weights(one / "checkpoint-3")
    change = largest_change(before, expected)
    assert change > 1e-4
    for way in WAYS[trainer in SHARDED]:
        found = weights(two / trainer / way / "checkpoint-3")
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert found[name].dtype == weight.dtype
            assert (found[name] - weight).abs().max() < 1e-3 * change, (way, name)
        ours, theirs = score(two / trainer / way), score(one)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # Two passages may be as near to a question as float32 can tell: one of five may be ranked the other way.
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=0.2 if "retr/" in name else None), (way, name)


def test_an_index_made_in_the_background_is_swapped_at_the_same_step(two: Path) -> None:
    staleness = history(two / "background", "index_staleness")
    assert all(value == int(value) for value in staleness)  # the mean over processes: whole if they agree
    assert staleness[0] == 0
    assert 1 <= max(staleness) < 29


def test_a_server_is_asked_once_by_two_processes_as_reader_and_as_judge(two: Path) -> None:
    rows = [json.loads(line) for line in (two / "served/test-predictions.jsonl").open()]
    assert len(rows) == 5
    assert {row["generated_answer"] for row in rows} == {"So."}
    assert score(two / "served")["test_gen/gpt4eval"] == 1
    asked = [json.dumps(body["messages"]) for body in json.loads((two / "served/asked.json").read_text())]
    assert len(asked) == len(set(asked)) == 2 * len(rows)


def test_a_sharded_run_resumes_sharded_and_on_one_process(
    two: Path, paths: dict[str, str], run_executable: Callable[..., int], tmp_path: Path
) -> None:
    whole = flags("swr", 1, paths, output_dir=tmp_path / "whole", max_steps=4)
    assert run_executable("train_swr", {**whole, "logging_steps": 1}) == 0
    expected = weights(tmp_path / "whole" / "checkpoint-4")
    alone = tmp_path / "alone"
    shutil.copytree(two / "swr/full_shard/checkpoint-2", alone / "checkpoint-2")
    resumed = {**whole, "output_dir": alone, "resume_from_checkpoint": "true"}
    assert run_executable("train_swr", resumed) == 0
    before = weights(Path(paths["LM"]))
    change = largest_change(before, expected)
    for path in (two / "resumed", alone):
        found = weights(path / "checkpoint-4")
        assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-3 * change, path
        ours, theirs = ({step: losses(run)[step] for step in (3, 4)} for run in (path, tmp_path / "whole"))
        assert ours == pytest.approx(theirs, rel=1e-3)  # a resumed run's first line is of its own steps
    state = torch.load(alone / "checkpoint-4" / "training_state.pt", weights_only=True)["optimization"]["optimizer"]
    shapes = {name.removeprefix("model."): values["exp_avg"].shape for name, values in state.items()}
    assert shapes == {name.removeprefix("./"): weight.shape for name, weight in expected.items()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("killed", [True, False], ids=["one process is killed", "torchrun is asked to stop"])
def test_all_processes_end_within_a_minute_with_a_message_and_a_good_checkpoint(
    killed: bool, trainer_flags: Flags, tmp_path: Path
) -> None:
    """A run that would go on for days; one process alone: test_loop.py and test_rounds.py."""
    flags = trainer_flags("train_sft", eval_file=None, test_file=None, max_steps=10_000_000, save_steps=20)
    line = [*TORCHRUN, str(BIN / "train_sft"), *as_words(flags)]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_checkpoint(tmp_path / "out")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            workers = [int(child) for child in children if b"train_sft" in Path(f"/proc/{child}/cmdline").read_bytes()]
            os.kill(workers[0] if killed else process.pid, signal.SIGKILL if killed else signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    newest = checkpoints(tmp_path / "out")[-1]
    assert damage(newest) is None
    if killed:
        assert "error: another process of this run has ended" in errors
        assert "Signal 9 (SIGKILL)" in errors
    else:
        assert f"interrupted after step {newest.name.removeprefix('checkpoint-')};" in errors
