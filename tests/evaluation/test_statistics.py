"""Intervals: their coverage on data whose truth is known, and against plain resampling."""

import random

import numpy as np
import pytest
import sacrebleu
from scipy import stats

from rqa.evaluation.metrics import bleu, bleu_statistics, corpus_bleu
from rqa.evaluation.results import difference_intervals, interval, is_telling, mean_intervals, statistic_samples


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.85])
def test_about_95_of_100_intervals_hold_the_true_rate(rate: float) -> None:
    chance = np.random.default_rng(1)
    samples = (chance.random((75, 600)) < rate).astype(float)  # 600 evaluations of 75 questions
    low, high = mean_intervals(samples).T
    assert 0.91 < np.mean((low <= rate) & (rate <= high)) < 0.985
    width = np.mean(high - low)
    assert width == pytest.approx(2 * 1.96 * np.sqrt(rate * (1 - rate) / 75), rel=0.06)


def test_about_95_of_100_paired_intervals_hold_the_true_difference() -> None:
    chance = np.random.default_rng(2)
    first = (chance.random((80, 600)) < 0.5).astype(float)
    second = np.where(chance.random((80, 600)) < 0.7, first, chance.random((80, 600)) < 0.9)  # mostly the same answers
    low, high = difference_intervals(second - first).T
    truth = 0.3 * (0.9 - 0.5)
    assert 0.91 < np.mean((low <= truth) & (truth <= high)) < 0.985


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    values = np.random.default_rng(3).random((40, 2)) ** 2
    ours = mean_intervals(values)
    for column, ends in zip(values.T, ours, strict=True):
        theirs = stats.bootstrap((column,), np.mean, n_resamples=10_000, method="percentile", rng=4)
        assert ends == pytest.approx(list(theirs.confidence_interval), abs=0.006)


def test_a_pair_is_compared_question_by_question() -> None:
    chance = np.random.default_rng(5)
    hard = chance.random(60)  # some questions are harder than others, for both systems
    first, second = hard + 0.01 * chance.standard_normal(60), hard + 0.02 + 0.01 * chance.standard_normal(60)
    (low, high) = difference_intervals((second - first)[:, None])[0]
    assert 0.01 < low < 0.02 < high < 0.03
    apart = mean_intervals(np.stack([first, second], axis=1))
    assert apart[0, 1] > apart[1, 0]  # unpaired, the same systems overlap


def test_all_right_or_all_wrong_is_not_certainty() -> None:
    ends = mean_intervals(np.stack([np.zeros(75), np.ones(75)], axis=1))
    theirs = stats.binomtest(0, 75).proportion_ci(method="exact")
    assert ends[0] == pytest.approx([theirs.low, theirs.high])
    theirs = stats.binomtest(75, 75).proportion_ci(method="exact")
    assert ends[1] == pytest.approx([theirs.low, theirs.high])


def test_intervals_are_the_same_at_every_call_and_between_the_rates_bounds() -> None:
    values = np.random.default_rng(6).integers(0, 2, (9, 5)).astype(float)
    np.testing.assert_array_equal(mean_intervals(values), mean_intervals(values))
    assert (mean_intervals(values) >= 0).all()
    assert (mean_intervals(values) <= 1).all()


def test_a_large_file_is_resampled_in_chunks_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(8).random((200, 1))
    whole = mean_intervals(values)
    monkeypatch.setattr("rqa.evaluation.results.CHUNK", 1000)
    np.testing.assert_allclose(mean_intervals(values), whole, atol=0.01)


def test_the_interval_of_bleu_is_that_of_sacrebleus_bootstrap() -> None:
    chance = random.Random(9)
    references = [" ".join(chance.choices(["a", "b", "c", "d", "e", "f"], k=12)) for _ in range(60)]
    answers = [" ".join(word if chance.random() < 0.8 else "x" for word in text.split()) for text in references]
    statistics = np.array([bleu_statistics(*pair) for pair in zip(answers, references, strict=True)])
    samples = statistic_samples(statistics, bleu)
    theirs = sacrebleu.BLEU().corpus_score(answers, [references], n_bootstrap=1000)
    assert bleu(statistics.sum(axis=0)) == corpus_bleu(answers, references) == pytest.approx(theirs.score / 100)
    assert samples.mean() == pytest.approx(theirs._mean / 100, abs=0.01)
    low, high = interval(samples)
    assert (high - low) / 2 == pytest.approx(theirs._ci / 100, rel=0.15)


@pytest.mark.parametrize(
    ("low", "high", "changed", "telling"),
    [(0.01, 0.2, 6, True), (-0.2, -0.01, 40, True), (-0.01, 0.2, 40, False), (0.01, 0.2, 5, False), (0, 0, 0, False)],
)
def test_a_difference_tells_when_it_excludes_0_and_enough_questions_changed(
    low: float, high: float, changed: int, telling: bool
) -> None:
    assert is_telling(low, high, changed) is telling
