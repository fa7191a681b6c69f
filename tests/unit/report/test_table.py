"""Plain-text tables, to the character."""

from __future__ import annotations

import pytest
from fake_run import evaluation

from secura_ds.report import evaluation_table, format_table, numbers


def test_numbers_go_right_and_words_left() -> None:
    table = format_table(["layer", "loss"], [["q_proj", 1.5], ["v_proj", "−12.25 %"], ["o", None]])
    assert table.splitlines() == [
        "layer       loss",
        "------  --------",
        "q_proj       1.5",
        "v_proj  −12.25 %",
        "o              –",
    ]


def test_line_breaks_in_a_cell_do_not_break_the_table() -> None:
    assert format_table(["a"], [["one\n two"]]).splitlines() == ["a", "-------", "one two"]


def test_a_short_row_is_refused() -> None:
    with pytest.raises(ValueError, match="every row needs 2 cells"):
        format_table(["a", "b"], [["only one"]])


def test_before_and_after_get_a_change_column() -> None:
    before, after = (
        evaluation(0.0125, 0.9, 2.711, before=True),
        evaluation(0.9125, 0.875, 2.724, before=False),
    )
    lines = evaluation_table({"before": before, "after": after}).splitlines()
    assert lines[0].split() == ["score", "before", "after", "change", "items", "chance"]
    assert (
        "Task: JSON exact match" in lines[2]
        and "+90.0 points" in lines[2]
        and lines[2].endswith("160       –")
    )
    assert "90.0 % ± 2.7" in lines[3] and "−2.5 points" in lines[3] and lines[3].endswith("25.0 %")
    assert (
        lines[4].startswith("general_text (nats/token)")
        and "2.711 ± 0.031" in lines[4]
        and "+0.013" in lines[4]
    )
    assert len(lines) == 5


def test_one_or_missing_evaluation_still_makes_a_table() -> None:
    one = evaluation_table({"after": evaluation(0.5, 0.9, 2.7, before=False)}).splitlines()
    assert one[0].split() == ["score", "after", "items", "chance"]
    assert evaluation_table({"before": None, "after": None}).splitlines()[0].split()[0] == "score"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (numbers.decimal(-0.0004), "0.000"),
        (numbers.decimal(0.013, signed=True), "+0.013"),
        (numbers.decimal(-1.5, 1), "−1.5"),
        (numbers.decimal(float("nan")), "not a number"),
        (numbers.compact(1e-10), "1e−10"),
        (numbers.compact(0.00021), "0.00021"),
        (numbers.compact(4.5e7), "4.5e7"),
        (numbers.count(3686400), "3,686,400"),
        (numbers.share(0.9125), "91.2 %"),
        (numbers.memory(300 * 2**20), "300 MiB"),
        (numbers.memory(2.5 * 2**30), "2.50 GiB"),
        (numbers.duration(7.42), "7.4 s"),
        (numbers.duration(59.7), "1 min 00 s"),
        (numbers.duration(252.4), "4 min 12 s"),
        (numbers.duration(7625), "2 h 07 min"),
    ],
)
def test_numbers_are_written(written: str, expected: str) -> None:
    assert written == expected
