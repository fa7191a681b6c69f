"""What is wrong with a task's file is said by file, line and field, and no file runs code."""

from __future__ import annotations

from pathlib import Path

import pytest
from task_toys import CHOICE, GENERATION, write_rows, write_task

from secura_ds.errors import UserError
from secura_ds.tasks import load_tasks


def changed(old: str, new: str, text: str = GENERATION) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed("doc_to_text: prompt\n", ""), r"toy\.yaml:1: doc_to_text is missing"),
        (
            changed("doc_to_text: prompt", "doc_to_txt: prompt"),
            r":8: doc_to_txt is no field .* doc_to_text\?",
        ),
        (changed("test_split: test\n", ""), r"toy\.yaml:1: test_split is missing"),
        (changed("training_split: train", "training_split: test"), r":5: training_split is test, the split"),
        (
            changed("test_split: test", "test_split: tset"),
            r":6: test_split is tset; data_files has train, te",
        ),
        (
            changed("generate_until", "generate"),
            r":7: output_type is generate: should be 'generate_until' or",
        ),
        (
            changed("max_gen_toks: 6", "max_gen_toks: 0"),
            r":10: generation_kwargs\.max_gen_toks is 0: should b",
        ),
        (changed("max_gen_toks: 6", "do_sample: true, max_gen_toks: 6"), r":10: .*do_sample is True"),
        (
            changed("metric: exact_match", "metric: acc"),
            r":11: metric_list has acc; generate_until has exact",
        ),
        (
            changed("metric: exact_match", "metric: ter"),
            r":11: metric_list begins with ter, of which less is",
        ),
        (changed("metric: exact_match", "metric: [a]"), r":12: metric_list\.0\.metric is \['a'\]"),
        (
            changed("metric: acc\n", "metric: bleu\n", CHOICE),
            r"metric_list has bleu; multiple_choice has acc",
        ),
        (changed("doc_to_choice: choices\n", "", CHOICE), r":7: doc_to_choice is missing"),
        (
            changed("dataset_path: json", "dataset_path: pandas"),
            r":2: dataset_path is pandas; it is json, for",
        ),
        (
            changed("dataset_path: json", "dataset_path: a/b"),
            r":3: dataset_kwargs has data_files; a hub data",
        ),
        (changed("  data_files:", "  files:"), r":3: dataset_kwargs should be data_files"),
        (
            changed("doc_to_text: prompt", 'doc_to_text: "{{{{question}}}}"'),
            r":8: doc_to_text does not fit the r",
        ),
        (
            changed("doc_to_text: prompt", 'doc_to_text: "{{{{promp"'),
            r":8: doc_to_text does not fit the rows",
        ),
        (
            changed("doc_to_text: prompt", "doc_to_text: promt"),
            r":8: doc_to_text is promt, which is no column of the rows \(prompt, .*no template with \{\{",
        ),
        (changed("test_split: test", "test_split: test\ntest_split: train"), r"test_split is given twice"),
        (changed("task: {name}", "task: [{name}"), r"toy\.yaml:\d+: not YAML"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = write_task(tmp_path, text)
    with pytest.raises(UserError, match=message):
        load_tasks([str(path)], [])


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    text = changed(
        "doc_to_target: completion", "doc_to_targe: x", changed("max_gen_toks: 6", "max_gen_toks: 0")
    )
    write_task(tmp_path / "a", text, name="first")
    write_task(tmp_path / "b", changed("task: {name}", "task: {name}\nspam: 1"), name="second")
    with pytest.raises(UserError) as caught:
        load_tasks(["first", "second"], [tmp_path])
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert [line.split(": ")[1].split(" is ")[0] for line in lines] == [
        "doc_to_target", "generation_kwargs.max_gen_toks", "doc_to_targe", "spam"
    ]  # fmt: skip


def test_a_function_of_a_file_beside_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef text(row): return 'x'\n")
    path = write_task(tmp_path, changed("doc_to_text: prompt", "doc_to_text: !function evil.text"))
    with pytest.raises(UserError, match=r"toy\.yaml:8: !function runs Python code; only lm-eval's own tasks"):
        load_tasks([str(path)], [])
    base = tmp_path / "base.yaml"
    base.write_text("description: !function evil.text\n")
    path.write_text("include: base.yaml\n" + GENERATION.format(name="toy"))
    with pytest.raises(UserError, match=r"base\.yaml:1: !function runs Python code"):
        load_tasks(["toy"], [tmp_path])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "line", ["process_docs: os.system", "class: os.system", "use_prompt: a:b", "unsafe_code: true"]
)
def test_fields_that_run_code_are_refused(tmp_path: Path, line: str) -> None:
    path = write_task(tmp_path, GENERATION + line + "\n")
    with pytest.raises(UserError, match=rf"toy\.yaml:13: {line.split(':')[0]} runs Python code"):
        load_tasks([str(path)], [])


def test_python_objects_in_yaml_are_refused(tmp_path: Path) -> None:
    tag = "!!python/object/apply:os.system ['true']"
    path = write_task(tmp_path, changed("doc_to_text: prompt", f"doc_to_text: {tag}"))
    with pytest.raises(UserError, match=r"toy\.yaml:8: .*python/object/apply"):
        load_tasks([str(path)], [])


def test_templates_are_sandboxed(tmp_path: Path) -> None:
    escape = "{{{{ prompt.__class__.__mro__[1].__subclasses__() }}}}"
    path = write_task(tmp_path, changed("doc_to_text: prompt", f'doc_to_text: "{escape}"'))
    with pytest.raises(
        UserError, match=r":8: doc_to_text does not fit the rows \(access to attribute '__class__'"
    ):
        load_tasks([str(path)], [])


def test_an_included_file_gives_defaults_and_is_no_task(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    text = path.read_text()
    (tmp_path / "base.yaml").write_text(text.replace("task: toy\n", ""))
    path.write_text("include: base.yaml\ntask: toy\ndoc_to_target: '{{completion | upper}}'\n")
    (task,) = load_tasks(["toy"], [tmp_path])
    assert task.held_out_examples(1)[0].messages[-1]["content"] == "YES 0"
    path.write_text("include: toy.yaml\ntask: toy\n")
    with pytest.raises(UserError, match="the file includes itself"):
        load_tasks(["toy"], [tmp_path])


def test_rows_with_other_columns_are_named(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    write_rows(tmp_path / "test.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c"}])
    with pytest.raises(
        UserError, match=r"test\.jsonl:2: the columns are prompt; the first row has prompt, comp"
    ):
        load_tasks([str(path)], [])
    write_rows(
        tmp_path / "test.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": [1]}]
    )
    with pytest.raises(UserError, match=r"test\.jsonl: a column holds values of several types"):
        load_tasks([str(path)], [])
