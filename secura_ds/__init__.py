"""SECURA adapters for models sharded by DeepSpeed ZeRO-3."""
