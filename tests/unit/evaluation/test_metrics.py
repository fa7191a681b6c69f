from __future__ import annotations

import math

import numpy as np
import pytest
import sacrebleu

from secura_ds.evaluation.metrics import METRICS, bootstrap_stderr, canonical_json

EXPECTED = '{"a": 1, "b": "x"}'


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (EXPECTED, True),
        ('\n{"b":"x","a":1} ', True),
        ('{"a": 1, "b": "X"}', False),
        ('{"a": 1.0, "b": "x"}', False),
        ('{"a": true, "b": "x"}', False),
        ('{"a": 1, "b": "x", "c": 2}', False),
        ('{"a": 1, "a": 1, "b": "x"}', False),
        (f"Here it is: {EXPECTED}", False),
        (f"```json\n{EXPECTED}\n```", False),
        (f"{EXPECTED}\n{EXPECTED}", False),
        ('{"a": 1, "b": "x"', False),
        ("", False),
    ],
)
def test_json_match_is_strict_in_value_and_free_in_layout(answer: str, right: bool) -> None:
    assert METRICS["json_exact_match"]([answer], [EXPECTED])[2] == [right]


def test_what_is_not_json_matches_nothing() -> None:
    assert canonical_json("NaN") is None
    assert METRICS["json_exact_match"](["nonsense"], ["nonsense"])[0] == 0.0


def test_exact_match_and_its_error() -> None:
    answers, expected = [" yes", "no", "no", "Yes"], ["yes", "no", "yes", "yes"]
    score, stderr, right = METRICS["exact_match"](answers, expected)
    assert (score, right) == (0.5, [True, True, False, False])
    assert stderr == pytest.approx(math.sqrt(0.25 / 4), rel=0.05)


def test_bleu_is_sacrebleus_corpus_score() -> None:
    answers = ["the cat sat on the mat", "a dog barked at the moon tonight", "rain"]
    expected = ["the cat sat on a mat", "a dog barked at the moon last night", "rain fell all day"]
    score, stderr, right = METRICS["bleu"](answers, expected)
    assert score == pytest.approx(sacrebleu.corpus_bleu(answers, [expected]).score, abs=1e-9)
    assert 10 < score < 90
    assert 0 < stderr < 50
    assert right == [False, False, False]
    assert METRICS["bleu"](expected, expected)[:2] == pytest.approx((100.0, 0.0))


def test_rouge_l_is_the_f_measure_of_the_common_subsequence() -> None:
    # Common subsequence "the sat mat": precision 3/4, recall 3/6.
    score, _, right = METRICS["rougeL"](["the dog sat mat"], ["the cat sat on the mat"])
    assert score == pytest.approx(2 * 0.75 * 0.5 / (0.75 + 0.5))
    assert right == [False]


def test_bootstrap_is_seeded_and_agrees_with_theory() -> None:
    values = np.arange(100.0)
    assert bootstrap_stderr(values) == bootstrap_stderr(values)
    assert bootstrap_stderr(values) == pytest.approx(values.std() / 10, rel=0.05)
    assert bootstrap_stderr(values, lambda sample: float(sample.mean())) == bootstrap_stderr(values)
