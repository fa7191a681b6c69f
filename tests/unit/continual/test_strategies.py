"""Strategies against small cases computed by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from training_toys import adapter, losses, write_toy

from secura_ds.backbones import load_tokenizer
from secura_ds.continual.strategies import (
    Anchors,
    ElasticWeights,
    ExperienceReplay,
    InterpolatedLora,
    buffered,
    fisher_information,
    joined,
    values_of,
)
from secura_ds.continual.strategies.ilora import consistency
from secura_ds.data import build_datasets
from secura_ds.recipe import Recipe, load_recipe
from secura_ds.training.model import trainable
from secura_ds.training.run import Stage, train
from secura_ds.training.sampling import REPLAYED
from secura_ds.training.strategy import Replay, Strategy
from secura_ds.training.trainer import Trainer


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    options = [f"training.output_dir={tmp_path / 'run'}", "adapter.fold_every=0", "training.max_steps=3"]
    return load_recipe(write_toy(tmp_path), options)


def rows_of(recipe: Recipe, count: int) -> Dataset:
    rows, _, _ = build_datasets(recipe, load_tokenizer(recipe.backbone))
    return rows.select(range(count))


class Seen(Strategy):
    """Notes what every step gets."""

    def __init__(self, inner: Strategy) -> None:
        self.inner, self.replay = inner, inner.replay
        self.batches: list[list[tuple[tuple[int, ...], bool]]] = [[]]

    def loss(self, trainer: Trainer, model: Any, inputs: dict[str, Any], compute: Any) -> Tensor:
        for ids, mask, marked in zip(
            inputs["input_ids"], inputs["attention_mask"], inputs[REPLAYED], strict=True
        ):
            self.batches[-1].append((tuple(ids[mask.bool()].tolist()), bool(marked)))
        return self.inner.loss(trainer, model, inputs, compute)

    def after_step(self) -> None:
        self.batches.append([])


# The buffer.


def test_a_buffer_holds_as_many_of_each_task() -> None:
    tasks = [[f"{name}{i}" for i in range(50)] for name in "abc"]
    kept = buffered(tasks, 20, seed=3)
    assert [sum(item.startswith(name) for item in kept) for name in "abc"] == [7, 7, 6]
    assert len(set(kept)) == 20


def test_a_later_buffer_has_nothing_an_earlier_one_had_dropped() -> None:
    tasks = [[f"{name}{i}" for i in range(50)] for name in "abc"]
    before, after = set(buffered(tasks[:2], 20, seed=3)), set(buffered(tasks, 20, seed=3))
    assert {item for item in after if not item.startswith("c")} < before


def test_a_task_smaller_than_its_share_is_kept_whole() -> None:
    assert sorted(buffered([["a", "b"], ["c"] * 9], 8, seed=0)) == ["a", "b", *["c"] * 4]


def test_a_buffer_that_cannot_hold_one_of_each_is_refused() -> None:
    with pytest.raises(ValueError, match="2 examples cannot hold one of each of 3"):
        buffered([["a"], ["b"], ["c"]], 2, seed=0)


# Replay.


def test_every_step_has_the_batch_and_the_replayed_examples(recipe: Recipe) -> None:
    earlier = rows_of(recipe, 5)
    seen = Seen(ExperienceReplay(Replay(earlier, per_step=3)))
    train(recipe, stage=Stage(strategy=seen))
    steps = seen.batches[:-1]
    assert len(steps) == 3
    known = {tuple(ids) for ids in earlier["input_ids"]}
    for step in steps:
        assert [sum(not marked for _, marked in step), sum(marked for _, marked in step)] == [4, 3]
        replayed = [ids for ids, marked in step if marked]
        assert set(replayed) <= known
        assert len(set(replayed)) == 3
    assert {ids for step in steps for ids, marked in step if marked} == known


def test_the_tasks_own_examples_come_in_the_order_they_have_without_replay(recipe: Recipe) -> None:
    found = []
    for replay in (Replay(rows_of(recipe, 5), per_step=3), Replay(rows_of(recipe, 2), per_step=1)):
        seen = Seen(ExperienceReplay(replay))
        train(recipe, stage=Stage(strategy=seen), overwrite=bool(found))
        found.append([sorted(ids for ids, marked in step if not marked) for step in seen.batches])
    assert found[0] == found[1]


def test_the_loss_is_the_mean_over_the_tokens_of_both(recipe: Recipe) -> None:
    """With the task's own rows in the buffer, all of them in every step, a step is one over all of them."""
    whole = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"micro_batch_size": 20, "max_steps": 1})}
    )
    train(whole)
    expected = losses(Path(recipe.training.output_dir))
    part = recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update={"max_steps": 1}),
            "data": recipe.data.model_copy(
                update={"sources": [recipe.data.sources[0].model_copy(update={"max_examples": 4})]}
            ),
        }
    )
    rest = build_datasets(recipe, load_tokenizer(recipe.backbone))[0]
    first = {tuple(ids) for ids in build_datasets(part, load_tokenizer(recipe.backbone))[0]["input_ids"]}
    rest = rest.filter(lambda row: tuple(row["input_ids"]) not in first)
    assert len(rest) == 36
    train(part, stage=Stage(strategy=ExperienceReplay(Replay(rest, per_step=36))), overwrite=True)
    assert losses(Path(recipe.training.output_dir)) == pytest.approx(expected, rel=1e-5)


# Elastic weight consolidation.


def test_anchors_of_two_tasks_by_hand() -> None:
    F1, F2 = {"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([2.0, 0.5])}
    v1, v2 = {"w": torch.tensor([0.5, -1.0])}, {"w": torch.tensor([1.0, 3.0])}
    both = joined(joined(None, F1, v1, None), F2, v2, None)
    theta = torch.tensor([2.0, 2.0])
    # F1 (theta - v1) + F2 (theta - v2)
    gradient = both.weights["w"] * theta - both.pulls["w"]
    assert gradient.tolist() == [1 * 1.5 + 2 * 1.0, 4 * 3.0 + 0.5 * -1.0]
    online = joined(joined(None, F1, v1, 0.5), F2, v2, 0.5)
    assert online.weights["w"].tolist() == [0.5 * 1 + 2, 0.5 * 4 + 0.5]
    assert online.pulls["w"].tolist() == [2.5 * 1.0, 2.5 * 3.0]
    again = Anchors.from_tensors(both.to_tensors())
    assert torch.equal(again.weights["w"], both.weights["w"]) and torch.equal(
        again.pulls["w"], both.pulls["w"]
    )


class Kept(ElasticWeights):
    """Keeps the gradients of the first pass and the parameters at the first step."""

    gradients: dict[str, Tensor]

    def begin(self, trainer: Trainer) -> None:
        super().begin(trainer)
        self.gradients, self.trainer = {}, trainer
        for name, parameter in trainable(trainer.model).items():
            parameter.register_hook(partial(self._keep, name))

    def _keep(self, name: str, gradient: Tensor) -> None:
        self.gradients.setdefault(name, gradient.clone())


def first_gradients(recipe: Recipe, anchors: Anchors | None, decay: float | None = None) -> dict[str, Tensor]:
    kept = Kept(10.0, anchors, decay)
    train(recipe, stage=Stage(strategy=kept), overwrite=True)
    return kept.gradients


@pytest.mark.parametrize("decay", [None, 0.5])
def test_the_penaltys_gradient_joins_the_losss(recipe: Recipe, decay: float | None) -> None:
    """lambda F (theta - theta'), a half of it in each of a step's two passes."""
    adapters = {}

    class Note(Strategy):
        def begin(self, trainer: Trainer) -> None:
            adapters.update(values_of(trainer))

    train(recipe, stage=Stage(strategy=Note()))
    plain = first_gradients(recipe, None)
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.rand(v.shape, generator=generator) for n, v in adapters.items()}
    anchors = Anchors(weights, {n: weights[n] * (adapters[n] - 0.25) for n in weights})
    found = first_gradients(recipe, anchors, decay)
    for name, gradient in found.items():
        expected = plain[name] + 10.0 * (decay or 1.0) * weights[name] * 0.25 / 2
        assert torch.allclose(gradient, expected, atol=1e-5), name


class Ends(Strategy):
    """Notes the parameters at both ends of a run under another strategy."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner

    def begin(self, trainer: Trainer) -> None:
        self.inner.begin(trainer)
        self.first = values_of(trainer)

    def before_step(self) -> None:
        self.inner.before_step()

    def after_step(self) -> None:
        self.inner.after_step()

    def finish(self, trainer: Trainer) -> None:
        self.last = values_of(trainer)

    @property
    def moved(self) -> float:
        return sum(float((self.last[n] - self.first[n]).square().sum()) for n in self.first) ** 0.5


def test_a_strong_penalty_holds_the_parameters(recipe: Recipe) -> None:
    changes = {"max_steps": 20, "scheduler": "constant", "warmup_ratio": 0.0}
    long = recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})
    free = Ends(Strategy())
    train(long, stage=Stage(strategy=free))
    ones = {n: torch.ones_like(v) for n, v in free.first.items()}
    moved = []
    for penalty in (1e-6, 1e3):
        held = Ends(ElasticWeights(penalty, Anchors(ones, free.first)))
        train(long, stage=Stage(strategy=held), overwrite=True)
        moved.append(held.moved)
    assert moved[0] == pytest.approx(free.moved, rel=0.05)
    assert moved[1] < free.moved / 3


def test_fisher_information_by_hand(recipe: Recipe) -> None:
    """The mean of squared gradients of -log p(answer | prompt), example by example."""
    rows = rows_of(recipe, 3).to_list()
    found: dict[str, Any] = {}

    class Measured(Strategy):
        def finish(self, trainer: Trainer) -> None:
            found["fisher"] = fisher_information(trainer, rows)
            total: dict[str, Tensor] = {}
            for row in rows:
                trainer.model.zero_grad()
                logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
                labels = torch.tensor(row["labels"])
                F.cross_entropy(logits[:-1], labels[1:], reduction="sum").backward()
                for name, parameter in trainable(trainer.model).items():
                    total[name] = total.get(name, 0) + parameter.grad.square() / len(rows)
            found["expected"] = total
            trainer.model.zero_grad()

    train(recipe, stage=Stage(strategy=Measured()))
    assert any(float(value.max()) > 1e-6 for value in found["fisher"].values())
    for name, value in found["fisher"].items():
        assert torch.allclose(value, found["expected"][name], rtol=1e-4, atol=1e-9), name


# I-LoRA.


def test_the_long_term_memory_is_the_moving_average(recipe: Recipe) -> None:
    decay, path = 0.75, []

    class Path_(InterpolatedLora):
        def begin(self, trainer: Trainer) -> None:
            super().begin(trainer)
            path.append(values_of(trainer))
            self.trainer = trainer

        def after_step(self) -> None:
            super().after_step()
            path.append(values_of(self.trainer))

    strategy = Path_(None, decay=decay, weight=1.0)
    train(recipe, stage=Stage(strategy=strategy))
    expected = path[0]
    for values in path[1:]:
        expected = {n: decay * expected[n] + (1 - decay) * values[n] for n in expected}
    saved = adapter(Path(recipe.training.output_dir))
    assert len(path) == 4
    for name, value in expected.items():
        kept = saved[name.replace(".default", "")]
        assert torch.allclose(kept, value, atol=1e-6), name
        if "_B" in name:
            assert not torch.allclose(kept, path[-1][name], atol=1e-6), name


def test_the_consistency_of_two_examples_by_hand() -> None:
    working = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[1.0, 1.0], [3.0, 1.0]]])
    remembered = torch.zeros_like(working)
    mask = torch.tensor([[1, 0], [1, 1]])
    # (1 + 4) / 2 for one token; the mean of (1 + 1) / 2 and (9 + 1) / 2 for two.
    assert float(consistency(working, remembered, mask)) == 2.5 + (1.0 + 5.0) / 2


def test_the_consistency_joins_the_loss(recipe: Recipe) -> None:
    """Far from the long-term memory the first step's loss is larger by the weight times the distance."""
    replay = Replay(rows_of(recipe, 4), per_step=4)
    start: dict[str, Tensor] = {}

    class Note(ExperienceReplay):
        def begin(self, trainer: Trainer) -> None:
            start.update(values_of(trainer))

    train(recipe, stage=Stage(strategy=Note(replay)))
    plain = losses(Path(recipe.training.output_dir))[0]
    found = []
    for weight in (1.0, 2.0):
        memory = {n: v + 0.3 * torch.ones_like(v) for n, v in start.items()}
        strategy = InterpolatedLora(replay, decay=0.9, weight=weight, memory=memory)
        train(recipe, stage=Stage(strategy=strategy), overwrite=True)
        found.append(losses(Path(recipe.training.output_dir))[0] - plain)
    assert found[0] > 1e-4
    assert found[1] == pytest.approx(2 * found[0], rel=1e-3)


def test_next_to_its_memory_a_step_has_no_consistency_loss(recipe: Recipe) -> None:
    replay = Replay(rows_of(recipe, 4), per_step=4)
    train(recipe, stage=Stage(strategy=ExperienceReplay(replay)))
    plain = losses(Path(recipe.training.output_dir))
    train(recipe, stage=Stage(strategy=InterpolatedLora(replay, decay=0.9, weight=5.0)), overwrite=True)
    assert losses(Path(recipe.training.output_dir))[0] == pytest.approx(plain[0], abs=1e-6)
    assert np.isfinite(losses(Path(recipe.training.output_dir))).all()
