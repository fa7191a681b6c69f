from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_toys import write_toy
from trl import SFTTrainer

from secura_ds.backbones import load_tokenizer
from secura_ds.data import build_datasets
from secura_ds.recipe import load_recipe
from secura_ds.training import build_model, state
from secura_ds.training import run as runs
from secura_ds.training.arguments import make_arguments
from secura_ds.training.model import trainable
from secura_ds.training.trainer import Trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("toy")
    recipe = load_recipe(write_toy(folder))
    arguments = make_arguments(recipe, folder / "run", None)
    rows, _, _ = build_datasets(recipe, load_tokenizer(recipe.backbone))
    model, tokenizer = build_model(recipe)
    return Trainer(model, arguments, tokenizer, rows, None, checkpoints=folder, keep=1, reentrant=False)


def batch(trainer: Trainer) -> dict[str, Any]:
    rows = [trainer.train_dataset[i] for i in (0, 4, 9)]
    return dict(trainer.data_collator(rows))


def test_the_loss_at_learnt_tokens_is_trls(trainer: Trainer) -> None:
    """On a GPU TRL's own code runs; both must train alike."""
    found = []
    for method in (Trainer.compute_loss, SFTTrainer.compute_loss):
        trainer.model.zero_grad()
        loss = method(trainer, trainer.model, batch(trainer), num_items_in_batch=torch.tensor(50))
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in trainable(trainer.model).values()]))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours == pytest.approx(theirs.item(), rel=1e-5)
    for mine, reference in zip(our_gradients, their_gradients, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-4, atol=1e-6)


def test_the_mean_loss_of_a_validation_batch(trainer: Trainer) -> None:
    inputs = batch(trainer)
    with torch.no_grad():
        logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        )
        assert trainer.compute_loss(trainer.model, inputs) == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_with_nothing_to_learn_is_no_nan(trainer: Trainer) -> None:
    inputs = batch(trainer)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert trainer.compute_loss(trainer.model, inputs).item() == 0


def test_every_example_comes_once_an_epoch_and_the_order_changes(trainer: Trainer) -> None:
    sampler = trainer._get_train_sampler()
    first = [i for indices in sampler for i in indices]
    sampler.set_epoch(1)
    second = [i for indices in sampler for i in indices]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


def test_a_step_holds_the_same_examples_for_any_number_of_ranks(trainer: Trainer) -> None:
    def steps(ranks: int, accumulation: int) -> list[set[int]]:
        samplers = []
        for rank in range(ranks):
            sampler = trainer._get_train_sampler()
            sampler.rank, sampler.dp_size, sampler.grad_accum = rank, ranks, accumulation
            samplers.append([set(indices) for indices in sampler])
        flat = [set.union(*passes) for passes in zip(*samplers, strict=True)]
        return [set.union(*flat[i : i + accumulation]) for i in range(0, len(flat), accumulation)]

    assert steps(1, 2) == steps(2, 1) == steps(2, 2)


def test_random_numbers_go_on_where_they_were() -> None:
    before = state.random_state()
    drawn = torch.rand(3)
    state.set_random_state(before)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize(
    ("broken_steps", "signal", "status"),
    [
        (0, None, "finished"),
        (0, 15, "interrupted"),
        (1, 15, "interrupted"),
        (1, None, "stopped"),
        (3, 15, "stopped"),
    ],
)
def test_a_signal_amid_a_single_broken_step_is_an_interruption(
    broken_steps: int, signal: int | None, status: str
) -> None:
    assert runs._status(SimpleNamespace(not_finite=broken_steps, stopped_by=signal)) == status
