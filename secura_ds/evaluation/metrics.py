"""Scores of generated answers, each with a bootstrap standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

Scored = tuple[float, float, list[bool]]
"""Score, its standard error, and which answers are right word for word."""

RESAMPLES = 1000
SEED = 0


def bootstrap_stderr(values: np.ndarray, statistic: Callable[[np.ndarray], float] | None = None) -> float:
    """Standard deviation of a statistic over seeded resamples of the items.

    Args:
        values: (items,) or (items, k).
        statistic: from resampled values to a number; the mean if None.
    """
    rng = np.random.default_rng(SEED)
    picks = rng.integers(len(values), size=(RESAMPLES, len(values)))
    if statistic is None:
        return float(np.std([values[pick].mean() for pick in picks]))
    return float(np.std([statistic(values[pick]) for pick in picks]))


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> Scored:
    """Share of answers equal to what was expected; blanks at both ends do not count."""
    return _share(exact_matches(answers, expected))


def json_exact_match(answers: Sequence[str], expected: Sequence[str]) -> Scored:
    """Share of answers that are, as a whole, JSON equal to the expected one.

    The order of keys and blanks between them do not count; text around the JSON, a key given twice, NaN, or
    `1.0` and `true` where `1` is expected make it wrong.
    """
    return _share(
        [
            (found := canonical_json(answer)) is not None and found == canonical_json(wanted)
            for answer, wanted in zip(answers, expected, strict=True)
        ]
    )


def bleu(answers: Sequence[str], expected: Sequence[str]) -> Scored:
    """Corpus BLEU of sacrebleu, 0 to 100 (https://aclanthology.org/W18-6319)."""
    metric = BLEU(effective_order=True)
    sentences = [
        metric.sentence_score(answer, [wanted]) for answer, wanted in zip(answers, expected, strict=True)
    ]
    counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in sentences], dtype=np.int64)

    def corpus_score(rows: np.ndarray) -> float:
        total = rows.sum(axis=0).tolist()
        orders = (len(total) - 2) // 2
        return float(BLEU.compute_bleu(total[:orders], total[orders : 2 * orders], *total[-2:]).score)

    return corpus_score(counts), bootstrap_stderr(counts, corpus_score), exact_matches(answers, expected)


def rouge_l(answers: Sequence[str], expected: Sequence[str]) -> Scored:
    """Mean F-measure of the longest common subsequence of words, 0 to 1 (rouge-score, without stemming)."""
    scorer = RougeScorer(["rougeL"])
    pairs = zip(answers, expected, strict=True)
    values = np.array([scorer.score(wanted, answer)["rougeL"].fmeasure for answer, wanted in pairs])
    return float(values.mean()), bootstrap_stderr(values), exact_matches(answers, expected)


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], Scored]] = {
    "exact_match": exact_match,
    "json_exact_match": json_exact_match,
    "bleu": bleu,
    "rougeL": rouge_l,
}


def exact_matches(answers: Sequence[str], expected: Sequence[str]) -> list[bool]:
    """Which answers equal what was expected, blanks at both ends aside."""
    return [answer.strip() == wanted.strip() for answer, wanted in zip(answers, expected, strict=True)]


def canonical_json(text: str) -> str | None:
    """One form for all JSON texts of the same value, or None where `text` is not JSON and nothing else."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return json.dumps(value, sort_keys=True)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _share(right: list[bool]) -> Scored:
    values = np.array(right, dtype=np.float64)
    return float(values.mean()), bootstrap_stderr(values), right
