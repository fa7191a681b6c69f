"""The custom autograd function of `apply: forward` against plain autograd and against `method`."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from secura_ds.adapter import restrained
from secura_ds.adapter.restrained import Update, restrained_linear, restrained_weight
from secura_ds.method import cabr, smagnorm
from secura_ds.sharding import Restraint

FORMS = [Restraint(), Restraint(form="average", steepness=4.0, eps=1e-3)]


def parts(dtype: torch.dtype = torch.float64, out: int = 23, columns: int = 17) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"W": (out, columns), "C": (out, 3), "R": (3, columns), "A": (3, 5), "B": (5, 3), "U": (3, 3)}
    shapes |= {"x": (2, 4, columns), "bias": (out,), "dy": (2, 4, out)}
    return {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in shapes.items()}


def plain(p: dict[str, Tensor], restraint: Restraint, scaling: float) -> Tensor:
    """x W+^T + b by ordinary autograd, with M a constant."""
    D = scaling * p["C"] @ (p["U"] + p["A"] @ p["B"]) @ p["R"]
    with torch.no_grad():
        L = D.abs() / (p["W"].abs() + restraint.eps)
        M = 2 - torch.sigmoid(restraint.steepness * (L / L.max() - 0.5))
    weight = p["W"] + D / M if restraint.form == "update" else (2 * p["W"] + D) / M
    return p["x"] @ weight.T + p["bias"]


@pytest.mark.parametrize("restraint", FORMS, ids=["update", "average"])
@pytest.mark.parametrize("block_elements", [2**18, 17 * 4])
def test_gradient_equals_plain_autograd(
    restraint: Restraint, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restrained, "_CPU_ELEMENTS", block_elements)
    p = parts()
    trained = [p[name].requires_grad_() for name in ("x", "A", "B")]
    expected_y = plain(p, restraint, 0.7)
    expected = torch.autograd.grad(expected_y, trained, p["dy"])
    core = p["U"] + p["A"] @ p["B"]
    update = Update(p["C"], p["R"], 0.7, restraint, float(restraint.eps or 0))
    y = restrained_linear(p["x"], lambda: p["W"], p["bias"], core, update)
    found = torch.autograd.grad(y, trained, p["dy"])
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("restraint", FORMS, ids=["update", "average"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.008)])
def test_weight_equals_the_method(restraint: Restraint, dtype: torch.dtype, tolerance: float) -> None:
    p = {name: tensor.to(dtype) for name, tensor in parts(torch.float32, 600, 500).items()}
    core = p["A"].float() @ p["B"].float()
    found, ratio_max = restrained_weight(p["W"], core, Update(p["C"], p["R"], 0.5, restraint, 1e-3))
    D = cabr.update(p["C"], core, p["R"], 0.5)
    settings = {"steepness": restraint.steepness, "form": restraint.form, "eps": 1e-3}
    torch.testing.assert_close(found, smagnorm.s_magnorm(p["W"], D, **settings), rtol=tolerance, atol=1e-5)
    assert found.dtype == dtype
    assert float(ratio_max) == pytest.approx(float(smagnorm.largest_ratio(p["W"], D, 1e-3)), rel=1e-5)


@pytest.mark.parametrize("restraint", FORMS, ids=["update", "average"])
def test_no_update_leaves_the_weight(restraint: Restraint) -> None:
    p = parts(torch.float32)
    core = torch.zeros(3, 3, requires_grad=True)
    y = restrained_linear(p["x"], lambda: p["W"], None, core, Update(p["C"], p["R"], 1.0, restraint, 1e-10))
    torch.testing.assert_close(y, p["x"] @ p["W"].T)
    (gradient,) = torch.autograd.grad(y, core, p["dy"])
    assert torch.isfinite(gradient).all()
    assert float(gradient.abs().max()) > 0


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward() -> None:
    p = parts(torch.float32, 200, 150)
    core = (p["A"] @ p["B"]).requires_grad_()
    update = Update(p["C"], p["R"], 1.0, Restraint(), 1e-10)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        restrained_linear(p["x"], lambda: p["W"], p["bias"], core, update)
    assert [tuple(t.shape) for t in kept] == [(8, 150), (3, 3), ()]


def test_weight_is_read_once_in_each_pass() -> None:
    p = parts(torch.float32)
    core, reads = (p["A"] @ p["B"]).requires_grad_(), []

    def read() -> Tensor:
        reads.append(1)
        return p["W"]

    y = restrained_linear(p["x"], read, None, core, Update(p["C"], p["R"], 1.0, Restraint(), 1e-10))
    assert len(reads) == 1
    y.backward(p["dy"])
    assert len(reads) == 2


def test_autocast_computes_in_its_dtype_and_the_limiter_in_fp32() -> None:
    p = parts(torch.float32)
    core = (p["A"] @ p["B"]).requires_grad_()
    update = Update(p["C"], p["R"], 1.0, Restraint(), 1e-10)
    exact = restrained_linear(p["x"], lambda: p["W"], p["bias"], core, update)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = restrained_linear(p["x"], lambda: p["W"], p["bias"], core, update)
    assert y.dtype == torch.bfloat16
    assert float((y - exact).detach().abs().max() / exact.detach().abs().max()) < 0.01
    y.float().square().sum().backward()
    assert core.grad is not None and core.grad.dtype == torch.float32


def test_accelerator_blocks_cover_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restrained, "_ACCELERATOR_ELEMENTS", 40)
    weight = torch.empty(7, 10, device="meta")
    assert [rows for rows, _, _ in restrained._blocks(weight, torch.float32)] == [
        slice(0, 4),
        slice(4, 7),
    ]


def test_what_is_kept_for_the_backward_pass_can_be_offloaded() -> None:
    """Input and core pass through autograd's hooks, which move activations off a GPU; no more is kept."""
    p = parts(torch.float32)
    update = Update(p["C"], p["R"], 0.5, Restraint(), 1e-10)
    packed: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    gradients = []
    for hooks in (False, True):
        x, core = p["x"].clone().requires_grad_(), p["U"].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t) if hooks else nullcontext():
            y = restrained_linear(x, lambda: p["W"], p["bias"], core, update)
        y.backward(p["dy"])
        gradients.append((x.grad, core.grad))
    assert sorted(packed) == [(), (3, 3), (8, 17)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
