"""Weights that are sharded by DeepSpeed ZeRO-3 or packed by bitsandbytes: the one place that knows how."""

from secura_ds.sharding.fold import (
    Restraint,
    SliceUpdate,
    Statistics,
    absolute_epsilons,
    fold_slices,
    slice_statistics,
)
from secura_ds.sharding.local import local_part, part_of_whole, put_local_parts, whole_of_part
from secura_ds.sharding.optimizer import load_optimizer_state, master, optimizer_state
from secura_ds.sharding.partition import (
    assert_partitioned,
    full_shape,
    gathered,
    gathered_forward,
    is_available,
    is_sharded,
    set_parameter,
    use_in_forward,
    whole,
    zero_,
)
from secura_ds.sharding.quantized import (
    compute_dtype,
    dequantized,
    is_quantized,
    keep_exact,
    requantize,
    restore_quantized,
)
from secura_ds.sharding.slices import Slice, local_slice
from secura_ds.sharding.streaming import load_parameters, load_slices
from secura_ds.sharding.unsupported import refuse_unsupported

__all__ = [
    "Restraint",
    "Slice",
    "SliceUpdate",
    "Statistics",
    "absolute_epsilons",
    "assert_partitioned",
    "compute_dtype",
    "dequantized",
    "fold_slices",
    "full_shape",
    "gathered",
    "gathered_forward",
    "is_available",
    "is_quantized",
    "is_sharded",
    "keep_exact",
    "load_optimizer_state",
    "load_parameters",
    "load_slices",
    "local_part",
    "local_slice",
    "master",
    "optimizer_state",
    "part_of_whole",
    "put_local_parts",
    "refuse_unsupported",
    "requantize",
    "restore_quantized",
    "set_parameter",
    "slice_statistics",
    "use_in_forward",
    "whole",
    "whole_of_part",
    "zero_",
]
