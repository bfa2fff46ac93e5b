"""Each layout of the field: a small sample with its quirks to our files and back."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rqa.data.convert import reading

from rqa.data import Example, iterate_documents, iterate_examples
from rqa.preparation.convert import READABLE, WRITABLE, Conversion, read_rows, write_layout
from rqa.preparation.layouts import FORMATS
from rqa.runtime.errors import UserError

Run = Callable[[str, dict[str, object]], int]


def context(identifier: str, title: str, text: str) -> dict[str, Any]:
    return {"title": title, "text": text, "score": 0, "title_score": 0, "passage_id": identifier}


def fid_context(identifier: str, title: str, text: str, score: str, has: bool) -> dict[str, Any]:
    return {"id": identifier, "title": title, "text": text, "score": score, "hasanswer": has}


def tevatron(identifier: str, title: str, text: str) -> dict[str, str]:
    return {"docid": identifier, "title": title, "text": text}


WOOL, SALT, TITLELESS = "Brask — where wool is sold", "Dunmore's “salt” 鹽", "a\u2028b without a title"
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "dpr": [
        {"question": "who sells wool?", "answers": ["Brask", "the Brask"], "positive_ctxs": [context("1", "Ünï", WOOL)],
         "negative_ctxs": [], "hard_negative_ctxs": [context("2", "", TITLELESS), context("3", "T", SALT)]},
        {"question": "who?", "answers": ["a"], "positive_ctxs": [context("3", "T", SALT)], "negative_ctxs": [],
         "hard_negative_ctxs": []},
    ],
    "fid": [
        {"id": "0", "question": "who sells wool?", "target": "Brask", "answers": ["Brask", "B."],
         "ctxs": [fid_context("1", "Ünï", WOOL, "82.5", True), fid_context("2", "", TITLELESS, "81.0", False)]},
        {"id": "1", "question": "who?", "target": "a", "answers": ["a"],
         "ctxs": [fid_context("1", "Ünï", WOOL, "3.25", False)]},
    ],
    "squad": [
        {"title": "Arlen_(town)", "paragraphs": [
            {"context": WOOL, "qas": [
                {"id": "0", "question": "What is sold?", "is_impossible": False,
                 "answers": [{"text": "wool", "answer_start": WOOL.index("wool")},
                             {"text": "is sold", "answer_start": WOOL.index("is sold")}]},
                {"id": "1", "question": "Why?", "answers": [], "is_impossible": True}]},
            {"context": SALT, "qas": [
                {"id": "2", "question": "Which?", "is_impossible": False,
                 "answers": [{"text": "鹽", "answer_start": SALT.index("鹽")}]}]}]},
        {"title": "", "paragraphs": [
            {"context": TITLELESS, "qas": [
                {"id": "3", "question": "Where?", "is_impossible": False,
                 "answers": [{"text": "title", "answer_start": TITLELESS.index("title")}]}]}]},
    ],
    "msmarco": [
        {"query_id": 0, "query": "who sells wool", "answers": ["Brask", "The town"], "passages": [
            {"is_selected": 0, "url": "http://x/2", "passage_text": SALT},
            {"is_selected": 1, "url": "http://x/1", "passage_text": WOOL},
            {"is_selected": 0, "url": "", "passage_text": TITLELESS}]},
        {"query_id": 1, "query": "who", "answers": ["No Answer Present."], "passages": [
            {"is_selected": 0, "url": "http://x/2", "passage_text": SALT}]},
    ],
    "nq_open": [{"question": "who sells “wool”?", "answer": ["Brask", "鹽"]}, {"question": "who", "answer": ["a"]}],
    "triviaqa": [
        {"Question": "Who sells wool?", "QuestionId": "0",
         "Answer": {"Value": "Brask", "Aliases": ["Brask", "Brásk (town)"], "Type": "FreeForm"}},
    ],
    "tevatron": [
        {"query_id": "0", "query": "who sells wool", "answers": ["Brask"],
         "positive_passages": [tevatron("1", "Ü", WOOL)],
         "negative_passages": [tevatron("2", "", TITLELESS)]},
        {"query_id": "1", "query": "who", "positive_passages": [tevatron("2", "", TITLELESS)], "negative_passages": []},
    ],
    "flagembedding": [{"query": "who sells wool", "pos": [WOOL], "neg": [SALT, TITLELESS]},
                      {"query": "who", "pos": [SALT], "neg": []}],
    "flashrag": [
        {"id": "0", "question": "who sells wool", "golden_answers": ["Brask", "B."], "metadata": {}},
        {"id": "1", "question": "who", "golden_answers": ["a"], "metadata": {}},
    ],
}  # fmt: skip
PASSAGES = {"dpr": 3, "fid": 2, "squad": 3, "msmarco": 3, "nq_open": 0, "triviaqa": 0, "tevatron": 2,
            "flagembedding": 3, "flashrag": 0}  # fmt: skip


def write_sample(path: Path, layout: str, line_end: str = "\r\n") -> Path:
    around = FORMATS[layout].around
    rows = [json.dumps(row, ensure_ascii=False, indent=1 if around else None) for row in SAMPLES[layout]]
    text = f"{around[0]}\n" + ",\n".join(rows) + f"\n{around[1]}" if around else "\n".join(rows) + "\n"
    path = path / ("train.json" if around else "train.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\ufeff".encode() + text.replace("\n", line_end).encode())
    return path


def ours(directory: Path) -> tuple[Path | None, dict[str, Path]]:
    documents = directory / "documents.jsonl"
    return (documents if documents.exists() else None), {p.name.split("_w_")[0]: p for p in directory.glob("*_w_*")}


@pytest.mark.parametrize("layout", sorted(SAMPLES))
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_layout_survives_the_way_to_ours_and_back(layout: str, line_end: str, tmp_path: Path) -> None:
    path = write_sample(tmp_path / "theirs", layout, line_end)
    Conversion(layout, tmp_path / "ours", no_answer="not said").run([path])
    documents, splits = ours(tmp_path / "ours")
    assert len(list(iterate_documents(documents)) if documents else []) == PASSAGES[layout]
    write_layout(layout, tmp_path / "back", documents, splits, no_answer="not said")
    back = tmp_path / "back" / path.name
    assert [row.values for row in read_rows(back, FORMATS[layout].key)] == SAMPLES[layout]
    if FORMATS[layout].around:
        json.loads(back.read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", sorted(SAMPLES))
def test_what_is_converted_is_read_by_the_trainers(layout: str, tmp_path: Path, data: Path) -> None:
    """Ours into the layout and back again; the passages that it keeps are the same, and so are the questions."""
    before = list(iterate_examples(data / "train_w_qa.jsonl"))
    write_layout(layout, tmp_path / "theirs", data / "documents.jsonl", {"train": data / "train_w_qa.jsonl"}, "")
    Conversion(layout, tmp_path / "ours").run(sorted((tmp_path / "theirs").glob("train.*")))
    after = list(iterate_examples(ours(tmp_path / "ours")[1]["train"], answers=FORMATS[layout].answers))
    assert [example.question for example in after] == [example.question for example in before]
    if FORMATS[layout].answers:
        assert [example.gold_answer for example in after] == [example.gold_answer for example in before]
    if PASSAGES[layout] and layout != "flagembedding":
        texts = [[[d.page_content for d in e.gold_docs] for e in examples] for examples in (before, after)]
        assert texts[0] == texts[1]


def test_unanswerable_questions_are_left_out_unless_they_have_a_text(tmp_path: Path) -> None:
    for layout in ("squad", "msmarco"):
        path = write_sample(tmp_path / layout, layout)
        kept = Conversion(layout, tmp_path / "a" / layout, "nobody says")
        kept.run([path])
        left = Conversion(layout, tmp_path / "b" / layout)
        left.run([path])
        answers = [e.gold_answer for e in iterate_examples(tmp_path / "a" / layout / "train_w_qa.jsonl")]
        assert answers.count("nobody says") == 1
        assert left.counts["unanswerable questions left out"] == 1
        assert left.counts["questions of train"] == kept.counts["questions of train"] - 1


def test_several_answers_are_kept_behind_the_first(tmp_path: Path) -> None:
    row = {"question": "q", "answer": ["one", "two", "one"]}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row))
    Conversion("nq_open", tmp_path).run([tmp_path / "dev.jsonl"])
    (example,) = iterate_examples(tmp_path / "dev_w_qa.jsonl", answers=True)
    assert (example.gold_answer, example.other_answers) == ("one", ("two",))


def test_marco_rows_of_columns_and_all_their_passages(tmp_path: Path) -> None:
    row = SAMPLES["msmarco"][0]
    columns = {name: [passage[name] for passage in row["passages"]] for name in row["passages"][0]}
    (tmp_path / "dev.jsonl").write_text(json.dumps({**row, "passages": columns}))
    Conversion("msmarco", tmp_path).run([tmp_path / "dev.jsonl"])
    assert [d.page_content for d in iterate_documents(tmp_path / "documents.jsonl")] == [SALT, WOOL, TITLELESS]
    (example,) = iterate_examples(tmp_path / "dev_w_qa.jsonl")
    assert [d.page_content for d in example.gold_docs] == [WOOL]
    assert len(example.ctxs) == 3


def test_blank_passages_and_empty_fields_do_no_harm(tmp_path: Path) -> None:
    """Wikipedia dumps hold pages without text, and Parquet gives null for what is not there."""
    blank = {"title": "Brask", "text": " ", "passage_id": 1}
    rows = {
        "dpr": {"question": "q", "answers": None, "positive_ctxs": [blank], "hard_negative_ctxs": None},
        "msmarco": {"query": "q", "answers": ["a"], "passages": {"passage_text": [" ", WOOL], "is_selected": [0, 1]}},
        "flagembedding": {"query": "q", "pos": [WOOL, ""], "neg": None},
    }
    for layout, row in rows.items():
        (tmp_path / "x.json").write_text(json.dumps(row))
        Conversion(layout, tmp_path / layout, "none").run([tmp_path / "x.json"])
        (documents, splits) = ours(tmp_path / layout)
        assert [d.page_content for d in iterate_documents(documents)] == ["Brask" if layout == "dpr" else WOOL]
        assert len(next(iterate_examples(splits["x"])).gold_docs) == 1


def test_a_corpus_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(
        '{"id": "7", "contents": "\\"Arlen\\"\\nIt sells copper.\\nAnd tin."}\n{"id": "8", "contents": "no title"}\n'
    )
    Conversion("flashrag", tmp_path / "ours").run([tmp_path / "corpus.jsonl", write_sample(tmp_path / "q", "flashrag")])
    documents = list(iterate_documents(tmp_path / "ours/documents.jsonl"))
    assert [(d.metadata["title"], d.page_content) for d in documents] == [
        ("Arlen", "It sells copper.\nAnd tin."),
        ("", "no title"),
    ]
    write_layout("flashrag", tmp_path / "back", tmp_path / "ours/documents.jsonl", {}, "")
    first, second = (json.loads(line) for line in (tmp_path / "back/corpus.jsonl").open(encoding="utf-8"))
    assert first == {"id": "7", "contents": '"Arlen"\nIt sells copper.\nAnd tin.'}
    assert second == {"id": "8", "contents": '""\nno title'}


# ---------------------------------------------------------------- corpus, queries and judgements


def write_beir_sample(folder: Path, packed: bool = False) -> Path:
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": "d1", "title": "Ünï", "text": WOOL, "metadata": {}}, {"_id": "d2", "title": "", "text": SALT,
              "metadata": {}}, {"_id": "d3", "title": "", "text": TITLELESS, "metadata": {}}]  # fmt: skip
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in corpus).encode()
    (folder / ("corpus.jsonl.gz" if packed else "corpus.jsonl")).write_bytes(gzip.compress(rows) if packed else rows)
    queries = [{"_id": f"test-{n}", "text": text, "metadata": {}} for n, text in enumerate(("who sells wool?", "who?"))]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels/test.tsv").write_bytes(
        b"query-id\tcorpus-id\tscore\r\ntest-0\td1\t1\r\ntest-0\td3\t2\r\ntest-0\td2\t0\r\ntest-1\td2\t1\r\n"
    )
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_beir_survives_the_way_to_ours_and_back(packed: bool, tmp_path: Path) -> None:
    Conversion("beir", tmp_path / "ours").run([write_beir_sample(tmp_path / "theirs", packed)])
    documents, splits = ours(tmp_path / "ours")
    examples = list(iterate_examples(splits["test"]))
    assert [[d.page_content for d in example.gold_docs] for example in examples] == [[WOOL, TITLELESS], [SALT]]
    counts = write_layout("beir", tmp_path / "back", documents, splits, "")
    assert counts == {"corpus.jsonl": 3, "queries.jsonl": 2, "qrels/test.tsv": 3}
    plain = write_beir_sample(tmp_path / "plain")
    for name in ("corpus.jsonl", "queries.jsonl"):
        back, before = ([row.values for row in read_rows(path / name)] for path in (tmp_path / "back", plain))
        assert back == before
    lines = (tmp_path / "back/qrels/test.tsv").read_text().splitlines()
    assert lines == ["query-id\tcorpus-id\tscore", "test-0\td1\t1", "test-0\td3\t1", "test-1\td2\t1"]


def test_passages_of_one_source_get_names_of_their_own(tmp_path: Path) -> None:
    rows = [{"page_content": text, "metadata": {"source": "guide"}} for text in ("one", "two")]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "q", "gold_docs": [rows[1]]}))
    write_layout("beir", tmp_path / "b", tmp_path / "documents.jsonl", {"test": tmp_path / "test.jsonl"}, "")
    assert [row.text("_id") for row in read_rows(tmp_path / "b/corpus.jsonl")] == ["guide", "guide#1"]
    assert (tmp_path / "b/qrels/test.tsv").read_text().splitlines()[1] == "test-0\tguide#1\t1"


def test_marcos_passage_ranking_is_read(tmp_path: Path) -> None:
    (tmp_path / "collection.tsv").write_text(f"0\t{WOOL}\r\n1\t{SALT}\r\n", encoding="utf-8")
    (tmp_path / "queries.dev.tsv").write_text("9\twho sells wool\n10\tnobody judged\n")
    (tmp_path / "qrels.dev.tsv").write_text("9\t0\t0\t1\n")
    conversion = Conversion("msmarco_passages", tmp_path)
    conversion.run([tmp_path])
    (example,) = iterate_examples(tmp_path / "dev_w_q.jsonl")
    assert (example.question, example.gold_docs[0].page_content) == ("who sells wool", WOOL)
    assert conversion.counts == {"passages": 2, "questions of dev": 1}


# ---------------------------------------------------------------- reading


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=30) | st.lists(st.integers(), max_size=3),
                                  max_size=3), max_size=6),
    block=st.integers(12, 40),
    kind=st.sampled_from(["lines", "array", "inside", "indented"]),
)  # fmt: skip
def test_rows_are_read_whole_whatever_the_block_cuts(
    rows: list[dict[str, Any]], block: int, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    text = {
        "lines": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "array": json.dumps(rows),
        "inside": '{"data": ' + json.dumps(rows, ensure_ascii=False) + "}",
        "indented": json.dumps(rows, indent=2),
    }[kind]
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        assert [row.values for row in read_rows(path, "data" if kind == "inside" else "")] == rows


def _beir_file(name: str, text: str) -> Callable[[Path], tuple[str, Path]]:
    def make(path: Path) -> tuple[str, Path]:
        folder = write_beir_sample(path / "beir")
        (folder / name).write_text(text)
        return "beir", folder

    return make


def _file(layout: str, name: str, text: str) -> Callable[[Path], tuple[str, Path]]:
    def make(path: Path) -> tuple[str, Path]:
        (path / name).write_bytes(text.encode("latin-1"))
        return layout, path / name

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_file("dpr", "a.json", '[{"question": "q"},\n\n{"answers": []}]'), "a.json:3: field 'question' is missing"),
        (
            _file("dpr", "a.json", '[{"question": "q", "positive_ctxs": [3]}]'),
            "1: field 'positive_ctxs' must be a list",
        ),
        (_file("dpr", "a.json", '[{"question": "q"}'), "a.json:1: not valid JSON (the array does not end)"),
        (_file("dpr", "a.json", '[\n{"question": "q"},\n{"question": }]'), "a.json:3: not valid JSON"),
        (_file("dpr", "a.json", "[3]"), "a.json:1: expected a JSON object, found int"),
        (
            _file("fid", "a.json", '[{"question": "q", "ctxs": [{"text": "t", "score": "x"}]}]'),
            "a.json:1: ctxs[0]: field 'score' must be",
        ),
        (_file("nq_open", "a.jsonl", '{"question": "q", "answer": [1]}'), "a.jsonl:1: field 'answer' must be a list"),
        (_file("nq_open", "a.jsonl", '{"question": "q"}\n{"question"'), "a.jsonl:2: not valid JSON"),
        (
            _file("tevatron", "a.jsonl", '{"docid": 1, "text": ""}'),
            "a.jsonl:1: field 'text' must be a text that is not",
        ),
        (_file("msmarco", "a.jsonl", '{"query": "q", "passages": {"a": [1], "b": 2}}'), "a.jsonl:1: field 'passages'"),
        (_file("nq_open", "a.jsonl", '{"question": "\xff"}'), "a.jsonl: not UTF-8 text"),
        (_file("nq_open", "a.jsonl", "\n"), "a.jsonl: holds no rows"),
        (_file("nq_open", "a.jsonl.gz", "no"), "a.jsonl.gz: not a whole gzip file"),
        (_file("triviaqa", "a.json", '{"Data": [{"Question": "q"}]}'), "a.json:1: field 'Answer' must be an object"),
        (
            _file("squad", "a.json", '{"data": [{"paragraphs": [{}]}]}'),
            "a.json:1: paragraphs[0]: field 'context' is missing",
        ),
        (_beir_file("qrels/test.tsv", "a\tb\tc\ntest-0\td1\tx"), "test.tsv:2: score 'x' is not a number"),
        (_beir_file("qrels/test.tsv", "test-0\td1\t1\ntest-0\td9\t1"), "test.tsv:2: passage 'd9' is not in the corpus"),
        (_beir_file("qrels/test.tsv", "test-9\td1\t1"), "test.tsv:1: query 'test-9' is in no file of queries"),
        (_beir_file("qrels/test.tsv", "test-0"), "test.tsv:1: expected query, passage and score"),
    ],
)
def test_what_is_malformed_is_named_by_file_and_line_and_nothing_is_written(
    make: Callable[[Path], tuple[str, Path]],
    message: str,
    run_executable: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout, path = make(tmp_path)
    flags = {"from_format": layout, "input_path": path, "output_dir": tmp_path / "out"}
    assert run_executable("convert_dataset", flags) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "give one of --from_format, --to_format and --validate true"),
        ({"from_format": "dpr", "validate": "true"}, "give one of"),
        ({"from_format": "dpr", "output_dir": "x"}, "--input_path"),
        ({"from_format": "dpr", "input_path": "x"}, "--output_dir"),
        ({"to_format": "dpr", "output_dir": "x"}, "--train_file, --eval_file, --test_file"),
        ({"to_format": "beir", "output_dir": "x", "train_file": "/nowhere"}, "--document_path: BEIR needs"),
        ({"from_format": "dpr", "input_path": ["/a/x.json", "/b/x.json"], "output_dir": "x"}, "two files are called x"),
    ],
)
def test_flags_that_say_too_little_are_refused(
    flags: dict[str, object], message: str, run_executable: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_executable("convert_dataset", flags) == 2
    assert message in capsys.readouterr().err


def test_every_layout_has_a_sample() -> None:
    assert set(READABLE) == {*SAMPLES, "beir", "msmarco_passages"}
    assert set(WRITABLE) == {*SAMPLES, "beir"}


def test_validation_counts_what_was_put_there(
    run_executable: Run, tmp_path: Path, encoder_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    passages = [{"page_content": f"passage number {n}", "metadata": {"source": str(n)}} for n in range(3)]
    repeated = {"page_content": "Passage  number 0", "metadata": {"source": "copy"}}
    absent = {"page_content": "elsewhere", "metadata": {}}
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, [*passages, repeated])))
    train = [Example("Who is it?"), Example("who  is it?"), Example("What?")]
    rows = [{**example.to_json(), "gold_docs": gold} for example, gold in
            zip(train, ([passages[0]], [passages[0], passages[1]], [absent]), strict=True)]  # fmt: skip
    rows[0]["gold_answer"] = "one two three"
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "WHAT?", "gold_docs": [passages[0]]}))
    flags = {"validate": "true", "document_path": tmp_path / "d.jsonl", "train_file": tmp_path / "train.jsonl",
             "test_file": tmp_path / "test.jsonl"}  # fmt: skip
    assert run_executable("convert_dataset", flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("d.jsonl: 4 passages, 1 with the words of an earlier one")
    assert lines[1:4] == [
        "train: 3 questions, 1 with an answer, 1 asked before",
        "train: 3 questions with a gold passage, 1 of them with several",
        "train: 3 of 4 gold passages (75.0%) are in the database",
    ]
    assert "train and test: 1 questions and 1 gold passages are in both" in lines
    assert ["answers", "of", "train", "3", "3", "3", "3"] in [line.split() for line in lines]
    assert run_executable("convert_dataset", {**flags, "model_name_or_path": encoder_path}) == 0
    assert "tokens " in capsys.readouterr().out


def test_a_conversion_ends_with_the_rows_of_each_file(
    run_executable: Run, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"to_format": "dpr", "train_file": data / "train_w_qa.jsonl", "test_file": data / "test_w_qa.jsonl",
             "output_dir": tmp_path / "dpr"}  # fmt: skip
    assert run_executable("convert_dataset", flags) == 0
    assert "dpr: 16 rows of train.json, 4 rows of test.json, as dpr" in capsys.readouterr().out


def test_a_conversion_is_refused_where_rows_of_gold_passages_are_missing(tmp_path: Path, data: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"page_content": "another"}')
    with pytest.raises(UserError, match=r"train_w_qa\.jsonl:1: a gold passage is not in"):
        write_layout("beir", tmp_path / "b", tmp_path / "d.jsonl", {"train": data / "train_w_qa.jsonl"}, "")
