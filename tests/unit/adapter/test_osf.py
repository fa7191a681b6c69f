"""OSF: a step by hand, and gradients that stay projected where parameters are widened."""

from __future__ import annotations

import adapter_toys as toys
import pytest
import torch
from peft import OSFConfig, PeftModel, get_peft_model
from peft.tuners.osf import OSFLayer
from torch import nn

from secura_ds.adapter.osf import prepare_osf
from secura_ds.errors import UserError


def adapted(base: nn.Module, targets: list[str], rank: float) -> PeftModel:
    model = get_peft_model(base, OSFConfig(effective_rank=rank, target_modules=targets))
    prepare_osf(model)
    return model


def test_a_step_by_hand() -> None:
    """W = diag(3, 1): the direction of 3 stays. With dW all ones, u, s and v of 1 each lose a tenth."""
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
    model = adapted(nn.Sequential(linear), ["0"], 1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(tuple(p.shape) for p in trained.values()) == [(1,), (1, 2), (2, 1)]
    assert torch.equal(model(torch.eye(2)), torch.diag(torch.tensor([3.0, 1.0])))
    model(torch.eye(2)).sum().backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    expected = torch.diag(torch.tensor([3.0, 0.9**3]))
    torch.testing.assert_close(model(torch.eye(2)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_nothing_in_the_kept_directions(dtype: torch.dtype) -> None:
    """PEFT widens bfloat16 parameters to fp32, and forgets to project the new ones."""
    model = adapted(toys.toy_llama().to(dtype), ["q_proj", "v_proj", "up_proj"], 0.5)
    model(toys.tokens(), labels=toys.tokens()).loss.backward()
    for layer in (module for module in model.modules() if isinstance(module, OSFLayer)):
        weight = layer.get_base_layer().weight.float()
        kept = layer.effective_rank["default"]
        U, _, V = torch.linalg.svd(weight, full_matrices=False)
        trained = layer.osf_svd_params["default"]
        for gradient, high in ((trained["U_low"].grad, U[:, :kept]), (trained["V_low"].grad.T, V[:kept].T)):
            assert gradient.dtype == torch.float32 and gradient.any()
            inside = torch.linalg.vector_norm(high.T @ gradient) / torch.linalg.vector_norm(gradient)
            assert inside < (1e-5 if dtype == torch.float32 else 0.03)


def test_nothing_left_to_train_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"nothing to train of model.layers.0.self_attn.v_proj, which is \(32"
    ):
        adapted(toys.toy_llama(), ["q_proj", "v_proj"], 32)
