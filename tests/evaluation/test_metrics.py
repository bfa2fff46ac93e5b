"""Metrics against values worked out by hand, plain loops and the libraries themselves; and files for trec_eval."""

import random
import re
import string
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from rqa.data import Document, Example
from rqa.evaluation.executables import document_name, write_qrels, write_run
from rqa.evaluation.metrics import answer_statistics, bleu, corpus_bleu, faithfulness, right_answers, score_answer
from rqa.evaluation.retrieval import mean_scores, retrieval_rows, score_ranking
from rqa.retrieval.retriever import Hits

PAIRS = [
    ("Arlen trades in copper.", "Arlen trades in copper."),
    ("It trades in copper and wool, each spring.", "Arlen trades in copper."),
    ("Honey", "Arlen trades in copper."),
    ("", "Arlen trades in copper."),
    ("In the year 1100.", "in the year 1107"),
    ("copper copper copper copper", "copper"),
    ("Cities trading coppers", "City trade copper"),
]


def test_f1_and_exact_match_of_what_squad_normalises_worked_out_by_hand() -> None:
    for answer, reference, f1, exact in [
        ("The Copper!", "copper", 1, 1),
        ("The  Harbour, of a Town!", "harbour of town", 1, 1),
        ("An apple; the theme", "apple theme", 1, 1),
        ("U.S. don't", "us dont", 1, 1),
        ("Ärmel\tÜ", "ärmel ü", 1, 1),
        ("a the an", "", 1, 1),
        ("wool", "copper", 0, 0),
        ("copper wool", "wool copper", 1, 0),
        ("copper and wool", "copper", 2 * (1 / 3) * 1 / (1 / 3 + 1), 0),
        ("copper copper wool", "copper copper salt", 2 / 3, 0),
        ("in year 1100", "in the year of 1100", 2 * 1 * (3 / 4) / (7 / 4), 0),
        ("", "copper", 0, 0),
        ("", "", 1, 1),
        ("the", "a", 1, 1),
    ]:
        for ours in (score_answer(answer, reference), score_answer(reference, answer)):
            assert (ours["f1"], ours["exact_match"]) == (pytest.approx(f1, abs=1e-12), exact)


def test_english_scores_are_those_of_the_squad_script_rouge_score_and_sacrebleu() -> None:
    chance, library, pairs = random.Random(0), RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True), [*PAIRS]
    for _ in range(300):
        texts = ["".join(chance.choices("abeht'-_.,$  " + string.printable, k=30)) + " The end" for _ in range(2)]
        pairs.append((texts[0], texts[1]))
    for texts in pairs:
        bare = ["".join(c for c in text.lower() if c not in string.punctuation) for text in texts]
        ours, theirs = (re.sub(r"\b(a|an|the)\b", " ", text).split() for text in bare)
        f1 = 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))
        rouge = {kind: score.fmeasure for kind, score in library.score(texts[1], texts[0]).items()}
        assert score_answer(*texts) == {"f1": f1, "exact_match": ours == theirs} | rouge
    for size in [*range(1, len(PAIRS) + 1), len(pairs)]:
        answers, references = map(list, zip(*pairs[:size], strict=True))
        theirs = sacrebleu.BLEU().corpus_score(answers, [references]).score
        assert corpus_bleu(answers, references) == pytest.approx(theirs / 100, abs=1e-12)


SCRIPTS = {
    "巴黎是法国的首都。": "城", "東京タワーは高いです": "よ", "파리는 프랑스의 수도": "는", "กรุงเทพเป็นเมืองหลวง": "น",
    "Париж — столица Франции": " е", "باريس عاصمة فرنسا": " هي", "पेरिस फ्रांस की राजधानी है": " ही",
    "élève à l'école été": " né",
    "ភ្នំពេញជារាជធានី": "ន", "二〇〇八年": "度", "ལྷ་ས་ནི་བོད": "ཀྱི", "בירת צרפת היא פריז": " זו",
}  # fmt: skip


def test_identical_answers_score_1_in_every_script_and_longer_ones_less_but_not_0() -> None:
    for text, more in SCRIPTS.items():
        perfect = {"rouge1": 1, "rouge2": 1, "rougeL": 1, "f1": 1, "exact_match": 1}
        assert (score_answer(text, text), corpus_bleu([text], [text])) == (perfect, 1), text
        longer = score_answer(text + more, text)
        assert all(0 < longer[name] < 1 for name in perfect if name != "exact_match"), text
        assert 0 <= corpus_bleu([text + more], [text]) < 1, text
    assert not any(score_answer("élan", "écran").values())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("the king’s “crown”", 'the king\'s "crown"'), ("1914–1918", "1914-1918"), ("ＡＢＣ　１２", "ABC 12"),
        ("п’ять яблук п´ять", "п'ять яблук пʼять"), ("co\u00adop\u200bera\ufefftion", "cooperation"),
        ("ﾊﾟﾘ市", "パリ市"),
        *((text, unicodedata.normalize("NFD", text)) for text in ("élève été", "Việt Nam", "がぎ", "파리는")),
    ],
)  # fmt: skip
def test_one_text_in_two_spellings_is_the_same(one: str, other: str) -> None:
    assert (score_answer(one, other)["exact_match"], score_answer(one, other)["rouge1"]) == (1, 1)
    assert corpus_bleu([one], [other]) == 1


def test_the_best_of_several_right_answers_counts_and_bleu_takes_them_all() -> None:
    best = {"rouge1": 1, "rouge2": 2 / 3, "rougeL": 0.8, "f1": 1, "exact_match": 0}
    assert score_answer("copper wool", "wool copper", "copper wool salt") == pytest.approx(best)
    answers = ["It trades in copper and wool each spring.", "In 1107 a harbour was built."]
    golds, other = ["It trades in copper each spring.", "A harbour was built in 1107."], "Copper and wool each spring."
    rows = [{"generated_answer": text, "gold_answer": gold, "other_answers": [right, " ", "?"]}
            for text, gold, right in zip(answers, golds, [other, "!"], strict=True)]  # fmt: skip
    references = [golds, [other, None]]
    theirs = sacrebleu.BLEU().corpus_score(answers, references).score
    assert bleu(np.sum(answer_statistics(rows), axis=0)) == pytest.approx(theirs / 100)
    assert right_answers(rows[1]) == golds[1:]  # what has no words is what an empty answer says


def test_faithfulness_worked_out_by_hand() -> None:
    for answer, passages, words, pairs in [
        ("Copper and wool.", ["They sell copper.", "and some wool"], 1.0, 0.0),
        ("copper and wool", ["The copper and wool!"], 1.0, 1.0),
        ("copper copper copper wool", ["copper, copper"], 0.5, 1 / 3),
        ("copper wool copper wool", ["copper wool", "wool copper salt"], 1.0, 2 / 3),
        ("the copper", ["a copper"], 1.0, 0.0),
        ("", ["copper"], 0.0, 0.0),
        ("copper", [], 0.0, 0.0),
    ]:
        assert (faithfulness(answer, passages), faithfulness(answer, passages, 2)) == pytest.approx((words, pairs))


TWO = 0.6309297535714575  # the gain of the second rank: 1 / log2(2 + 1)
RANKINGS = [  # ranking, gold, k: recall (of ALL gold), reciprocal rank, NDCG, average precision
    ("abcd", "ad", 3, 0, 1, 1 / (1 + TWO), 1 / 2),
    ("abcd", "bd", 3, 0, 1 / 2, TWO / (1 + TWO), (1 / 2) / 2),
    ("abcd", "d", 3, 0, 0, 0, 0),
    ("abab", "b", 10, 1, 1 / 2, TWO, 1 / 2),  # a document found twice counts once
    ("abab", "ab", 10, 1, 1, 1, 1),
    ("aaab", "ab", 3, 0, 1, 1 / (1 + TWO), 1 / 2),
    ("aaa", "a", 10, 1, 1, 1, 1),
    ("", "a", 5, 0, 0, 0, 0),
]


def test_scores_of_a_ranking_worked_out_by_hand() -> None:
    for ranking, gold, k, *expected in RANKINGS:
        scores = score_ranking(ranking, dict.fromkeys(gold, 1), [k], depth=k)
        found = [scores[f"{name}@{k}"] for name in ("recall", "mrr", "ndcg", "map")]
        assert found == pytest.approx(expected, abs=1e-12)


def test_documents_are_gold_by_source_and_content_and_count_once_and_without_gold_nothing_does() -> None:
    found = [Document("Text.", {"source": "b"}), Document("Text.", {"source": "a", "title": "more"}, "formatted")]
    gold = Document("Text.", {"source": "a"})
    scores = mean_scores(retrieval_rows([found, []], [Example("Why?", (gold, gold)), Example("How?")], [1, 2]))
    assert (scores["retr/recall@1"], scores["retr/recall@2"], scores["retr/mrr@10"]) == (0, 1, 0.5)
    assert set(mean_scores(retrieval_rows([[gold]], [Example("Why?", (gold, gold))], [1])).values()) == {1.0}
    assert mean_scores(retrieval_rows([[]], [Example("Why?")], [1])) == mean_scores([]) == {}


MEASURES = {"recip_rank", "ndcg_cut.10", "map_cut.10", "recall.1,4,10"}


def as_trec_eval_ranks(scores: dict[str, float]) -> list[str]:
    """By score in single precision, ties by the name that sorts last."""
    return sorted(scores, key=lambda name: (np.float32(scores[name]), name), reverse=True)


def test_trec_eval_finds_our_scores_and_our_order_in_the_files_we_write(tmp_path: Path) -> None:
    """Scores with many ties, and gold documents of several gains, of which some are never found."""
    chance = random.Random(0)
    documents = [Document(f"Passage {i}.", {"source": f"a b/{i}", "gold_gain": 1 + i % 3}) for i in range(25)]
    examples = [Example(f"Q{i}?", tuple(chance.sample(documents, chance.choice([1, 2, 4, 15])))) for i in range(300)]
    ids = np.array([chance.sample(range(25), 10) for _ in examples])
    ids[0, 5:] = -1
    scores = -np.sort(-np.array([[chance.choice([0.5, 0.5000001, 3.0]) for _ in range(10)] for _ in examples]))
    write_run(tmp_path / "run", Hits(ids, scores), documents)
    write_qrels(tmp_path / "qrels", examples)
    with (tmp_path / "run").open() as run, (tmp_path / "qrels").open() as qrels:
        run, qrels = pytrec_eval.parse_run(run), pytrec_eval.parse_qrel(qrels)
    measured = pytrec_eval.RelevanceEvaluator(qrels, MEASURES).evaluate(run)
    found = [[documents[i] for i in row if i >= 0] for row in ids.tolist()]
    rows = retrieval_rows(found, examples, [1, 4, 10])
    for number, (ranking, example, row) in enumerate(zip(found, examples, rows, strict=True), start=1):
        theirs = measured[str(number)]
        expected = {"ndcg@10": theirs["ndcg_cut_10"], "map@10": theirs["map_cut_10"], "mrr@10": theirs["recip_rank"]}
        expected |= {f"recall@{k}": float(theirs[f"recall_{k}"] == 1) for k in (1, 4, 10)}  # all gold is found
        assert row["scores"] == pytest.approx({f"retr/{name}": score for name, score in expected.items()}, abs=1e-6)
        assert as_trec_eval_ranks(run[str(number)]) == [document_name(document) for document in ranking]
        assert qrels[str(number)] == {document_name(document): document.gain for document in example.gold_docs}
