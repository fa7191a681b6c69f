"""Measuring for people with a training loop of their own: tasks and retention of any model in memory.

    from secura_ds.continual import evaluate, retention

    before = evaluate(model, ["orders", "arc_easy"], task_folders=["recipes/tasks"])
    kept = retention(base, model, ["recipes/probes/knowledge.jsonl", "recipes/probes/general.txt"])

`score_matrix` and the metrics of `secura_ds.continual.metrics` take plain numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.continual import metrics
from secura_ds.continual.metrics import Estimate
from secura_ds.errors import UserError
from secura_ds.evaluation import evaluate as run_probes
from secura_ds.recipe import EvaluationRecipe, Probe
from secura_ds.tasks import load_tasks, score_tasks


def evaluate(
    model: PreTrainedModel,
    tasks: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task_folders: Sequence[Path | str] = (),
    max_items: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Score `model`, plain or with an adapter, on tasks through lm-evaluation-harness.

    Args:
        tasks: names of tasks, or paths of their YAML files.
        tokenizer: of the model; None loads the one of `model.name_or_path`.
        task_folders: folders with YAML files of more tasks than lm-evaluation-harness has.
        max_items: of each task, from the front.
        batch_size: sequences per forward pass.

    Returns:
        By task, as `secura_ds.tasks.score_tasks`: metric, score, standard error, number of items, chance.

    Raises:
        UserError: an unknown task, a bad file, a hub that does not answer.
    """
    found = load_tasks(list(tasks), [Path(folder) for folder in task_folders])
    return score_tasks(
        model,
        tokenizer or _tokenizer_of(model),
        found,
        max_items=max_items,
        batch_size=batch_size,
        progress=progress,
    )


def retention(
    model_before: PreTrainedModel,
    model_after: PreTrainedModel,
    probes: Sequence[Path | str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """What `model_after` has kept of what `model_before` knew.

    Args:
        probes: files; `.jsonl` holds questions with choices, anything else is general text.
        tokenizer: of both models; None loads the one of `model_before.name_or_path`.
        batch_size: sequences per forward pass.

    Returns:
        By probe, the file's stem: `before`, `after` and `change`, each `{"value", "stderr"}`, where the error
        of the change is that of the paired items; for questions also `retention`, the share of the score
        above chance that is left, None where the model hardly knew more than chance before.

    Raises:
        UserError: a probe's file is bad.
    """
    tokenizer = tokenizer or _tokenizer_of(model_before)
    evaluation = EvaluationRecipe(probes=[_probe(Path(path)) for path in probes], batch_size=batch_size)
    before, after = (
        run_probes(model, tokenizer, evaluation, progress=progress)["probes"]
        for model in (model_before, model_after)
    )
    return {name: _compared(before[name], after[name]) for name in before}


def _compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    key = "score" if "score" in before else "mean_token_loss"
    first, second = (Estimate(side[key], side["stderr"]) for side in (before, after))
    paired = metrics.paired_stderr(before["items"], after["items"])
    account: dict[str, Any] = {
        "before": _plain(first),
        "after": _plain(second),
        "change": _plain(metrics.change(first, second, paired=paired)),
    }
    if key == "score":
        account["retention"] = _plain(metrics.retention(first, second, before["chance"], paired=paired))
    return account


def _plain(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else {"value": estimate.value, "stderr": estimate.stderr}


def _probe(path: Path) -> Probe:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a probe is a .jsonl file of questions or a text")
    if path.suffix == ".jsonl":
        return Probe(kind="multiple_choice", path=str(path.absolute()))
    return Probe(kind="text_loss", path=str(path.absolute()))


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the model's name {model.name_or_path!r} leads to no tokenizer: give it as tokenizer"
        ) from error
