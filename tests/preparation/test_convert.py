"""Each layout of the field: a small sample with its quirks to our files and back."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rqa.data import Example, iterate_examples
from rqa.documents import iterate_documents
from rqa.preparation.convert import read_layout, write_layout
from rqa.preparation.layouts import LAYOUTS
from rqa.preparation.reading import read_rows
from rqa.runtime.errors import UserError

WOOL, SALT, TITLELESS = "Brask — where wool is sold", "Dunmore's “salt” 鹽", "a\u2028b without a title"


def context(identifier: str, title: str, text: str) -> dict[str, Any]:
    return {"title": title, "text": text, "score": 0, "title_score": 0, "passage_id": identifier}


def fid_context(identifier: str, title: str, text: str, score: str, has: bool) -> dict[str, Any]:
    return {"id": identifier, "title": title, "text": text, "score": score, "hasanswer": has}


def tevatron(identifier: str, title: str, text: str) -> dict[str, str]:
    return {"docid": identifier, "title": title, "text": text}


def squad(number: int, text: str, *answers: str) -> dict[str, Any]:
    found = [{"text": answer, "answer_start": text.index(answer)} for answer in answers]
    return {"id": str(number), "question": f"What {number}?", "answers": found, "is_impossible": not answers}


SAMPLES: dict[str, list[dict[str, Any]]] = {
    "dpr": [{"question": "who sells wool?", "answers": ["Brask", "the Brask"], "negative_ctxs": [],
             "positive_ctxs": [context("1", "Ünï", WOOL)],
             "hard_negative_ctxs": [context("2", "", TITLELESS), context("3", "T", SALT)]},
            {"question": "who?", "answers": ["a"], "positive_ctxs": [context("3", "T", SALT)], "negative_ctxs": [],
             "hard_negative_ctxs": []}],
    "fid": [{"id": "0", "question": "who sells wool?", "target": "Brask", "answers": ["Brask", "B."],
             "ctxs": [fid_context("1", "Ünï", WOOL, "82.5", True), fid_context("2", "", TITLELESS, "81.0", False)]}],
    "squad": [{"title": "Arlen_(town)", "paragraphs": [
                  {"context": WOOL, "qas": [squad(0, WOOL, "wool", "is sold"), squad(1, WOOL)]},
                  {"context": SALT, "qas": [squad(2, SALT, "鹽")]}]},
              {"title": "", "paragraphs": [{"context": TITLELESS, "qas": [squad(3, TITLELESS, "title")]}]}],
    "msmarco": [{"query_id": 0, "query": "who sells wool", "answers": ["Brask", "The town"], "passages": [
                    {"is_selected": 0, "url": "http://x/2", "passage_text": SALT},
                    {"is_selected": 1, "url": "http://x/1", "passage_text": WOOL},
                    {"is_selected": 0, "url": "", "passage_text": TITLELESS}]},
                {"query_id": 1, "query": "who", "answers": ["No Answer Present."], "passages": [
                    {"is_selected": 0, "url": "http://x/2", "passage_text": SALT}]}],
    "nq_open": [{"question": "who sells “wool”?", "answer": ["Brask", "鹽"]}, {"question": "who", "answer": ["a"]}],
    "triviaqa": [{"Question": "Who sells wool?", "QuestionId": "0",
                  "Answer": {"Value": "Brask", "Aliases": ["Brask", "Brásk (town)"], "Type": "FreeForm"}}],
    "tevatron": [{"query_id": "0", "query": "who sells wool", "answers": ["Brask"],
                  "positive_passages": [tevatron("1", "Ü", WOOL)], "negative_passages": [tevatron("2", "", TITLELESS)]},
                 {"query_id": "1", "query": "who", "positive_passages": [tevatron("2", "", TITLELESS)],
                  "negative_passages": []}],
    "flagembedding": [{"query": "who sells wool", "pos": [WOOL], "neg": [SALT, TITLELESS]}],
    "flashrag": [{"id": "0", "question": "who sells wool", "golden_answers": ["Brask", "B."], "metadata": {}}],
}  # fmt: skip
PASSAGES = {"dpr": 3, "fid": 2, "squad": 3, "msmarco": 3, "nq_open": 0, "triviaqa": 0, "tevatron": 2,
            "flagembedding": 3, "flashrag": 0}  # fmt: skip


ARRAYS = {"dpr": "", "fid": "", "squad": "data", "triviaqa": "Data"}  # where a file is one, and its field


def write_sample(folder: Path, layout: str, line_end: str = "\r\n") -> Path:
    rows, key = SAMPLES[layout], ARRAYS.get(layout)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if key is not None:
        text = json.dumps({"version": "v2.0", key: rows} if key else rows, ensure_ascii=False, indent=1)
    path = folder / ("train.json" if layout in ARRAYS else "train.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\ufeff".encode() + text.replace("\n", line_end).encode())
    return path


def ours(directory: Path) -> tuple[Path | None, dict[str, Path]]:
    documents = directory / "documents.jsonl"
    return (documents if documents.exists() else None), {p.name.split("_w_")[0]: p for p in directory.glob("*_w_*")}


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line]


def contents(path: Path | None) -> list[str]:
    return [document.page_content for document in iterate_documents(path)] if path else []


def gold(examples: list[Example]) -> list[list[str]]:
    return [[document.page_content for document in example.gold_docs] for example in examples]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_layout_survives_the_way_to_ours_and_back_and_ours_the_way_to_it(
    layout: str, tmp_path: Path, data: Path
) -> None:
    for line_end in ("\n", "\r\n"):
        path = write_sample(tmp_path / "theirs", layout, line_end)
        read_layout(layout, [path], tmp_path / "ours", no_answer="not said")
        documents, splits = ours(tmp_path / "ours")
        assert len(contents(documents)) == PASSAGES[layout]
        write_layout(layout, tmp_path / "back", documents, splits, no_answer="not said")
        text = (tmp_path / "back" / path.name).read_text(encoding="utf-8")
        back = json.loads(text) if layout in ARRAYS else json_lines(text)
        assert (back[ARRAYS[layout]] if ARRAYS.get(layout) else back) == SAMPLES[layout]
    before = list(iterate_examples(data / "train_w_qa.jsonl"))
    write_layout(layout, tmp_path / "there", data / "documents.jsonl", {"train": data / "train_w_qa.jsonl"})
    read_layout(layout, sorted((tmp_path / "there").glob("train.*")), tmp_path / "again")
    answers = LAYOUTS[layout].answers
    after = list(iterate_examples(ours(tmp_path / "again")[1]["train"], answers=answers))
    for name in ("question", "gold_answer") if answers else ("question",):
        assert [getattr(example, name) for example in after] == [getattr(example, name) for example in before]
    if PASSAGES[layout] and layout != "flagembedding":
        assert gold(after) == gold(before)


BLANK = {"title": "Brask", "text": " ", "passage_id": 1}
MARCO = SAMPLES["msmarco"][0]
COLUMNS = {name: [passage[name] for passage in MARCO["passages"]] for name in MARCO["passages"][0]}
QUIRKS: list[tuple[str, dict[str, Any], list[str], list[str], list[str]]] = [
    # layout, row; answers, gold passages and all passages of it
    ("nq_open", {"question": "q", "answer": [" ", "one", "two", "one"]}, ["one", "two"], [], []),
    ("triviaqa", {"Question": "q", "Answer": {"Value": "one", "Aliases": ["two"]}}, ["one", "two"], [], []),
    ("triviaqa", {"question": "q", "answer": {"value": "one", "aliases": ["one"]}}, ["one"], [], []),
    ("fid", {"question": "q", "target": "one", "answers": ["two", "one"]}, ["one", "two"], [], []),
    ("fid", {"question": "q", "target": "one", "ctxs": [{"text": WOOL, "has_answer": True}, {"text": SALT}]},
     ["one"], [WOOL], [WOOL, SALT]),
    ("fid", {"question": "q", "answers": ["a"], "ctxs": [
        {"id": 5, "title": "T", "text": WOOL, "score": 82.5}, {"text": SALT, "score": "-1e3"}]},
     ["a"], [], [WOOL, SALT]),
    ("msmarco", {**MARCO, "passages": COLUMNS}, ["Brask", "The town"], [WOOL], [SALT, WOOL, TITLELESS]),
    ("msmarco", {"query": "q", "answers": ["a"], "passages": {"passage_text": [" ", WOOL], "is_selected": [0, 1]}},
     ["a"], [WOOL], [WOOL]),
    ("msmarco", {"query": "q", "answers": ["No Answer Present."], "passages": []}, ["none"], [], []),
    ("squad", {"title": "T", "context": WOOL, "question": "q",
               "answers": {"text": ["  ", "wool"], "answer_start": [1, 16]}},
     ["wool"], [WOOL], [WOOL]),  # as `datasets` lays it out
    # Parquet gives null for what is not there, and Wikipedia dumps hold pages without text.
    ("dpr", {"question": "q", "answers": None, "positive_ctxs": [BLANK], "hard_negative_ctxs": None},
     ["none"], ["Brask"], ["Brask"]),
    ("dpr", {"question": "q", "answers": "a", "positive_ctxs": [{"psg_id": 5, "title": None, "text": WOOL}],
             "negative_ctxs": [{"text": SALT}]}, ["a"], [WOOL], [WOOL, SALT]),
    ("flagembedding", {"query": "q", "pos": [WOOL, ""], "neg": None}, [], [WOOL], [WOOL]),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "row", "answers", "golden", "passages"), QUIRKS)
def test_fields_by_other_names_columns_repeated_answers_blanks_and_nulls_are_read(
    layout: str, row: dict[str, Any], answers: list[str], golden: list[str], passages: list[str], tmp_path: Path
) -> None:
    (tmp_path / "dev.json").write_text(json.dumps(row))
    read_layout(layout, [tmp_path / "dev.json"], tmp_path / "ours", "none")
    documents, splits = ours(tmp_path / "ours")
    (example,) = iterate_examples(splits["dev"])
    assert [answer for answer in (example.gold_answer, *example.other_answers) if answer] == answers
    assert (gold([example]), contents(documents)) == ([golden], passages)
    if "82.5" in str(row):
        assert example.ctx_scores == (82.5, -1000.0)
        assert [document.metadata["source"] for document in example.ctxs] == ["5", ""]


def test_a_corpus_in_a_file_of_its_own(tmp_path: Path) -> None:
    rows = [{"id": "7", "contents": '"Arlen"\nIt sells copper.\nAnd tin.'}, {"id": "8", "contents": "no title"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read_layout("flashrag", [tmp_path / "corpus.jsonl", write_sample(tmp_path / "q", "flashrag")], tmp_path / "ours")
    documents = [(d.metadata["title"], d.page_content) for d in iterate_documents(tmp_path / "ours/documents.jsonl")]
    assert documents == [("Arlen", "It sells copper.\nAnd tin."), ("", "no title")]
    write_layout("flashrag", tmp_path / "back", tmp_path / "ours/documents.jsonl", {})
    back = [json.loads(line) for line in (tmp_path / "back/corpus.jsonl").open(encoding="utf-8")]
    assert back == [rows[0], {"id": "8", "contents": '""\nno title'}]


def write_beir_sample(folder: Path, packed: bool = False) -> Path:
    (folder / "qrels").mkdir(parents=True)
    corpus = (("d1", "Ünï", WOOL), ("d2", "", SALT), ("d3", "", TITLELESS))
    passages = [{"_id": name, "title": title, "text": text, "metadata": {}} for name, title, text in corpus]
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in passages).encode()
    (folder / ("corpus.jsonl.gz" if packed else "corpus.jsonl")).write_bytes(gzip.compress(rows) if packed else rows)
    queries = [{"_id": f"test-{n}", "text": text, "metadata": {}} for n, text in enumerate(("who sells wool?", "who?"))]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    judged = ("query-id\tcorpus-id\tscore", "test-0\td1\t1", "test-0\td3\t2", "test-0\td2\t0", "test-1\td2\t1\r\n")
    (folder / "qrels/test.tsv").write_bytes("\r\n".join(judged).encode())
    return folder


def test_beir_survives_the_way_to_ours_and_back(tmp_path: Path) -> None:
    plain = write_beir_sample(tmp_path / "plain")
    read_layout("beir", [plain], tmp_path / "unpacked")
    read_layout("beir", [write_beir_sample(tmp_path / "theirs", packed=True)], tmp_path / "ours")
    for path in (tmp_path / "ours").iterdir():
        assert path.read_bytes() == (tmp_path / "unpacked" / path.name).read_bytes()
    documents, splits = ours(tmp_path / "ours")
    assert gold(list(iterate_examples(splits["test"]))) == [[WOOL, TITLELESS], [SALT]]
    counts = write_layout("beir", tmp_path / "back", documents, splits)
    assert counts == {"corpus.jsonl": 3, "queries.jsonl": 2, "qrels/test.tsv": 3}
    for name in ("corpus.jsonl", "queries.jsonl"):
        back, before = (json_lines((path / name).read_text(encoding="utf-8")) for path in (tmp_path / "back", plain))
        assert back == before
    lines = (tmp_path / "back/qrels/test.tsv").read_text().splitlines()
    assert lines == ["query-id\tcorpus-id\tscore", "test-0\td1\t1", "test-0\td3\t2", "test-1\td2\t1"]


def test_judgements_that_dangle_are_left_out_and_counted_and_grades_are_gains(tmp_path: Path) -> None:
    folder = write_beir_sample(tmp_path / "beir")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "blank", "title": "", "text": " "}\n')
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "null", "text": null}\n')
    judged = ["test-0\td1\t2.0", "test-0\tabsent\t1", "test-0\tblank\t1", "test-0\td2\t0.0", "test-1\tblank\t1",
              "test-9\td1\t1", "null\td1\t1"]  # fmt: skip
    judged += [f"test-0\td3\t{score}" for score in ("inf", "1e400", "nan", "9" * 500, "21_000", "")]
    (folder / "qrels/test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    assert read_layout("beir", [folder], tmp_path / "ours") == {
        "passages": 3, "blank passages left out": 1, "questions of test": 1,
        "judgements of test without a finite score or a passage with text left out": 4,
        "judged questions of test left out": 3,
    }  # fmt: skip
    (example,) = iterate_examples(tmp_path / "ours/test_w_q.jsonl")
    assert [(document.page_content, document.gain) for document in example.gold_docs] == [(WOOL, 2)]


def test_passages_of_one_source_get_names_of_their_own(tmp_path: Path) -> None:
    named = (("one", "guide"), ("two", "guide"), ("three", "guide#1"))
    rows = [{"page_content": text, "metadata": {"source": source}} for text, source in named]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "q", "gold_docs": [rows[1]]}))
    write_layout("beir", tmp_path / "b", tmp_path / "documents.jsonl", {"test": tmp_path / "test.jsonl"})
    names = [json.loads(line)["_id"] for line in (tmp_path / "b/corpus.jsonl").open()]
    assert names == ["guide", "guide#1", "guide#1#2"]
    assert (tmp_path / "b/qrels/test.tsv").read_text().splitlines()[1] == "test-0\tguide#1\t1"


def test_marcos_passage_ranking_is_read(tmp_path: Path) -> None:
    (tmp_path / "collection.tsv").write_text(f"0\t{WOOL}\r\n1\t{SALT}\r\n", encoding="utf-8")
    (tmp_path / "queries.dev.tsv").write_text("9\twho sells wool\n10\tnobody judged\n")
    (tmp_path / "qrels.dev.tsv").write_text("9\t0\t0\t1\n")
    assert read_layout("msmarco_passages", [tmp_path], tmp_path) == {"passages": 2, "questions of dev": 1}
    (example,) = iterate_examples(tmp_path / "dev_w_q.jsonl")
    assert (example.question, example.gold_docs[0].page_content) == ("who sells wool", WOOL)


VALUES = st.text(max_size=30) | st.lists(st.integers(), max_size=3)
ROWS = st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, kind=st.sampled_from(["lines", "array", "inside", "indented"]), packed=st.booleans())
def test_rows_are_read_as_they_were_written(
    rows: list[dict[str, Any]], kind: str, packed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = {
        "lines": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "array": json.dumps(rows),
        "inside": '{"version": 2.0, "data": ' + json.dumps(rows, ensure_ascii=False) + "}",
        "indented": json.dumps(rows, indent=2),
    }[kind].encode("utf-8", "surrogatepass")
    path = tmp_path_factory.mktemp("rows") / ("rows.json.gz" if packed else "rows.json")
    path.write_bytes(gzip.compress(text) if packed else text)
    assert [row.values for row in read_rows(path, "data" if kind == "inside" else "")] == rows


def test_a_row_is_read_before_the_next_one_is_there(tmp_path: Path) -> None:
    for name, text in (("a.json", '[{"question": 1}, {"question'), ("a.jsonl", '{"question": 1}\n{"question')):
        (tmp_path / name).write_text(text)
        assert next(read_rows(tmp_path / name)).text("question") == "1"


@pytest.mark.parametrize(
    ("layout", "name", "text", "message"),
    [
        ("dpr", "a.json", '[{"question": "q"},\n\n{"answers": []}]', "a.json: item 2: field 'question' is missing"),
        ("dpr", "a.json", '[{"question": "q", "positive_ctxs": [3]}]', "item 1: field 'positive_ctxs' must be a list"),
        ("dpr", "a.json", '[\n{"question": "Ã©"},\n{"question": }]', "item 2: not valid JSON (Expecting value)"),
        ("dpr", "a.json", '[{"question": "q"},' + "[" * 100_000, "a.json: item 2: not valid JSON ("),
        ("dpr", "a.json", '[{"question": "q"}\n {"question": "q"}]', "item 2: not valid JSON (Expecting value)"),
        ("dpr", "a.json", "[3]", "a.json: item 1: not valid JSON (expected a JSON object, found int)"),
        ("dpr", "a.json", '[{"question": "\xff"}]', "a.json: not UTF-8 text"),
        ("fid", "a.json", '[{"question": "q", "ctxs": [{"text": "t", "score": "x"}]}]',
         "a.json: item 1: ctxs[0]: field 'score' must be a number"),
        ("fid", "a.json", '[{"question": "q", "ctxs": [{"text": "t", "score": "1e400"}]}]', "'score' must be a number"),
        ("nq_open", "a.jsonl", '{"question": "q", "answer": [1]}', "a.jsonl:1: field 'answer' must be a list of str"),
        ("nq_open", "a.jsonl", "\n", "a.jsonl: holds no rows"),
        ("nq_open", "a.jsonl", '{"question": "q"}', "a.jsonl: holds no rows to write; 1 unanswerable questions left"),
        ("nq_open", "a.jsonl.gz", "no", "a.jsonl.gz: not a complete gzip file"),
        ("tevatron", "a.jsonl", '{"docid": 1, "text": ""}', "holds no rows to write; 1 blank passages left out"),
        ("msmarco", "a.jsonl", '{"query": "q", "passages": {"a": [1], "b": 2}}', "a.jsonl:1: field 'passages' must be"),
        ("triviaqa", "a.json", '{"Data": [{"Question": "q"}]}', "a.json: item 1: field 'Answer' must be an object"),
        ("squad", "a.json", '{"data": [{"paragraphs": [{}]}]}', "item 1: paragraphs[0]: field 'context' is missing"),
        ("beir", "qrels/test.tsv", "a\tb\tc\ntest-0\td1\tx", "test.tsv:2: score 'x' is not a number"),
        ("beir", "qrels/test.tsv", "test-0", "test.tsv:1: expected query, passage and score, found 1 columns"),
        ("beir", "qrels/test.tsv", "test-0\td1\t0", "test.tsv: has no score above 0 for a passage"),
        ("beir", "queries.jsonl", '{"_id": "test-0", "text": null}', "has no score above 0 for a passage with text"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named_by_its_place_and_nothing_is_written(
    layout: str, name: str, text: str, message: str, tmp_path: Path
) -> None:
    folder = write_beir_sample(tmp_path / "beir") if layout == "beir" else tmp_path
    (folder / name).write_bytes(text.encode("latin-1"))
    path = folder if layout == "beir" else folder / name
    with pytest.raises(UserError) as error:
        read_layout(layout, [path], tmp_path / "out")
    assert message in str(error.value)
    assert not list((tmp_path / "out").glob("*"))


def test_flags_that_say_too_little_are_refused(refused: Callable[..., None]) -> None:
    for line, message in {
        "--to_format beir --output_dir x --train_file /nowhere": "--document_path: missing; beir needs",
        "--from_format dpr --input_path /a/x.json /b/x.json --output_dir x": "two files are called x",
    }.items():
        refused(message, "convert_dataset", *line.split())


def test_validation_counts_what_was_put_there(
    run_line: Callable[..., int], tmp_path: Path, encoder_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, three = ({"page_content": f"passage number {n}", "metadata": {"source": str(n)}} for n in range(3))
    repeated = {"page_content": "Passage  number 0", "metadata": {"source": "copy"}}
    absent = {"page_content": "elsewhere", "metadata": {}}
    asked = (("Who is it?", [one], "one two three"), ("who  is it?", [one, two], None), ("What?", [absent], None))
    train = [{"question": question, "gold_docs": docs, "gold_answer": answer} for question, docs, answer in asked]
    test = [{"question": "WHAT?", "gold_docs": [one]}]
    files = {"document_path": [one, two, three, repeated], "train_file": train, "test_file": test}
    line = ["convert_dataset", "--validate", "true"]
    for flag, rows in files.items():
        (tmp_path / flag).write_text("\n".join(map(json.dumps, rows)))
        line += [f"--{flag}", tmp_path / flag]
    assert run_line(*line) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"{tmp_path}/document_path: 4 passages, 1 with the words of an earlier one",
        "train: 3 questions, 1 with an answer, 1 asked before",
        "train: 3 questions with a gold passage, 1 of them with several",
        "train: 3 of 4 gold passages (75.0%) are in the database",
    ]
    assert "train and test: 1 questions and 1 gold passages are in both" in lines
    assert ["answers", "of", "train", "3", "3", "3", "3"] in [line.split() for line in lines]
    assert run_line(*line, "--model_name_or_path", encoder_path) == 0
    assert "tokens " in capsys.readouterr().out


def test_a_conversion_ends_with_the_rows_of_each_file_and_refuses_gold_that_the_database_lacks(
    run_line: Callable[..., int], refused: Callable[..., None], tmp_path: Path, data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    line = ["convert_dataset", "--train_file", data / "train_w_qa.jsonl", "--test_file", data / "test_w_qa.jsonl",
            "--output_dir", tmp_path / "dpr", "--to_format"]  # fmt: skip
    assert run_line(*line, "dpr") == 0
    assert "dpr: 16 rows of train.json, 4 rows of test.json, as dpr" in capsys.readouterr().out
    (tmp_path / "d.jsonl").write_text('{"page_content": "another"}')
    refused("train_w_qa.jsonl:1: a gold passage is not in", *line, "beir", "--document_path", tmp_path / "d.jsonl")
