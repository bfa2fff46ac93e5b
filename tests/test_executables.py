"""The executables as a user runs them: what they accept, refuse, say of themselves, and leave behind."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trainers import BIN, EXECUTABLES, flags_of, history, parsed, scores, shown_to
from transformers import AutoModelForCausalLM, AutoTokenizer

from rqa.data import read_documents
from rqa.models.encoder import load_encoder
from rqa.prompts import Prompter
from rqa.retrieval.retriever import Retriever
from rqa.runtime.errors import UserError
from rqa.runtime.flags import parse

Train = Callable[..., Path]
TrainerFlags = Callable[..., dict[str, object]]
Run = Callable[[str, dict[str, object]], int]
README = (BIN.parent / "README.md").read_text(encoding="utf-8")


def test_swr_from_a_json_file_leaves_all_that_the_architecture_promises_and_resumes_to_the_very_same_model(
    trainer_flags: TrainerFlags, run_line: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = trainer_flags(
        "train_swr", eval_steps=2, save_steps=2, write_predictions=True, embedding_max_num_to_retrieve=2,
        gold_position="random", drop_gold_prob=0.3, gradient_accumulation_steps=2, gradient_checkpointing=True,
        retriever="hybrid", fusion="weighted", recall_at=[1, 2], evaluation_strategy="steps", learning_rate=1e-2,
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
    arguments = json.loads((output / "all_args.json").read_text())
    assert (arguments["metric_for_best_model"], arguments["recall_at"]) == ("loss", [1, 2])
    log = (output / "train.log").read_text()
    assert "the best of 4 questions" in log  # those of --eval_file decide the fusion's weight
    assert "4 questions are too few to choose a model by" in log
    state = json.loads((output / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2, 4]
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


def test_swr_retrieves_from_the_whole_database_and_evaluates_without_gold_and_a_new_run_leaves_none_of_the_old_scores(
    train: Train, monkeypatch: pytest.MonkeyPatch, files: dict[str, Path], encoder_path: str
) -> None:
    shown = shown_to(monkeypatch, Prompter)
    output = train("train_swr", embedding_max_num_to_retrieve=3, max_steps=1, eval_strategy="no")
    training = [(example, [passage.key for passage in passages]) for _, example, passages in shown[:16]]
    gold_of_split = {document.key for example, _ in training for document in example.gold_docs}
    assert {key for _, keys in training for key in keys} - gold_of_split
    assert all(keys[0] == example.gold_docs[0].key and len(keys) <= 4 for example, keys in training)
    _, *tested = [(example.question, passages) for generates, example, passages in shown if generates]  # 1: warm-up
    rows = [json.loads(line) for line in (output / "test-predictions.jsonl").open()]
    found = [[row["page_content"] for row in line["retrieved_docs"]] for line in rows]
    assert [[passage.page_content for passage in passages] for _, passages in tested] == found
    retriever = Retriever(load_encoder(encoder_path), read_documents(files["full_dataset_file_path"])).open()
    expected = retriever.documents_of(retriever.retrieve([question for question, _ in tested], 3))
    assert [passages for _, passages in tested] == expected

    train("train_swr", max_steps=1, eval_file=None, test_file=None, overwrite_output_dir="true")
    assert not (output / "score.json").exists()
    assert not (output / "test-predictions.jsonl").exists()
    assert len((output / "log.jsonl").read_text().splitlines()) == 1
    assert "Training" in (output / "report.html").read_text()


def test_training_lowers_the_loss_and_the_saved_model_is_the_trained_one(
    train: Train, files: dict[str, Path], run_executable: Run, tmp_path: Path
) -> None:
    output = train("train_swr", embedding_model="bm25", max_steps=30, learning_rate=1e-2, eval_steps=30,
                   save_strategy="no")  # fmt: skip
    losses = history(output, "loss")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert history(output, "eval_loss")[-1] < 0.7 * losses[0]
    evaluation = {"qa_model_name_or_path": output, "embedding_model": "bm25", "test_file": files["test_file"],
                  "document_path": files["full_dataset_file_path"], "output_dir": tmp_path / "again",
                  "max_new_tokens": 8, "max_seq_length": 256}  # fmt: skip
    assert run_executable("evaluate_rqa", evaluation) == 0
    first, second = scores(output), scores(tmp_path / "again")
    for name in ("test_gen/rougeL", "test_gen/f1", "test_retr/recall@1"):
        assert first[name] == second[name]
    assert first["test_gen/f1"] > 0
    assert first["test_retr/recall@10"] >= 0.5


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_alike(train: Train, tmp_path: Path) -> None:
    flags = {"max_steps": 2, "eval_file": None, "test_file": None}
    losses = [
        history(train("train_swr", **flags, torch_compile=compiled, output_dir=tmp_path / compiled), "loss")
        for compiled in ("false", "true")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_train_sft_with_and_without_a_retriever_for_evaluation(train: Train, encoder_path: str, tmp_path: Path) -> None:
    assert list(scores(train("train_sft", chat_format="template", max_steps=1))) == ["test_loss"]
    output = train("train_sft", eval_embedding_model=encoder_path, max_steps=1, output_dir=tmp_path / "with")
    assert "test_gen/rougeL" in scores(output)


REFUSED = {  # by the parser
    "train_swr --learning_rat 1": "--learning_rat: unknown flag; did you mean --learning_rate?",
    "train_swr --learning_rate fast": "--learning_rate: invalid float value: 'fast'; see ",
    "train_swr --learning_rate nan": "--learning_rate nan: must be at least 0",
    "train_swr --eval_strategy often": "--eval_strategy: invalid choice: 'often'",
    "train_swr 7": "7: belongs to no flag",
    "train_swr --per_device_train_batch_size 0": "--per_device_train_batch_size 0: must be at least 1",
    "train_swr --use_flash_attention true": "add --bf16 true",
    "train_swr --fp16 true --fsdp full_shard": "--fp16 true: sharded training scales no loss",
    "train_swr --max_steps -7": "--max_steps -7: must be at least 1, or -1: num_train_epochs decides",
    "train_swr --drop_gold_prob 7": "--drop_gold_prob 7.0: must be at least 0 and at most 1",
    "train_ctl --temprature 1": "--temprature: unknown flag; did you mean --temperature?",
    "train_ctl --temperature 0": "--temperature 0.0: must be above 0",
    "train_ctl --refresh_step x": "--refresh_step x: write a number of steps",
    "train_ctl --num_hard_negatives -1": "--num_hard_negatives -1: must be at least 0",
    "train_ctl --hard_neg_ratio -0.5": "--hard_neg_ratio -0.5: must be at least 0",
    "train_ctl --negatives_from_rank 0": "--negatives_from_rank 0: must be at least 1",
    "train_ctl --negatives_max_share 2": "--negatives_max_share 2.0: must be above 0 and at most 1",
    "train_ctl --mine_negatives true": "--mine_negatives true: say how many",
    "train_ctl --refresh_async true": "--refresh_async: nothing is mined without --mine_negatives true",
    "train_ctl --negatives_from_rank 2": "--negatives_from_rank: nothing is mined without --mine_negatives true",
    "train_ctl --mine_negatives true --num_hard_negatives 16 --negatives_from_rank 6":
        "--negatives_to_rank 20: leaves 15 hard negatives a question",
    "train_rpg --num_docs 1": "--num_docs 1: must be at least 2",
    "train_rpg --lm_temperature 0": "--lm_temperature 0.0: must be above 0",
    "train_rpg --retrieve_temperature -1": "--retrieve_temperature -1.0: must be above 0",
    "train_rpg --kl_direction both": "--kl_direction: invalid choice: 'both'",
    "train_rpg --refresh_step x": "--refresh_step x: write a number of steps",
    "train_rpg --train_query_encoder_only true --refresh_async true": "leave out --refresh_async",
    "train_rpg --lm_tokenizer T": "--lm_tokenizer: a local model brings its own",
    "train_emdr --retrieve_temperature -1": "--retrieve_temperature -1.0: must be above 0",
    "train_emdr --lm_model_path openai::http://h/v1": "--lm_tokenizer: EMDR2 counts answer tokens",
    "train_dca --with_score true --reader_model_path R": "--reader_model_path: give it, or --with_score true",
    "train_dca --with_score false": "--reader_model_path: give it, or --with_score true",
    "train_dca --with_score true --reader_temperature 0": "--reader_temperature 0.0: must be above 0",
    "train_dca --with_score true --n_context 1": "--n_context 1: must be at least 2",
    "train_dca --with_score true --reader_batch_size 0": "--reader_batch_size 0: must be at least 1",
    "train_dca --with_score true --max_encoder_seq_length 1": "--max_encoder_seq_length 1: must be at least 2",
    "train_fid --max_seq_length 64": "--max_seq_length: unknown flag; did you mean --max_",
    "train_fid --top_p 0.5": "--temperature and --top_p need --do_sample true",
    "train_fid --new_layers x": "--new_layers: goes with --new_layers_learning_rate",
    # What has gone, or never came, is refused with what takes its place.
    "train_swr --deepspeed ds.json": "--deepspeed: rqa shards with PyTorch's own FSDP2; use --fsdp full_shard",
    "train_swr --load_in_4bit true": "--load_in_4bit: QLoRA needs bitsandbytes",
    "train_ctl --eval_on_start true": "--eval_on_start: has gone; a retriever is always evaluated before its first",
    "train_ctl --negatives_margin 0.1": "--negatives_margin: has gone; use --negatives_max_share 0.95",
    "train_rpg --refresh_fraction 0.5": "--refresh_fraction: has gone; --refresh_async true costs less",
    "evaluate_rqa --endpoint_timeout 9": "--endpoint_timeout: has gone; a reply may take ten minutes",
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_the_parser_refuses_in_one_line(line: str) -> None:
    name, *flags = shlex.split(line)
    with pytest.raises(UserError, match=re.escape(REFUSED[line])):
        parsed(name, flags)


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
        ("swr", {"index_factory": "Flatt"}, "--index_factory Flatt"),
        ("swr", {"prompt_template": "/nowhere/template.txt"}, "--prompt_template /nowhere/template.txt"),
        ("swr", {"report_to": "trackio"}, "--report_to trackio: the package is not installed"),
        ("swr", {"metric_for_best_model": "blue"}, "--metric_for_best_model blue: is not measured; choose one of"),
        ("swr", {"train_file": _lines(ROW | {"gold_answer": 3})}, "jsonl:1: field 'gold_answer' must be"),
        ("swr", {"train_file": _lines(ROW | {"gold_docs": [{}]})}, "1: field 'gold_docs'"),
        ("swr", {"full_dataset_file_path": _lines(*GOLD, {"page_content": 1})}, "2: field 'page_content'"),
        ("swr", {"full_dataset_file_path": "{"}, "bad.jsonl:1: not valid JSON"),
        ("swr", {"eval_file": ""}, "bad.jsonl: holds no examples"),
        ("ctl", {"train_file": _lines(ROW | {"gold_docs": GOLD}, ROW)}, "bad.jsonl:2: field 'gold_docs' is empty"),
        ("ctl", {"metric_for_best_model": "blue"}, "--metric_for_best_model blue: is not measured; choose one of"),
        ("ctl", {"train_query_encoder_only": "true", "use_lora": "true"}, "leave out --use_lora"),
        ("rpg", {"train_file": _lines(ROW, {"question": "a"})}, "bad.jsonl:2: field 'gold_answer' must be a string"),
        ("rpg", {"lm_model_path": "/nowhere"}, NOWHERE),
        ("rpg", {"refresh_async": "true", "fsdp": "full_shard"}, "--refresh_async true: needs the whole encoder"),
        ("rpg", {"train_query_encoder_only": "true", "fsdp": "full_shard"}, "--train_query_encoder_only true: needs"),
        ("dca", {"reader_model_path": "/nowhere"}, NOWHERE),
        ("dca", {"train_file": _lines(ROW | {"ctxs": GOLD}), "with_score": "true", "reader_model_path": None},
         "bad.jsonl:1: field 'ctxs' must hold documents with a 'score'"),
        ("fid", {"max_encoder_seq_length": 65}, "--max_encoder_seq_length 65: "),
        ("fid", {"max_encoder_seq_length": 5}, "--max_encoder_seq_length or --max_decoder_seq_length: no example fits"),
        ("fid", {"model_name_or_path": "bert::/nowhere"}, NOWHERE),
        ("fid", {"fp16": "true"}, "--fp16 true needs a CUDA device"),
    ],
)  # fmt: skip
def test_what_an_executable_cannot_use_is_one_line_and_status_2(
    name: str, own: dict[str, Any], message: str, trainer_flags: TrainerFlags, run_executable: Run,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    """Files are given by their text."""
    for flag in own.keys() & {"train_file", "eval_file", "full_dataset_file_path"}:
        if not own[flag].startswith("/"):
            (tmp_path / "bad.jsonl").write_text(own[flag])
            own = own | {flag: tmp_path / "bad.jsonl"}
    assert run_executable(f"train_{name}", trainer_flags(f"train_{name}", **own)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_error_shows_no_traceback_and_leaves_no_output_directory(
    trainer_flags: TrainerFlags, tmp_path: Path
) -> None:
    flags = trainer_flags("train_swr", full_dataset_file_path="/nowhere/documents.jsonl")
    line = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    done = subprocess.run([sys.executable, str(BIN / "train_swr"), *line], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: /nowhere/documents.jsonl: no such file"
    assert not (tmp_path / "out").exists()


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


NAMES = {
    "document_path": {"full_dataset_file_path"},
    "index_path": {"full_dataset_index_path"},
    "embedding_model": {"embedding_model_name_or_path", "eval_embedding_model"},
    "eval_strategy": {"evaluation_strategy"},
    "chunk_size": {"grad_cache_chunk_size"},
}
VALUES = {"evaluation_strategy": "epoch", "grad_cache_chunk_size": "7", "context_retriever": "bm25"}
NEEDED = {
    "train_dca": "--with_score true",
    "mine_negatives": "--retriever dense --embedding_model E",
    "convert_dataset": "--validate true --document_path D",
}


@pytest.mark.parametrize("name", EXECUTABLES)
def test_one_thing_has_one_name_and_every_other_name_that_it_has_means_the_same(name: str) -> None:
    others = {flag.name: {other[2:] for other in flag.metadata["aliases"]} for flag in fields(flags_of(name)[0])}
    assert not others.keys() & set().union(*NAMES.values())
    for main, aliases in others.items():
        assert name == "chunk_documents" or aliases >= NAMES.get(main, set()), main
        for alias in aliases:
            ours, theirs = (
                parsed(name, [*NEEDED.get(name, "").split(), f"--{flag}", VALUES.get(alias, "V")])
                for flag in (main, alias)
            )
            assert ours == theirs, alias


LOCALRQA = [  # what its users have in their shell history
    "train_sft --use_flash_attention true --bf16 true --per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
    "--learning_rate 5e-6 --num_train_epochs 2 --gradient_accumulation_steps 2 --model_name_or_path M "
    '--assistant_prefix "[/INST]" --user_prefix "<s>[INST]" --sep_user " " --sep_sys "</s>" --eval_embedding_model E '
    "--logging_steps 10 --eval_steps 30 --save_steps 30 --output_dir O --run_group databricks --train_file T "
    "--eval_file V --test_file W --full_dataset_file_path documents.pkl --full_dataset_index_path index/",
    "train_swr --embedding_model E --embedding_max_num_to_retrieve 3 --max_seq_length 2048 --sep_sys '<|end_of_turn|>'",
    "train_fid --bf16 true --embedding_max_num_to_retrieve 3 --max_encoder_seq_length 512 --max_decoder_seq_length 256",
    "train_ctl --pooling_type mean --per_device_eval_batch_size 128 --hard_neg_ratio 0.05 --temperature 1.2 "
    "--metric_for_best_model eval_retr/document_recall/recall4 --max_steps 100 --eval_steps 2 --save_steps 2",
    "train_dca --reader_model_path R --reader_temperature 0.1 --with_score false --projection true --n_context 50 "
    "--reader_batch_size 4 --per_device_train_batch_size 10",
    "train_rpg --full_dataset_file_path D --lm_model_path L --refresh_step 10 --text_maxlength 512 "
    "--lm_temperature 0.1 --retrieve_temperature 0.1 --num_docs 20 --pooling_type mean --dataloader_num_workers 2 "
    "--per_device_train_batch_size 4 --metric_for_best_model eval_retr/document_recall/recall4 --output_dir out/rpg",
    "build_index --embedding_model_name_or_path M --document_path D --index_path I --index_factory IVF4096,PQ48",
    "evaluate_retriever --embedding_model_name_or_path bm25 --document_path D --index_path I --eval_data_path W "
    "--output_dir O",
    "evaluate_rqa --qa_model_name_or_path openai::http://host:80/v1 --embedding_model_name_or_path M --document_path D "
    "--index_path I --eval_data_path W --gen_gpt4eval false --output_dir O",
    "chunk_documents --document_path D --model_name_or_path M --chunk_size 400 --chunk_overlap 50 --output_path P",
]


@pytest.mark.parametrize("line", LOCALRQA, ids=lambda line: line.split()[0])
def test_commands_in_a_users_shell_history_are_accepted(line: str) -> None:
    name, *flags = shlex.split(line)
    assert parsed(name, flags)


def test_every_flag_in_an_example_is_known() -> None:
    told = {name: flags_of(name)[1] for name in EXECUTABLES}
    commands = re.findall(r"bin/(\w+)((?:[^\n]*\\\n)*[^\n]*)", "\n".join([README, *told.values()]))
    assert {name for name, _ in commands} >= set(EXECUTABLES)
    for name, command in commands:
        kind, _ = flags_of(name)
        known = {f"--{flag.name}" for flag in fields(kind)} | {o for f in fields(kind) for o in f.metadata["aliases"]}
        unknown = set(re.findall(r"(?<!\S)--\w+", command.split("#")[0])) - known - {"--nproc_per_node"}
        assert not unknown, f"{name}: {unknown}"
