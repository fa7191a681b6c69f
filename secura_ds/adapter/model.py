"""The PEFT tuner: puts adapter layers into a model, and takes care of saving, loading and merging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn import Parameter

from secura_ds import sharding
from secura_ds.adapter.config import SecuraConfig, by_layer
from secura_ds.adapter.layer import Linear, SecuraLayer
from secura_ds.adapter.loading import load_folded_weights, refuse_foreign_base
from secura_ds.adapter.saving import quantization_record
from secura_ds.errors import UserError


class SecuraModel(BaseTuner):
    """A model with SECURA adapters on its linear layers; made by `peft.get_peft_model`."""

    prefix = "secura_"
    tuner_layer_cls = SecuraLayer
    # The paper adapts q_proj and v_proj, as PEFT's LoRA does by default.
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _pre_injection_hook(self, model: nn.Module, config: SecuraConfig, adapter_name: str) -> None:
        sharding.keep_exact(model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's place for what a forward pass is given beside the inputs."""
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "adapter_names, an adapter for each row of a batch, is not supported by SECURA: use "
                "set_adapter and one batch an adapter"
            )
        yield

    def _create_and_replace(
        self,
        peft_config: SecuraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks = (
            by_layer(peft_config.rank_pattern, current_key, peft_config.cur_rank),
            by_layer(peft_config.inner_rank_pattern, current_key, peft_config.inner_rank),
        )
        if isinstance(target, Linear):
            target.update_layer(adapter_name, *ranks, config=peft_config)
            return
        _refuse_unsupported(self.model, target, current_key)
        layer = Linear(target, adapter_name, current_key, *ranks, config=peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if sharding.is_quantized(target):
            _record_quantization(peft_config, self.model)
        self._replace_module(parent, target_name, layer, target)

    def _check_new_adapter_config(self, config: SecuraConfig) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1 and any(c.strategy == "M1" for c in self.peft_config.values()):
            raise UserError(
                f"adapters {sorted(self.peft_config)} would share base weights that strategy 'M1' rewrites: "
                "keep one adapter, or use strategy 'M2'"
            )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Layers are made with the dtypes they need. PEFT's cast would widen C and R too, and copy x to fp32.
        if autocast_adapter_dtype:
            return
        for layer in secura_layers(self.model).values():
            dtype = sharding.compute_dtype(layer.get_base_layer())
            for container in (layer.secura_A, layer.secura_B):
                if adapter_name in container and container[adapter_name].dtype != dtype:
                    old = container[adapter_name]
                    narrow = Parameter(old.detach().to(dtype), requires_grad=old.requires_grad)
                    container[adapter_name] = narrow

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in secura_layers(self.model).values():
            layer._refuse_sharded()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SecuraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        if config.folded:
            for name, module in model.named_modules():
                if isinstance(module, Linear) and adapter_name in module.secura_A:
                    weight = state_dict[f"{name}.base_layer.weight"]
                    state[f"{name}.secura_W.{adapter_name}"] = weight
        empty = [name for name, tensor in state.items() if tensor.numel() == 0]
        if empty:
            raise UserError(
                f"{len(empty)} adapter tensors are empty on this rank, the first is {empty[0]}, because "
                "ZeRO-3 has sharded them: save with secura_ds.save_adapter, called on all ranks"
            )
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SecuraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        layers = {
            name: layer for name, layer in secura_layers(model).items() if adapter_name in layer.secura_A
        }
        refuse_foreign_base(layers, config, state_dict)
        state_dict = load_folded_weights(layers, config, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def secura_layers(model: nn.Module) -> dict[str, Linear]:
    """The adapter layers by their name in the base model, in the order of the model."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))
    return {name.removeprefix("base_model.model."): layer for name, layer in layers}


def _refuse_unsupported(model: nn.Module, target: nn.Module, name: str) -> None:
    plain = isinstance(target, nn.Linear) and type(target.weight) is Parameter
    if not plain and not sharding.is_quantized(target):
        raise UserError(
            f"target module {name} is a {type(target).__module__}.{type(target).__name__}: SECURA adapts "
            "torch.nn.Linear and bitsandbytes Linear4bit; leave it out of target_modules"
        )
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is not None and target.weight is getattr(embedding, "weight", None):
        raise UserError(
            f"target module {name} shares its weight with the input embedding: an adapter on it would "
            "change the embedding too, or break the tie when merged; leave it out of target_modules"
        )


def _record_quantization(config: SecuraConfig, model: nn.Module) -> None:
    """Note in the config what the adapter was trained against, for the merge on disk."""
    if config.factors_saved or config.quantized_modules is not None:
        return
    record = quantization_record(model)
    config.base_quantization, config.quantized_modules = (
        record["base_quantization"],
        record["quantized_modules"],
    )
