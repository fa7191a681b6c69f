"""Spectra, changes and the limiter against what dense arithmetic says; one layer at a time from disk."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from merge_toys import SMAGNORM, TARGETS, make_base, make_quantized, make_secura, weights

from secura_ds import sharding
from secura_ds.adapter.config import SecuraConfig
from secura_ds.analysis import LEVELS, limiter_statistics, norm_statistics, spectra, weight_changes
from secura_ds.analysis.limiter import BINS
from secura_ds.analysis.weights import AdaptedWeight, adapted_weights
from secura_ds.checkpoint_files import open_checkpoint
from secura_ds.errors import UserError
from secura_ds.merge.adapter_file import AdapterFile, open_adapter
from secura_ds.method import cabr
from secura_ds.method.smagnorm import limiter, ratio, s_magnorm


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("toy")
    base = make_base(folder / "base")
    return base, make_secura(folder / "adapter", base)


def dense(base: Path, adapter: AdapterFile, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """W and D of one layer in fp32."""
    part = {name: stored.read() for name, stored in adapter.modules[module].items()}
    core = cabr.core(part["A"], part["B"], part["U"])
    return weights(base)[f"{module}.weight"].float(), cabr.update(part["C"], core, part["R"], 2.0)


def test_weights_come_in_fp32_before_and_after(toy: tuple[Path, Path]) -> None:
    base, adapter = open_checkpoint(toy[0]), open_adapter(toy[1])
    found = list(adapted_weights(base, adapter))
    assert [weight.module for weight in found] == list(adapter.modules) and len(found) == len(TARGETS)
    for weight in found:
        W, D = dense(toy[0], adapter, weight.module)
        assert torch.equal(weight.before, W) and weight.after.dtype == torch.float32
        assert torch.allclose(weight.after, s_magnorm(W, D), atol=1e-6)


def test_after_4_bit_training_the_start_is_what_training_saw(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", hidden_size=64)
    adapter, held, _ = make_quantized(tmp_path, base)
    for weight in adapted_weights(open_checkpoint(base), open_adapter(adapter)):
        assert torch.equal(weight.before, held[f"{weight.module}.weight"].float())
        assert not torch.equal(weight.before, weights(base)[f"{weight.module}.weight"].float())


def test_a_spectrum_known_by_hand() -> None:
    before, after = torch.diag(torch.tensor([3.0, 4.0])), torch.tensor([[0.0, 12.0], [5.0, 0.0], [0.0, 0.0]])
    ((name, change),) = spectra([AdaptedWeight("q", before, after)])
    assert name == "q" and change.before == pytest.approx((5.0, 3.5, 4.0))
    assert change.after == pytest.approx((13.0, 8.5, 12.0))


def test_changes_known_by_hand_and_as_training_logs_them(toy: tuple[Path, Path]) -> None:
    weight = AdaptedWeight("q", torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]]))
    ((_, change),) = weight_changes([weight])
    assert change == pytest.approx((0.1, 0.5 / math.sqrt(2), 0.5))
    base, adapter = open_checkpoint(toy[0]), open_adapter(toy[1])
    config = SecuraConfig.from_pretrained(str(toy[1]))
    for name, found in weight_changes(adapted_weights(base, adapter)):
        assert found.relative_change == pytest.approx(
            logged(toy[0], adapter, name, config).relative_change, rel=1e-5
        )


def logged(base: Path, adapter: AdapterFile, module: str, config: SecuraConfig) -> sharding.Statistics:
    """What `statistics.jsonl` says of the layer."""
    part = {name: stored.read() for name, stored in adapter.modules[module].items()}
    core = cabr.core(part["A"], part["B"], part["U"])
    W = weights(base)[f"{module}.weight"].float()
    update = sharding.SliceUpdate(W, part["C"], core, part["R"], config.scaling, config.restraint)
    return sharding.slice_statistics([update])[0]


@pytest.mark.parametrize("relative", [False, True])
def test_the_limiters_distribution(tmp_path: Path, relative: bool) -> None:
    settings = {**SMAGNORM, "eps": None, "eps_relative": 1.0} if relative else SMAGNORM
    base = make_base(tmp_path / "base")
    adapter = open_adapter(make_secura(tmp_path / "adapter", base, smagnorm=settings))
    config = SecuraConfig.from_pretrained(str(adapter.folder))
    for name, found in limiter_statistics(open_checkpoint(base), adapter):
        W, D = dense(base, adapter, name)
        eps = float(W.abs().mean()) if relative else 1e-10
        L = ratio(W, D, eps)
        M = limiter(L, L.max(), 6.0)
        expected = np.quantile(M.numpy(), LEVELS, method="inverted_cdf")
        assert found.quantiles == pytest.approx(expected.tolist(), abs=1 / BINS)
        assert (found.smallest, found.largest) == pytest.approx((float(M.min()), float(M.max())))
        statistics = logged(base, adapter, name, config)
        assert found.mean == pytest.approx(statistics.limiter_mean, rel=1e-6)
        assert found.ratio_max == pytest.approx(statistics.ratio_max, rel=1e-5)
        assert list(found.quantiles) == sorted(found.quantiles) and 1 < found.smallest < found.largest < 2


def test_an_adapter_without_a_limiter_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_secura(tmp_path / "adapter", base, smagnorm={**SMAGNORM, "apply": "never"})
    with pytest.raises(UserError, match=r"smagnorm\.apply is 'never', so there is no limiter"):
        list(limiter_statistics(open_checkpoint(base), open_adapter(adapter)))


def test_an_adapter_of_another_base_is_refused(toy: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", seed=7)
    with pytest.raises(UserError, match="trained on other weights"):
        list(adapted_weights(open_checkpoint(other), open_adapter(toy[1])))


def test_norms_known_by_hand() -> None:
    found = norm_statistics([1.0, 2.0, 6.0])
    assert (found.mean, found.variance, found.smallest, found.largest, found.steps) == (
        3.0,
        14 / 3,
        1.0,
        6.0,
        3,
    )
    assert (found.range, found.deviation) == (5.0, pytest.approx(math.sqrt(14 / 3)))
    with pytest.raises(ValueError, match="no gradient norm"):
        norm_statistics([])
