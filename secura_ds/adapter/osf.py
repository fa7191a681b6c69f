"""OSF of PEFT, with what it needs beside PEFT: gradients that stay projected, and a rank that is left."""

from __future__ import annotations

from peft.tuners.osf import OSFLayer
from torch import nn

from secura_ds.errors import UserError

# Buffers that follow from the base weight when the adapter is loaded, and that a merge does not need.
NOT_SAVED = ("_osf_U_high", "_osf_V_high")


def prepare_osf(model: nn.Module, adapter_name: str = "default") -> None:
    """Project the gradients of what is trained now, in every OSF layer.

    PEFT hooks the projection to the parameters it made first. Where it widens them to fp32 afterwards it puts
    new ones in their place, and these would be trained in the directions that OSF keeps.

    Raises:
        UserError: no direction of a layer is left to train; names it.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, OSFLayer) or adapter_name not in layer.osf_svd_params:
            continue
        smaller = min(layer.in_features, layer.out_features)
        if layer.effective_rank[adapter_name] >= smaller:
            own, shape = name.removeprefix("base_model.model."), (layer.out_features, layer.in_features)
            raise UserError(
                f"adapter.effective_rank leaves nothing to train of {own}, which is {shape}: set it below "
                f"{smaller}, or to a share such as 0.5"
            )
        layer._detach_hooks()
        layer._attach_hooks(adapter_name)
