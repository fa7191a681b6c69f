"""Streaming merge of an adapter into a checkpoint on disk: base shards in, merged shards out.

Never holds more than one tensor, a part of its update and a few row blocks. Untouched tensors are copied byte
for byte.
"""

from secura_ds.merge.check import check_strict_load
from secura_ds.merge.merge import MergeReport, merge, require_plain

__all__ = ["MergeReport", "check_strict_load", "merge", "require_plain"]
