"""Mode "contrast": C and R from what general text and the task ask of a layer's inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calibration_toys import EXAMPLES, assert_same_directions, toy_llama, toy_tokenizer
from peft import PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, PretrainedConfig, Qwen2Config

from secura_ds.adapter import SecuraConfig
from secura_ds.adapter.model import secura_layers
from secura_ds.calibration import calibrate, target_layers
from secura_ds.calibration.factors import frozen
from secura_ds.calibration.moments import input_groups
from secura_ds.calibration.sensitivity import example_batches, sensitivities, text_batches
from secura_ds.calibration.walk import Batch, Walk
from secura_ds.errors import UserError
from secura_ds.method import calibrated
from secura_ds.method.contrast import contrast, contrast_of_rows, contrast_scale
from secura_ds.sharding import dequantized, keep_exact

SHAPE: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 258, "initializer_range": 0.3,
}  # fmt: skip


def config_of(**changes: Any) -> SecuraConfig:
    given: dict[str, Any] = {
        "cur_rank": 8,
        "inner_rank": 12,
        "selection": "calibrated",
        "init": "orthonormal",
        "target_modules": "all-linear",
        "smagnorm": {"apply": "never"},
        "calibration": {"mode": "contrast", "num_tokens": 400},
    }
    return SecuraConfig(**(given | changes))


@pytest.fixture(scope="module", autouse=True)
def _short_sequences() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secura_ds.calibration.text.SEQUENCE_LENGTH", 40)
        yield


def direct(model: Any, batches: list[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """S and F of every linear layer but the head, from one plain backward pass a batch, in float64."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    mask = torch.empty(0)

    def keep(name: str, given: Tensor, output: Tensor) -> None:
        real = mask
        inputs.setdefault(name, []).append(given.detach()[real])
        output.register_hook(lambda g: outputs.setdefault(name, []).append(g[real]))

    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    handles = [
        m.register_forward_hook(lambda _, i, o, name=n: keep(name, i[0], o)) for n, m in layers.items()
    ]
    learnt = tokens = 0
    for batch in batches:
        mask = batch.mask.bool()
        embedded = model.get_input_embeddings()(batch.ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, attention_mask=batch.mask).logits
        F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum").backward()
        learnt += int((batch.targets != -100).sum())
        tokens += int(mask.sum())
    for handle in handles:
        handle.remove()

    def product(parts: list[Tensor], count: int) -> Tensor:
        x = torch.cat(parts).double()
        return x.T @ x / count

    return {n: (product(inputs[n], tokens), product(outputs[n], learnt)) for n in layers}


@pytest.mark.parametrize(
    "family",
    [None, Qwen2Config(**SHAPE), Gemma2Config(**SHAPE, sliding_window=8, final_logit_softcapping=5.0)],
)
def test_block_by_block_is_the_plain_backward_pass(family: PretrainedConfig | None) -> None:
    torch.manual_seed(0)
    model = toy_llama() if family is None else AutoModelForCausalLM.from_config(family)
    model.requires_grad_(False).eval()
    batches = example_batches(EXAMPLES, 400)
    assert len(batches) > 1
    assert not all(batch.mask.all() for batch in batches)
    layers = target_layers(model, config_of())
    groups = input_groups(model.base_model, layers, batches[0].ids)
    with frozen(model), tqdm(disable=True) as bar:
        found = sensitivities(Walk(model, batches, bar), groups, layers, [0] * len(groups))
    expected = direct(model, batches)
    for group, of_group in zip(groups, found, strict=True):
        assert of_group is not None
        S = expected[group.names[0]][0]
        torch.testing.assert_close(
            of_group.inputs.values.double(), S, rtol=0, atol=1e-4 * float(S.abs().max())
        )
        for name in group.names:
            wanted, got = expected[name][1], of_group.gradients[name].values.double()
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_text_and_examples_become_batches() -> None:
    text = text_batches(torch.arange(20).view(10, 2))
    assert [batch.ids.shape for batch in text] == [(8, 2), (2, 2)]
    assert text[1].targets.tolist() == [[17, -100], [19, -100]]
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [4, 5], "labels": [-100, 5]},
        {"input_ids": [6, 7], "labels": [6, 7]},
    ]
    (batch,) = example_batches(rows, 5)
    assert batch.ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.targets.tolist() == [[2, 3, -100], [5, -100, -100]]


def test_packed_examples_are_looked_at_one_by_one() -> None:
    packed = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, 5], "seq_lengths": [3, 2]}
    (batch,) = example_batches([packed])
    single = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    (expected,) = example_batches(single)
    for found, wanted in zip(batch, expected, strict=True):
        assert torch.equal(found, wanted)


def test_the_adapter_takes_both_factors_and_a_sample_of_the_weight(tmp_path: Path) -> None:
    model = toy_llama().requires_grad_(False)
    config = config_of(target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 5})
    result = calibrate(model, toy_tokenizer(), config, examples=EXAMPLES, progress=False)
    assert [tuple(C.shape) for C in result.outputs.values()] == [(64, 8), (64, 5)] * 2
    assert [tuple(R.shape) for R in result.factors.values()] == [(8, 64), (5, 96)] * 2
    adapted = get_peft_model(model, config)
    for name, R in result.factors.items():
        layer = adapted.base_model.model.get_submodule(name)
        assert torch.equal(layer.secura_R["default"], R)
        assert torch.equal(layer.secura_C["default"], result.outputs[name])
        A = layer.secura_A["default"]
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-5)
        W = layer.get_base_layer().weight
        largest = int(W.square().sum(0).argmax())
        assert torch.equal(layer.secura_sample["default"][:, 0], W[:, largest])
        torch.nn.init.normal_(layer.secura_B["default"], std=0.3)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        with adapted.disable_adapter():
            assert not torch.allclose(expected, adapted(ids).logits)
    adapted.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(toy_llama(), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    other = toy_llama()
    torch.nn.init.normal_(other.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj: .* differs from the adapter's columns"):
        PeftModel.from_pretrained(other, str(tmp_path))


@pytest.mark.parametrize("num_tokens", [400, 30])
def test_little_memory_gives_the_same_factors_in_more_passes(num_tokens: int) -> None:
    config = config_of(calibration={"mode": "contrast", "num_tokens": num_tokens})
    once, often = (
        calibrate(toy_llama(), toy_tokenizer(), config, examples=EXAMPLES, progress=False, memory_limit=limit)
        for limit in (10**9, 1)
    )
    for name in once.factors:
        assert torch.equal(once.factors[name], often.factors[name])
        assert torch.equal(once.outputs[name], often.outputs[name])


def test_blocks_without_an_adapter_are_walked_through() -> None:
    everywhere, below = (
        calibrate(toy_llama(), toy_tokenizer(), config, examples=EXAMPLES, progress=False)
        for config in (config_of(), config_of(target_modules=["q_proj", "up_proj"], layers_to_transform=[0]))
    )
    assert list(below.factors) == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    scale = contrast_scale(8, 2) / contrast_scale(8, 14)
    for name, R in below.factors.items():
        assert torch.equal(R, everywhere.factors[name])
        torch.testing.assert_close(below.outputs[name], everywhere.outputs[name] * scale, rtol=1e-5, atol=0)


def test_a_walk_does_not_turn_back() -> None:
    model = toy_llama().requires_grad_(False).eval()
    with frozen(model), tqdm(disable=True) as bar:
        walk = Walk(model, example_batches(EXAMPLES, 60), bar)
        seen: list[tuple[int, bool]] = []
        for number in (1, 1, 0):
            walk.visit(number, lambda index, counts: seen.append((index, counts)))
        assert seen == [(0, True)] * 3
        with pytest.raises(ValueError, match="block 1 is visited after block 0"):
            walk.visit(1, lambda index, counts: None)


@pytest.mark.parametrize(("num_tokens", "wide_as_rows"), [(400, 0), (30, 6)])
def test_factors_keep_clear_of_earlier_tasks_as_of_general_text(
    num_tokens: int, wide_as_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, from moments that are tested above; few tokens are kept as rows by the layers of 96."""
    by_rows: list[Tensor] = []

    def spy(Y: Tensor, X: Tensor, *settings: Any) -> Tensor:
        by_rows.append(X)
        return contrast_of_rows(Y, X, *settings)

    monkeypatch.setattr("secura_ds.calibration.contrast.contrast_of_rows", spy)
    model = toy_llama().requires_grad_(False)
    config = config_of(calibration={"mode": "contrast", "num_tokens": num_tokens})
    rows = EXAMPLES[num_tokens // 20 : num_tokens // 10]
    free = calibrate(model, toy_tokenizer(), config, examples=EXAMPLES, progress=False)
    by_rows.clear()
    clear = calibrate(model, toy_tokenizer(), config, examples=EXAMPLES, earlier=rows, progress=False)
    assert len(by_rows) == wide_as_rows
    layers = target_layers(model, config)
    groups = input_groups(model.base_model, layers, free.token_ids)
    parts = (
        text_batches(free.token_ids),
        example_batches(EXAMPLES, num_tokens),
        example_batches(rows),
    )
    with frozen(model), tqdm(disable=True) as bar:
        found = [sensitivities(Walk(model, part, bar), groups, layers, [0] * len(groups)) for part in parts]
    for group, text, task, before in zip(groups, *found, strict=True):
        assert text is not None and task is not None and before is not None
        S = (text.inputs.values + before.inputs.values).double() / 2
        X = contrast(task.inputs.values.double(), S, 8)
        for name in group.names:
            assert_same_directions(clear.factors[name].T, X, tolerance=1e-4)
            G = (text.gradients[name].values + before.gradients[name].values).double() / 2
            C = contrast(task.gradients[name].values.double(), G, 8) * contrast_scale(8, len(layers))
            assert_same_directions(clear.outputs[name], C, tolerance=1e-4)
            S = before.inputs.values
            assert _excited(clear.factors[name], S) < _excited(free.factors[name], S)


def _excited(R: Tensor, moment: Tensor) -> float:
    """Share of a layer's input that rows of R (r, in), taken as directions, see."""
    Q = torch.linalg.qr(R.T.double()).Q
    return float((Q.T @ moment.double() @ Q).trace() / moment.double().trace())


def test_4_bit_weights_are_calibrated_and_left_as_they_are(tmp_path: Path) -> None:
    toy_llama().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, dtype=torch.float32)
    model.requires_grad_(False)
    keep_exact(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = example_batches(EXAMPLES, 400)
    layers = target_layers(model, config_of())
    groups = input_groups(model.base_model, layers, batches[0].ids)
    with frozen(model), tqdm(disable=True) as bar:
        found = sensitivities(Walk(model, batches, bar), groups, layers, [0] * len(groups))
    plain = toy_llama().requires_grad_(False)
    for name, layer in layers.items():  # what 4-bit layers compute with
        plain.get_submodule(name).weight.copy_(dequantized(layer))
    expected = direct(plain.eval(), batches)
    for group, of_group in zip(groups, found, strict=True):
        assert of_group is not None
        for name in group.names:
            wanted, got = expected[name][1], of_group.gradients[name].values.double()
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))
    result = calibrate(model, toy_tokenizer(), config_of(), examples=EXAMPLES, progress=False)
    assert all(C.any() for C in result.outputs.values())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_what_contrast_cannot_do_is_said() -> None:
    def refused(match: str, model: Any = None, **changes: Any) -> None:
        with pytest.raises(UserError, match=match):
            calibrate(model or toy_llama(), toy_tokenizer(), config_of(), progress=False, **changes)

    refused("'contrast', which looks at the task, too: give calibrate the training examples")
    with pytest.raises(UserError, match="lm_head lies outside the model's blocks.*leave it out"):
        head = config_of(target_modules=["q_proj", "lm_head"])
        calibrate(toy_llama(), toy_tokenizer(), head, examples=EXAMPLES, progress=False)
    silent = [{"input_ids": [1, 2], "labels": [-100, -100]}]
    refused("no token that is learnt", examples=silent)
    unknown = toy_llama()
    unknown.config.model_type = "unheard-of"
    refused("does not know how a unheard-of model's loss follows", unknown, examples=EXAMPLES)
    with pytest.raises(UserError, match=r"q_proj was not calibrated with it: call secura_ds\.calibrate"):
        model = toy_llama()
        for layer in target_layers(model, config_of()).values():
            layer.secura_factor = torch.ones(8, layer.in_features)
        get_peft_model(model, config_of())


def test_what_another_mode_has_left_is_not_taken() -> None:
    model, other = toy_llama(), config_of(calibration={"mode": "null"})
    calibrate(model, toy_tokenizer(), config_of(), examples=EXAMPLES, progress=False)
    with pytest.raises(UserError, match=r"mode is 'null', but .*q_proj was calibrated for 'contrast'"):
        get_peft_model(model, other)
    made = calibrate(model, toy_tokenizer(), other, progress=False).factors
    adapted = get_peft_model(model, other)
    for name, layer in secura_layers(adapted).items():
        assert torch.equal(layer.secura_R["default"], made[name])


def test_a_task_that_does_not_reach_a_layer_names_it() -> None:
    model = toy_llama().requires_grad_(False)
    torch.nn.init.zeros_(model.model.layers[1].post_attention_layernorm.weight)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.\w+_proj: .* all zero"):
        calibrate(model, toy_tokenizer(), config_of(), examples=EXAMPLES, progress=False)


def test_modes_of_inputs_alone_know_no_contrast() -> None:
    with pytest.raises(ValueError, match="mode is 'contrast'"):
        calibrated.factors(torch.ones(4, 4), torch.eye(4), 2, mode="contrast")
