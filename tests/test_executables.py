"""The executables as a user runs them: what they accept, refuse, say of themselves, and leave behind."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trainers import BIN, EXECUTABLES, Flags, Train, calls, flags_of, history, parsed, scores, written
from transformers import AutoModelForCausalLM, AutoTokenizer

from rqa.documents import read_documents
from rqa.models.encoder import load_encoder
from rqa.models.encoder_decoder import FiDPrompter
from rqa.prompts import Prompter
from rqa.retrieval.retriever import Retriever
from rqa.runtime.cli import as_words
from rqa.runtime.errors import UserError
from rqa.runtime.flags import aliases, parse

README = (BIN.parent / "README.md").read_text(encoding="utf-8")


def test_swr_from_a_json_file_leaves_all_that_the_architecture_promises_and_resumes_to_the_very_same_model(
    trainer_flags: Flags, run_line: Callable[..., int], tmp_path: Path
) -> None:
    flags = trainer_flags(
        "train_swr", eval_steps=2, save_steps=2, write_predictions=True, embedding_max_num_to_retrieve=2,
        gold_position="random", drop_gold_prob=0.3, gradient_accumulation_steps=2, gradient_checkpointing=True,
        retriever="hybrid", recall_at=[1, 2], evaluation_strategy="steps", learning_rate=1e-2,
        full_dataset_index_path=tmp_path / "index",
    )  # fmt: skip

    def run(output: Path, **more: object) -> None:
        (tmp_path / "flags.json").write_text(json.dumps(flags | {"output_dir": output} | more, default=str))
        assert run_line("train_swr", tmp_path / "flags.json") == 0

    output, half = tmp_path / "out", tmp_path / "half"
    run(output)
    for name in ("all_args.json", "train.log", "trainer_state.json", "checkpoint-2", "checkpoint-4", "score.json",
                 "score_details.json", "report.html", "test-predictions.jsonl", "step-2-eval-predictions.jsonl",
                 "model.safetensors", "../index/index.faiss"):  # fmt: skip
        assert (output / name).exists(), name
    arguments = written(output, "all_args.json")
    assert (arguments["metric_for_best_model"], arguments["recall_at"]) == ("loss", [1, 2])
    log = (output / "train.log").read_text()
    assert "chosen by 4 questions" in log  # those of --eval_file decide the fusion's weight
    assert "4 questions choose the best model, but by chance" in log
    entries = written(output, "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [2, 4]
    found, metrics = scores(output), "retr/recall@2 retr/document_recall/recall2 gen/rougeL gen/bleu gen/f1 loss"
    assert {f"test_{name}" for name in [*metrics.split(), "gen/exact_match"]} <= set(found)
    assert found["test_retr/recall@2"] >= 0.5  # random weights alone: less
    rows = [json.loads(line) for line in (output / "test-predictions.jsonl").open()]
    assert [len(row["retrieved_docs"]) for row in rows] == [2] * 4
    AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)

    shutil.copytree(output / "checkpoint-2", half / "checkpoint-2")
    run(half, resume_from_checkpoint=True)
    assert (half / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    quality = [name for name in found if "second" not in name]
    assert [scores(half)[name] for name in quality] == [found[name] for name in quality]


@pytest.mark.parametrize(("name", "prompter"), [("train_swr", Prompter), ("train_fid", FiDPrompter)])
def test_a_reader_trains_on_passages_of_the_whole_database_and_is_evaluated_without_gold(
    name: str, prompter: type, train: Train, monkeypatch: pytest.MonkeyPatch, files: dict[str, Path], encoder_path: str
) -> None:
    shown = calls(monkeypatch, prompter, "encode")
    output = train(name, embedding_max_num_to_retrieve=3, max_steps=1, eval_strategy="no")
    training = [(example, [passage.key for passage in passages]) for example, passages, _ in shown[:16]]
    gold_of_split = {document.key for example, _ in training for document in example.gold_docs}
    assert {key for _, keys in training for key in keys} - gold_of_split
    assert len({keys.index(example.gold_docs[0].key) for example, keys in training}) > 1  # it is anywhere
    assert all(example.gold_docs[0].key in keys and len({*keys}) == len(keys) in (3, 4) for example, keys in training)
    _, *tested = [(given[0].question, given[1]) for given in shown if len(given) == 2]  # the first warms up
    rows = [json.loads(line) for line in (output / "test-predictions.jsonl").open()]
    found = [[row["page_content"] for row in line["retrieved_docs"]] for line in rows]
    assert [[passage.page_content for passage in passages] for _, passages in tested] == found
    retriever = Retriever(load_encoder(encoder_path), read_documents(files["full_dataset_file_path"])).open()
    expected = retriever.documents_of(retriever.retrieve([question for question, _ in tested], 3))
    assert [passages for _, passages in tested] == expected


def test_training_lowers_the_loss_and_the_saved_model_is_the_trained_one(
    train: Train, evaluate: Callable[..., dict[str, float]]
) -> None:
    output = train("train_swr", embedding_model="bm25", max_steps=30, learning_rate=1e-2, eval_steps=30,
                   save_strategy="no", metric_for_best_model="eval_loss")  # fmt: skip
    assert written(output, "all_args.json")["load_best_model_at_end"]  # a loss may choose, by either name
    losses = history(output, "loss")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert history(output, "eval_loss")[-1] < 0.7 * losses[0]
    first, second = scores(output), evaluate(output, embedding_model="bm25", max_new_tokens=8, max_seq_length=256)
    for name in ("test_gen/rougeL", "test_gen/f1", "test_retr/recall@1"):
        assert first[name] == second[name]
    assert first["test_gen/f1"] > 0
    assert first["test_retr/recall@10"] >= 0.5


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_alike(train: Train, tmp_path: Path) -> None:
    flags = {"max_steps": 2, "test_file": None}
    plain = train("train_swr", **flags)
    compiled = train("train_swr", **flags, torch_compile="true", output_dir=tmp_path / "compiled")
    for name in ("loss", "eval_loss", "eval_gen/f1"):
        assert history(compiled, name) == pytest.approx(history(plain, name), rel=1e-4)


def test_sft_is_evaluated_with_and_without_a_retriever_and_a_new_run_leaves_none_of_the_old_scores(
    train: Train, encoder_path: str
) -> None:
    output = train("train_sft", eval_embedding_model=encoder_path, max_steps=1)
    assert "test_gen/rougeL" in scores(output)
    assert (output / "test-predictions.jsonl").exists()
    again = {"max_steps": 1, "overwrite_output_dir": "true"}
    train("train_sft", **again, chat_format="template")
    assert list(scores(output)) == ["test_loss"]
    train("train_sft", **again, eval_file=None, test_file=None)
    assert not (output / "score.json").exists()
    assert not (output / "test-predictions.jsonl").exists()
    assert len((output / "log.jsonl").read_text().splitlines()) == 1
    assert "Training" in (output / "report.html").read_text()


REFUSED = {  # by the parser
    "train_swr --learning_rat 1": "--learning_rat: unknown flag; did you mean --learning_rate?",
    "train_swr --learning_rate fast": "--learning_rate: invalid float value: 'fast'; see ",
    "train_swr --learning_rate nan": "--learning_rate nan: must be at least 0",
    "train_swr --eval_strategy often": "--eval_strategy: invalid choice: 'often'",
    "train_swr 7": "7: does not belong to a flag",
    "train_swr --per_device_train_batch_size 0": "--per_device_train_batch_size 0: must be at least 1",
    "train_swr --use_flash_attention true": "add --bf16 true",
    "train_swr --fp16 true --fsdp full_shard": "--fp16 true: is not supported with --fsdp",
    "train_swr --max_steps -7": "--max_steps -7: must be at least 1, or -1 to use num_train_epochs",
    "train_swr --num_train_epochs 0": "--num_train_epochs: must be positive",
    "train_swr --num_train_epochs nan": "--num_train_epochs nan: must be a finite number",
    "train_swr --save_total_limit 0": "--save_total_limit 0: must be at least 1",
    "train_swr --warmup_ratio 1.5": "--warmup_ratio 1.5: must be at least 0 and at most 1",
    "train_swr --adam_beta1 1": "--adam_beta1 1.0: must be at least 0 and less than 1",
    "train_swr --optim adamw_8bit": "--optim adamw_8bit: needs unsharded bf16 weights; add --bf16 true",
    "train_swr --num_beams 0": "--num_beams 0: must be at least 1",
    "train_swr --temperature 0": "--temperature 0.0: must be above 0",
    "train_swr --top_p 1.5": "--top_p 1.5: must be above 0 and at most 1",
    "train_swr --generation_batch_tokens 0": "--generation_batch_tokens 0: must be at least 1",
    "train_swr --lora_r 0": "--lora_r 0: must be at least 1",
    "train_swr --lora_dropout 1": "--lora_dropout 1.0: must be at least 0 and less than 1",
    "train_swr --merge_lora_on_save true": "--merge_lora_on_save true: has no effect without --use_lora true",
    "train_swr --recall_at 4 0": "--recall_at 0: must be at least 1",
    "train_swr --drop_gold_prob 7": "--drop_gold_prob 7.0: must be at least 0 and at most 1",
    "train_ctl --temperature 0": "--temperature 0.0: must be above 0",
    "train_ctl --refresh_step x": "--refresh_step x: write a number of steps",
    "train_ctl --num_hard_negatives -1": "--num_hard_negatives -1: must be at least 0",
    "train_ctl --hard_neg_ratio -0.5": "--hard_neg_ratio -0.5: must be at least 0",
    "train_ctl --negatives_from_rank 0": "--negatives_from_rank 0: must be at least 1",
    "train_ctl --negatives_max_share 2": "--negatives_max_share 2.0: must be above 0 and at most 1",
    "train_ctl --mine_negatives true --num_hard_negatives 0": "--mine_negatives true: contradicts --num_hard_neg",
    "train_ctl --mine_negatives false --refresh_async true": "--refresh_async: has no effect without --mine_neg",
    "train_ctl --mine_negatives false --negatives_from_rank 2": "--negatives_from_rank: has no effect without",
    "train_ctl --mine_negatives true --num_hard_negatives 16 --negatives_from_rank 6":
        "--negatives_to_rank 20: leaves only 15 hard negatives per question",
    "train_ctl --max_batch_tokens 0": "--max_batch_tokens 0: must be at least 1",
    "train_ctl --truncate_dim 0": "--truncate_dim 0: must be at least 1",
    "train_ctl --query_instruction {query}?": "--query_instruction '{query}?': {query} must be at the end, once",
    "train_ctl --query_instruction i --query_prefix q": "--query_instruction: replaces the query prefix; remove",
    "train_ctl --matryoshka_dims 16 0": "--matryoshka_dims 0: must be at least 1",
    "train_ctl --matryoshka_dims 8 16 8": "--matryoshka_dims 8: is given twice; remove one",
    "train_ctl --index_path Milvus::wiki.db/all": "--index_path Milvus::wiki.db/all: not an index in Milvus",
    "train_rpg --num_docs 1": "--num_docs 1: must be at least 2",
    "train_rpg --lm_temperature 0": "--lm_temperature 0.0: must be above 0",
    "train_rpg --retrieve_temperature -1": "--retrieve_temperature -1.0: must be above 0",
    "train_rpg --kl_direction both": "--kl_direction: invalid choice: 'both'",
    "train_rpg --train_query_encoder_only true --refresh_async true": "remove --refresh_async",
    "train_rpg --lm_tokenizer T": "--lm_tokenizer: a local model has its own",
    "train_emdr --lm_model_path openai::http://h/v1": "--lm_tokenizer: EMDR2 counts answer tokens",
    "train_dca --with_score true --reader_model_path R": "--reader_model_path: give it, or --with_score true",
    "train_dca --with_score false": "--reader_model_path: give it, or --with_score true",
    "train_dca --with_score true --reader_temperature 0": "--reader_temperature 0.0: must be above 0",
    "train_dca --with_score true --n_context 1": "--n_context 1: must be at least 2",
    "train_dca --with_score true --reader_batch_size 0": "--reader_batch_size 0: must be at least 1",
    "train_dca --with_score true --max_encoder_seq_length 1": "--max_encoder_seq_length 1: must be at least 2",
    "train_fid --max_seq_length 64": "--max_seq_length: unknown flag; did you mean --max_",
    "train_fid --top_p 0.5": "--temperature and --top_p need --do_sample true",
    "train_rerank --negatives_from file --mine_negatives true": "--mine_negatives: has no effect without",
    "train_rerank --negatives_from file --negatives_max_share 0.9": "--negatives_max_share: has no effect without",
    "train_rerank --refresh_step 5": "--refresh_step: has no effect without",
    "train_rerank --lm_temperature 5": "--lm_temperature: has no effect without --teacher",
    "train_rerank --lm_tokenizer t": "--lm_tokenizer: a local model has its own",
    "train_rerank --embedding_model e": "--embedding_model: set it with --negatives_from dense or both",
    "train_rerank --negatives_from both": "--embedding_model: set it with --negatives_from dense or both",
    "train_rerank --retriever hybrid": "--retriever hybrid: --negatives_from sets another first",
    "evaluate_rqa --max_examples -7": "--max_examples -7: must be at least 0",
    "evaluate_rqa --embedding_max_num_to_retrieve -1": "--embedding_max_num_to_retrieve -1: must be at least 0",
    "evaluate_rqa --judge_max_examples -1": "--judge_max_examples -1: must be at least 0",
    "evaluate_rqa --judge_price 1": "--judge_price: takes two numbers",
    "evaluate_rqa --fusion_weight 1.5": "--fusion_weight 1.5: must be at least 0 and at most 1",
    "evaluate_rqa --retriever hybrid --fusion rrf --fusion_weight 0.5":
        "--fusion_weight: has no effect with --fusion rrf",
    "evaluate_rqa --fusion rrf": "--fusion rrf: has no effect without fusion; add --retriever hybrid",
    "evaluate_rqa --fusion_weight 0.5": "--fusion_weight 0.5: has no effect without fusion; add --retriever hybrid",
    "compare_runs --show -1": "--show -1: must be at least 0",
    "mine_negatives --retriever dense": "--embedding_model: set it with",
    "mine_negatives --num_negatives 0": "--num_negatives 0: must be at least 1",
    "mine_negatives --negatives_from_rank 9 --negatives_to_rank 8": "--negatives_to_rank 8: must be at least",
    "generate_questions --num_train_passages -1": "--num_train_passages, --num_eval_passages, --num_test",
    "generate_questions --questions_per_passage 0": "--questions_per_passage 0: must be at least 1",
    "generate_questions --round_trip_k -1": "--round_trip_k -1: must be at least 0",
    "generate_questions --max_new_tokens 0": "--max_new_tokens 0: must be at least 1",
    "generate_questions --price 1": "--price: takes two numbers",
    "convert_dataset": "give one of --from_format, --to_format and --validate true",
    "convert_dataset --from_format dpr --validate true": "give one of --from_format, --to_format and --validate true",
    "convert_dataset --from_format dpr --output_dir x": "--input_path: missing",
    "convert_dataset --from_format dpr --input_path x": "--output_dir: missing",
    "convert_dataset --to_format dpr --output_dir x": "--train_file, --eval_file, --test_file",
    "serve": "--document_path: missing",
    "serve --document_path D --embedding_model bm25 --api_key=": "--api_key: is empty",
    "serve --document_path D --embedding_model bm25 --public_url name.com": "--public_url name.com: not a URL",
    "mine_negatives --index_path milvus::w.db/all --filter x==1": "--filter: does not apply to BM25; use --retriever",
    "chunk_documents --chunk_size 0": "--chunk_size 0: must be at least 1",
    "chunk_documents --chunk_size 5 --chunk_overlap 5": "--chunk_overlap 5: must be at least 0 and less than 5",
    "train_fid --new_layers x": "--new_layers: belongs with --new_layers_learning_rate",
    "train_fid --new_layers ( --new_layers_learning_rate 1": "--new_layers (: is not a regular expression",
    "train_fid --new_layers b --new_layers_learning_rate -1": "--new_layers_learning_rate -1.0: must be at least 0",
    # What has gone, or never came, is refused with what takes its place.
    "train_swr --deepspeed ds.json": "--deepspeed: not supported; rqa shards with PyTorch's FSDP2: use --fsdp",
    "train_ctl --eval_on_start true": "--eval_on_start: was removed; a retriever is always evaluated before its first",
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_the_parser_refuses_in_one_line(line: str) -> None:
    name, *flags = shlex.split(line)
    with pytest.raises(UserError, match=re.escape(REFUSED[line])):
        parsed(name, flags)


SETTLED = ["ctl", "ctl --hard_neg_ratio 0.5", "ctl --mine_negatives false", "dca --with_score true", "emdr", "fid",
           "rerank --negatives_from both --embedding_model E", "rpg", "sft", "swr"]  # fmt: skip


@pytest.mark.parametrize("line", SETTLED)
def test_the_flags_that_a_run_saves_start_the_same_run(line: str, tmp_path: Path) -> None:
    name, *words = f"train_{line}".split()
    saved = parsed(name, words).to_json()
    (tmp_path / "all_args.json").write_text(json.dumps(saved))
    assert parse(*flags_of(name), [f"{tmp_path}/all_args.json"]).to_json() == saved


@pytest.mark.parametrize(
    "line",
    ["mine_negatives --document_path d.jsonl --output_path link",
     "chunk_documents --document_path a d.jsonl --output_path d.jsonl",
     "convert_dataset --to_format dpr --train_file d.jsonl --output_dir .",
     "convert_dataset --to_format beir --train_file /t.jsonl --document_path d.jsonl --output_dir new/..",
     "train_ctl --model_name_or_path . --output_dir ../m/",
     "train_swr --reranker . --output_dir ../m/",
     "train_ctl --index_path index-5 --output_dir .",
     "train_rpg --teacher reranker::. --output_dir ../m/",
     "train_fid --model_name_or_path bert::. --output_dir .",
     "chunk_documents --document_path d.jsonl --output_path new/../d.jsonl",
     "mine_negatives --document_path new/../d.jsonl --output_path d.jsonl",
     "generate_questions --prompt_template train_w_q.jsonl --output_dir new/..",
     *(f"{name} --output_dir new/.. --{read}"
       for name in ("evaluate_retriever", "evaluate_rqa", "train_ctl", "train_sft")
       for read in ("document_path score.json", "eval_file test-predictions.jsonl", "test_file d.jsonl"))],
)  # fmt: skip
def test_no_output_is_one_of_the_inputs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("index-5", "index-ctl"):
        (tmp_path / "m" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "m")
    Path("d.jsonl").touch()
    Path("link").symlink_to("d.jsonl")
    Path("report.html").symlink_to("d.jsonl")
    for read in ("score.json", "test-predictions.jsonl", "train_w_q.jsonl"):
        Path(read).touch()
    name, *flags = line.split()
    with pytest.raises(UserError, match=r"would overwrite|holds the input d"):
        parsed(name, flags)
    parsed("train_ctl", ["--index_path", "index-ctl", "--output_dir", "."])  # which no run deletes


def _lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows)


GOLD, ROW = [{"page_content": "a"}], {"question": "a", "gold_answer": "b"}
NOWHERE = "model /nowhere: cannot be loaded: no such directory"


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("swr", {"train_file": "/nowhere/train.jsonl"}, "/nowhere/train.jsonl: no such file"),
        ("swr", {"full_dataset_file_path": "/nowhere/documents.pkl"}, "/nowhere/documents.pkl: no such file"),
        ("swr", {"model_name_or_path": "/nowhere"}, NOWHERE),
        ("swr", {"embedding_model": "/nowhere"}, NOWHERE),
        ("swr", {"resume_from_checkpoint": "/nowhere/checkpoint-1"}, "--resume_from_checkpoint /nowhere/checkpoint-1"),
        ("swr", {"use_flash_attention": "true", "bf16": "true"}, "flash-attn is not installed"),
        ("swr", {"max_seq_length": 8}, "--max_seq_length: no example fits; raise it"),
        ("sft", {"reranker": "/nowhere"}, "--reranker: needs an encoder that finds passages"),
        ("swr", {"index_factory": "Flatt"}, "--index_factory Flatt"),
        ("swr", {"prompt_template": "/nowhere/template.txt"}, "--prompt_template /nowhere/template.txt"),
        ("swr", {"report_to": "trackio"}, "--report_to trackio: the package is not installed"),
        ("swr", {"metric_for_best_model": "blue"}, "--metric_for_best_model blue: is not measured; choose one of"),
        ("swr", {"train_file": _lines(ROW | {"gold_docs": [{}]})}, "1: field 'gold_docs'"),
        ("swr", {"full_dataset_file_path": _lines(*GOLD, {"page_content": 1})}, "2: field 'page_content'"),
        ("swr", {"eval_file": ""}, "bad.jsonl: holds no examples"),
        ("ctl", {"train_file": _lines(ROW | {"gold_docs": GOLD}, ROW)}, "bad.jsonl:2: field 'gold_docs' is empty"),
        ("ctl", {"train_query_encoder_only": "true", "use_lora": "true"}, "--use_lora true: a query encoder"),
        ("rpg", {"train_file": _lines(ROW, {"question": "a"})}, "bad.jsonl:2: field 'gold_answer' must be a string"),
        ("rpg", {"lm_model_path": "/nowhere"}, NOWHERE),
        ("rpg", {"refresh_async": "true", "fsdp": "full_shard"}, "--fsdp: --refresh_async true needs"),
        ("rpg", {"train_query_encoder_only": "true", "fsdp": "full_shard"}, "--fsdp: a frozen passage encoder needs"),
        ("dca", {"reader_model_path": "/nowhere"}, NOWHERE),
        ("dca", {"train_file": _lines(ROW | {"ctxs": GOLD}), "with_score": "true", "reader_model_path": None},
         "bad.jsonl:1: field 'ctxs' must hold documents with a 'score'"),
        ("fid", {"max_encoder_seq_length": 5}, "--max_encoder_seq_length or --max_decoder_seq_length: no example fits"),
        ("fid", {"model_name_or_path": "bert::/nowhere"}, NOWHERE),
        ("fid", {"fp16": "true"}, "--fp16 true: needs a CUDA device"),
        ("ctl", {"full_dataset_file_path": _lines(*GOLD)}, "bad.jsonl: has only one passage"),
        ("rerank", {"lm_model_path": "reranker::/nowhere"}, NOWHERE),
        ("rerank", {"metric_for_best_model": "loss"}, "--metric_for_best_model loss: is not measured"),
    ],
)  # fmt: skip
def test_what_an_executable_cannot_use_is_one_line_and_status_2(
    name: str, own: dict[str, Any], message: str, trainer_flags: Flags, refused: Callable[..., None], tmp_path: Path
) -> None:
    """Files are given by their text."""
    for flag in own.keys() & {"train_file", "eval_file", "full_dataset_file_path"}:
        if not own[flag].startswith("/"):
            (tmp_path / "bad.jsonl").write_text(own[flag])
            own = own | {flag: tmp_path / "bad.jsonl"}
    refused(message, f"train_{name}", *as_words(trainer_flags(f"train_{name}", **own)))
    assert not (tmp_path / "out" / ("" if message.startswith("/nowhere") else "model.safetensors")).exists()


@pytest.mark.parametrize("name", EXECUTABLES)
def test_every_executable_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Examples first, then each flag once: its name, what it takes, a sentence; few at first sight, and all in full."""
    kind, about = flags_of(name)
    told = {}
    monkeypatch.setenv("COLUMNS", "80")
    for line in ("-h", "-h full"):
        with pytest.raises(SystemExit) as end:
            parse(kind, about, line.split())
        assert not end.value.code
        told[line] = capsys.readouterr().out
        assert told[line].index(f"bin/{name}") < told[line].index("\n  --")
        assert max(map(len, told[line].splitlines())) <= 120
        assert "None" not in told[line]
    flags = {line: re.findall(r"^  --(\w+)(.*)", text, re.MULTILINE) for line, text in told.items()}
    assert len(flags["-h"]) <= 45
    assert {shown for shown, _ in flags["-h"]} <= {shown for shown, _ in flags["-h full"]}
    assert sorted(shown for shown, _ in flags["-h full"]) == sorted(flag.name for flag in fields(kind))
    assert all(re.fullmatch(r" \S+( \.\.\.)?( {2,}.+)?", rest) for _, rest in flags["-h full"])
    assert [flag.name for flag in fields(kind) if not re.search(r"^[A-Z].*\.$", flag.metadata["help"])] == []


NAMES = {"document_path": {"full_dataset_file_path"}, "index_path": {"full_dataset_index_path"},
         "embedding_model": {"embedding_model_name_or_path", "eval_embedding_model"},
         "eval_strategy": {"evaluation_strategy"}, "chunk_size": {"grad_cache_chunk_size"}}  # fmt: skip
VALUES = {"evaluation_strategy": "epoch", "grad_cache_chunk_size": "7", "context_retriever": "bm25",
          "teacher_temperature": "7"}  # fmt: skip
NEEDED = {"train_dca": "--with_score true", "mine_negatives": "--retriever dense --embedding_model E",
          "train_rerank": "--teacher T --negatives_from both --embedding_model E",
          "convert_dataset": "--validate true --document_path D",
          "serve": "--document_path D --embedding_model E"}  # fmt: skip


@pytest.mark.parametrize("name", EXECUTABLES)
def test_one_thing_has_one_name_and_every_other_name_that_it_has_means_the_same(name: str) -> None:
    others = {flag.name: {other[2:] for other in aliases(flag)} for flag in fields(flags_of(name)[0])}
    assert not others.keys() & set().union(*NAMES.values())
    for main, names in others.items():
        assert name == "chunk_documents" or names >= NAMES.get(main, set()), main
        for alias in names:
            line = [*NEEDED.get(name, "").split(), VALUES.get(alias, "V")]
            ours, theirs = (parsed(name, [*line[:-1], f"--{flag}", line[-1]]) for flag in (main, alias))
            assert ours == theirs, alias


ALL_TRAINERS = """model_name_or_path output_dir train_file eval_file test_file full_dataset_file_path
full_dataset_index_path per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate
weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps warmup_ratio warmup_steps
lr_scheduler_type bf16 fp16 gradient_checkpointing use_flash_attention torch_compile fsdp use_lora lora_r lora_alpha
lora_dropout lora_target_modules eval_strategy evaluation_strategy eval_steps save_strategy save_steps save_total_limit
logging_steps metric_for_best_model greater_is_better load_best_model_at_end resume_from_checkpoint
overwrite_output_dir seed report_to run_group run_project write_predictions dataloader_num_workers trust_remote_code"""
DECODER = "assistant_prefix user_prefix sep_user sep_sys max_seq_length max_new_tokens gen_gpt4eval"
FOUND = "embedding_model embedding_max_num_to_retrieve"
JUDGED = "lm_model_path refresh_step text_maxlength retrieve_temperature num_docs pooling_type"
IN_SHELL_HISTORIES = {
    "train_sft": f"{DECODER} eval_embedding_model",
    "train_swr": f"{DECODER} {FOUND}",
    "train_fid": f"{FOUND} max_encoder_seq_length max_decoder_seq_length",
    "train_ctl": "pooling_type hard_neg_ratio temperature num_hard_negatives grad_cache_chunk_size",
    "train_dca": "reader_model_path reader_temperature with_score projection n_context reader_batch_size",
    "train_rpg": f"{JUDGED} lm_temperature",
    "train_emdr": JUDGED,
    "build_index": "embedding_model_name_or_path document_path index_path index_factory",
    "evaluate_retriever": "embedding_model_name_or_path document_path index_path eval_data_path output_dir",
    "evaluate_rqa": "qa_model_name_or_path embedding_model_name_or_path document_path index_path eval_data_path "
    "gen_gpt4eval output_dir",
    "chunk_documents": "document_path model_name_or_path chunk_size chunk_overlap output_path",
}


def test_every_flag_in_an_example_and_in_a_users_shell_history_is_known() -> None:
    texts = [README, *(flags_of(name)[1] for name in EXECUTABLES)]
    commands = re.findall(r"bin/([a-z_]+)\b((?:[^\n]*\\\n)*[^\n]*)", "\n".join(texts))
    assert {name for name, _ in commands} >= set(EXECUTABLES)
    named = [(name, re.findall(r"(?<!\S)--(\w+)", command.split("#")[0])) for name, command in commands]
    named += [(name, flags.split()) for name, flags in IN_SHELL_HISTORIES.items()]
    trainers = [name for name in EXECUTABLES if name.startswith("train_") and name != "train_rounds"]  # it runs them
    named += [(name, ALL_TRAINERS.split()) for name in trainers]
    for name, flags in named:
        known = {option[2:] for flag in fields(flags_of(name)[0]) for option in aliases(flag)}
        unknown = {*flags} - known - {flag.name for flag in fields(flags_of(name)[0])} - {"nproc_per_node"}
        assert not unknown, f"{name}: {unknown}"
