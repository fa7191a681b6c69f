"""The adapter layer: a frozen linear layer with an update D = s C (U + A B) R (method.md).

Per adapter name it holds A (r, m) and B (m, r), trained (A not for init "identity"); C (out, r), R (r, in),
U (r, r) and the indices of the chosen rows and columns, frozen and saved with the adapter; and where C is not
made of columns of W, one of them (out, 1), as a sample of the weight.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import Parameter

from secura_ds import sharding
from secura_ds.adapter.config import SecuraConfig
from secura_ds.adapter.factors import Factors, choose_factors, empty_factors
from secura_ds.adapter.restrained import Update, restrained_linear, restrained_weight
from secura_ds.errors import UserError
from secura_ds.method import cabr, smagnorm


class Fp32BufferDict(BufferDict):
    """Buffers that stay fp32 when the model is cast: a sum of small products must not lose its digits."""

    def _apply(self, fn: Any, recurse: bool = True) -> Fp32BufferDict:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for key, exact in before.items():
            moved = self._buffers[key]
            if moved.dtype != exact.dtype:
                self._buffers[key] = exact.to(moved.device)
        return self


class SecuraLayer(BaseTunerLayer):
    """State of the adapters on one linear layer."""

    adapter_layer_names = ("secura_A", "secura_B")
    other_param_names = ("secura_C", "secura_R", "secura_U", "secura_rows", "secura_columns", "secura_sample")

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        self.base_layer = base_layer
        self.layer_name = layer_name
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.secura_A = nn.ParameterDict()
        self.secura_B = nn.ParameterDict()
        self.secura_C = BufferDict(persistent=True)
        self.secura_R = BufferDict(persistent=True)
        self.secura_U = Fp32BufferDict(persistent=True)
        self.secura_rows = BufferDict(persistent=True)
        self.secura_columns = BufferDict(persistent=True)
        self.secura_sample = BufferDict(persistent=True)
        self.configs: dict[str, SecuraConfig] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None
        self._restrained: tuple[Any, Tensor] | None = None
        self._eps: dict[str, tuple[tuple[int, int] | None, float]] = {}

    def update_layer(
        self,
        adapter_name: str,
        cur_rank: int,
        inner_rank: int,
        config: SecuraConfig,
        inference_mode: bool = False,
    ) -> None:
        """Create the state of one adapter: chosen from the base weight, or empty if saved weights follow.

        On the meta device there is no weight to choose from: the state then has shapes only, too.

        Raises:
            UserError: a rank too large for this layer, M1 on a 4-bit layer, or factors that cannot learn.
        """
        base = self.get_base_layer()
        if config.strategy == "M1" and sharding.is_quantized(base):
            raise UserError(
                f"strategy is 'M1', but {self.layer_name} is a 4-bit layer: an update smaller than a "
                "quantization step would vanish when it is folded into the weight; use strategy 'M2'"
            )
        make = empty_factors if config.factors_saved or base.weight.is_meta else choose_factors
        factors = make(base, self.layer_name, cur_rank, inner_rank, config)
        frozen_a = config.init == "identity"
        if frozen_a:
            self.frozen_peft_weight_names[adapter_name] = ("secura_A",)
        self._store(adapter_name, factors, sharded=sharding.is_sharded(base.weight), frozen_a=frozen_a)
        self.configs[adapter_name] = config
        read = [self.secura_A[adapter_name], self.secura_B[adapter_name]]
        read += [base.weight, base.bias] if config.apply == "forward" else []
        sharding.use_in_forward(self, read)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _store(self, adapter_name: str, factors: Factors, *, sharded: bool, frozen_a: bool) -> None:
        # DeepSpeed keeps fp32 masters of whatever it shards and wants one dtype for all of it.
        dtype = factors.C.dtype if sharded else torch.float32
        # Frozen, A is like any frozen weight; the identity is exact in every dtype.
        self.secura_A[adapter_name] = Parameter(factors.A.to(factors.C.dtype if frozen_a else dtype))
        zeros = torch.zeros(factors.A.shape[::-1], dtype=dtype, device=factors.A.device)
        self.secura_B[adapter_name] = Parameter(zeros)
        self.secura_C[adapter_name] = factors.C
        self.secura_R[adapter_name] = factors.R
        rank = len(factors.A)
        self.secura_U[adapter_name] = torch.zeros(rank, rank, dtype=torch.float32, device=factors.C.device)
        self.secura_rows[adapter_name] = factors.rows
        self.secura_columns[adapter_name] = factors.columns
        if factors.sample is not None:
            self.secura_sample[adapter_name] = factors.sample

    def core(self, adapter_name: str) -> Tensor:
        """U + A B (r, r) in fp32, differentiable in A and B."""
        A, B = self.secura_A[adapter_name], self.secura_B[adapter_name]
        return cabr.core(A, B, self.secura_U[adapter_name])

    def slice_update(self, adapter_name: str, weight: Tensor | None = None) -> sharding.SliceUpdate:
        """This layer's update as `sharding` folds and measures it. Collective where A and B are sharded."""
        config = self.configs[adapter_name]
        with torch.no_grad(), sharding.gathered([self.secura_A[adapter_name], self.secura_B[adapter_name]]):
            core = self.core(adapter_name)
        C, R = self.secura_C[adapter_name], self.secura_R[adapter_name]
        eps = self.known_eps(adapter_name) if weight is None else None
        weight = self.get_base_layer().weight if weight is None else weight
        return sharding.SliceUpdate(weight, C, core, R, config.scaling, config.restraint, eps)

    def piece(self, adapter_name: str) -> Tensor:
        """The first columns of W at `secura_columns`, (out, r) or (out, 1): what the weight was."""
        samples = self.secura_sample
        return samples[adapter_name] if adapter_name in samples else self.secura_C[adapter_name]

    def forget(self) -> None:
        """Drop what was derived from the base weight, after it was changed."""
        self._restrained = None
        self._eps.clear()

    def _constants(self, adapter_name: str) -> Update:
        config = self.configs[adapter_name]
        restraint = config.restraint or sharding.Restraint()
        return Update(
            self.secura_C[adapter_name],
            self.secura_R[adapter_name],
            config.scaling,
            restraint,
            self._absolute_eps(adapter_name, restraint),
        )

    def _absolute_eps(self, adapter_name: str, restraint: sharding.Restraint) -> float:
        if restraint.eps_relative is None:
            return float(smagnorm.absolute_eps(0.0, restraint.eps, None))
        eps = self.known_eps(adapter_name)
        if eps is None:
            mean = smagnorm.absolute_mean(self._read_weight())
            eps = float(smagnorm.absolute_eps(mean, None, restraint.eps_relative))
            self.remember_eps(adapter_name, eps)
        return eps

    def known_eps(self, adapter_name: str) -> float | None:
        """The absolute eps of the base weight as it is now, if a forward pass or a measurement has left it.

        Under ZeRO-3 it is known on every rank or on none.
        """
        key, eps = self._eps.get(adapter_name, (None, None))
        return eps if key == self._weight_key() else None

    def remember_eps(self, adapter_name: str, eps: float) -> None:
        """Keep `eps` until the base weight changes."""
        self._eps[adapter_name] = self._weight_key(), eps

    def _weight_key(self) -> tuple[int, int] | None:
        # A sharded weight changes only by a fold or a load, which call `forget`.
        frozen = self.get_base_layer().weight
        return None if sharding.is_sharded(frozen) else _version(frozen)


class Linear(nn.Module, SecuraLayer):
    """An adapted `nn.Linear` or bitsandbytes `Linear4bit`."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        layer_name: str,
        cur_rank: int,
        inner_rank: int,
        config: SecuraConfig,
    ) -> None:
        nn.Module.__init__(self)
        SecuraLayer.__init__(self, base_layer, layer_name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, cur_rank, inner_rank, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., in) to (..., out) with the active adapters' updates."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.secura_A]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if any(self.configs[name].apply == "forward" for name in active):
            return self._forward_restrained(x, active)
        y = self.base_layer(x, *args, **kwargs)
        for name in active:
            y = self._add_update(x, y, name)
        return y

    def _add_update(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        """y + s ((x R^T) core^T) C^T. Autograd keeps x R^T and (x R^T) core^T, not x."""
        C, R = self.secura_C[adapter_name], self.secura_R[adapter_name]
        core = self.core(adapter_name) * self.configs[adapter_name].scaling
        if not torch.is_autocast_enabled(x.device.type):
            x, core = x.to(R.dtype), core.to(R.dtype)
        h = x.reshape(-1, x.shape[-1]) @ R.T @ core.T
        flat = y.reshape(-1, y.shape[-1])
        added = (
            torch.addmm(flat, h, C.T) if flat.dtype == h.dtype == C.dtype else flat + (h @ C.T).to(flat.dtype)
        )
        return added.view_as(y)

    def _forward_restrained(self, x: Tensor, active: list[str]) -> Tensor:
        if len(active) > 1:
            raise UserError(
                f"adapters {active} are active together, but S-MagNorm in the forward pass limits one "
                "update: activate one of them with set_adapter, or train with smagnorm.apply 'merge'"
            )
        base = self.get_base_layer()
        if not self.training and not torch.is_grad_enabled() and not sharding.is_sharded(base.weight):
            weight = self._cached_weight(active[0])
            return F.linear(x.to(weight.dtype), weight, base.bias).to(x.dtype)
        update = self._constants(active[0])
        return restrained_linear(x, self._read_weight, base.bias, self.core(active[0]), update)

    def _read_weight(self) -> Tensor:
        return sharding.dequantized(self.get_base_layer())

    def _cached_weight(self, adapter_name: str) -> Tensor:
        """W+, formed at the first call in evaluation and again only after one of its parts has changed."""
        parts = [self.get_base_layer().weight, self.secura_A[adapter_name], self.secura_B[adapter_name]]
        parts += [getattr(self, f"secura_{name}")[adapter_name] for name in "CRU"]
        key = (adapter_name, *(_version(part) for part in parts))
        if self._restrained is None or self._restrained[0] != key:
            weight = self._read_weight()
            self._restrained = None
            update = self._constants(adapter_name)
            self._restrained = key, restrained_weight(weight, self.core(adapter_name), update)[0]
        return self._restrained[1]

    def train(self, mode: bool = True) -> Linear:
        """Switch between training and evaluation; training drops the W+ kept for evaluation."""
        if mode:
            self._restrained = None
        return super().train(mode)

    def merged_weight(self, adapter_name: str) -> Tensor:
        """W+ of method.md section 3 (W + D for apply 'never'), (out, in) in the base layer's dtype."""
        weight = self._read_weight().clone()
        sharding.fold_slices([self.slice_update(adapter_name, weight)])
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W+ in the place of the base weight; of several adapters, each on the result of the last.

        Raises:
            UserError: the base weight is sharded.
            ValueError: `safe_merge` and the result is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.secura_A:
                continue
            self._refuse_sharded()
            weight = self.merged_weight(name)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"adapter {name} makes {self.layer_name} not finite: it seems to be broken")
            self._replace_weight(weight)
            self.merged_adapters.append(name)
            self.forget()

    def _refuse_sharded(self) -> None:
        if sharding.is_sharded(self.get_base_layer().weight):
            raise UserError(
                "a model sharded by ZeRO-3 cannot be merged in place: save the adapter and merge on disk "
                "with launch/merge.py"
            )

    def _replace_weight(self, weight: Tensor) -> None:
        base = self.get_base_layer()
        quantized = sharding.is_quantized(base)
        if self._unmerged is None:
            # The exact weight comes back in `unmerge`; on the CPU it costs no accelerator memory.
            self._unmerged = base.weight if quantized else base.weight.detach().to("cpu", copy=True)
        if quantized:
            warnings.warn(
                f"{self.layer_name} is merged into 4 bits, which rounds the update away in part: "
                "launch/merge.py writes a checkpoint without that loss",
                stacklevel=2,
            )
            sharding.requantize(base, weight)
        else:
            with torch.no_grad():
                base.weight.copy_(weight)

    def unmerge(self) -> None:
        """Put the exact base weight back."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        if sharding.is_quantized(base):
            sharding.restore_quantized(base, self._unmerged)
        else:
            with torch.no_grad():
                base.weight.copy_(self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()
        self.forget()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """W+ - W, (out, in) in fp32."""
        return self.merged_weight(adapter_name).float() - self._read_weight().float()

    def __repr__(self) -> str:
        return "secura." + super().__repr__()


def _version(tensor: Tensor) -> tuple[int, int]:
    """Changes whenever the tensor is written in place or its storage is replaced."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
