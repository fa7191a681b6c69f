"""An adapter folder as a merge sees it: its settings, and its tensors grouped by the module they adapt."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secura_ds.adapter.saving import QUANTIZATION_KEY
from secura_ds.checkpoint_files import StoredTensor, TensorFile, open_tensor_file
from secura_ds.errors import UserError
from secura_ds.merge.quantization import Quantization
from secura_ds.reading import parse_json, read_json_object

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

Parts = dict[str, StoredTensor]

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?:secura_(?P<secura>[A-Z]|rows|columns|sample)|lora_(?P<lora>A|B|magnitude_vector)(?:\.weight)?"
    r"|osf_svd_params\.(?P<osf>[USV]_low)|_osf_(?P<start>[USV]_low)_init)"
)

# Initialisations that leave the base alone; the others (PiSSA, OLoRA, LoftQ ...) change it first.
_PLAIN_LORA = (True, False, None, "gaussian", "eva", "orthogonal")
_REFUSED_LORA = (
    "fan_in_fan_out",
    "use_qalora",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "lora_bias",
)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk.

    Attributes:
        kind: "SECURA", "LORA" (DoRA and CorDA included) or "OSF".
        config: `adapter_config.json`, and what a LoRA's weights file says of 4-bit training.
        modules: for every adapted module, its parts by short name ("A", "B", "columns" ...).
        replacements: whole tensors (`modules_to_save`, biases) that take the place of the base's.
        quantization: how the base was held in training, None if not quantized.
        quantized_modules: names of the modules that were.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    modules: dict[str, Parts]
    replacements: dict[str, StoredTensor]
    quantization: Quantization | None
    quantized_modules: frozenset[str]

    @property
    def num_adapted(self) -> int:
        """How many tensors of the base the adapter changes or replaces."""
        return len(self.modules) + len(self.replacements)

    def fingerprint(self) -> list[str]:
        """Hashes of both files."""
        digests = []
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            with (self.folder / name).open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests


def open_adapter(folder: Path) -> AdapterFile:
    """Read an adapter's settings and the header of its weights.

    Raises:
        UserError: a file is missing or damaged, or the adapter is of a kind that cannot be merged here.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_NAME)
    kind = str(config.get("peft_type"))
    if kind not in ("SECURA", "LORA", "OSF"):
        raise UserError(
            f"{folder / CONFIG_NAME}: peft_type is {kind}; SECURA, LoRA, DoRA, CorDA and OSF adapters can be "
            "merged"
        )
    if kind == "LORA":
        _refuse_changed_base(folder, config)
    modules: dict[str, Parts] = {}
    replacements: dict[str, StoredTensor] = {}
    file = open_tensor_file(folder / WEIGHTS_NAME)
    config |= _quantization_record(file)
    for stored in file.tensors:
        name = stored.name.removeprefix(_PREFIX)
        match = _PART.fullmatch(name)
        if match:
            modules.setdefault(match["module"], {})[_short(match)] = stored
        else:
            replacements[name.replace(".base_layer.", ".")] = stored
    if not modules and not replacements:
        raise UserError(
            f"{folder / WEIGHTS_NAME} holds no tensor: the adapter was saved empty, save it again"
        )
    quantization = config.get("base_quantization")
    return AdapterFile(
        folder,
        kind,
        config,
        modules,
        replacements,
        Quantization.from_config(quantization, str(folder / CONFIG_NAME)) if quantization else None,
        frozenset(config.get("quantized_modules") or ()) if quantization else frozenset(),
    )


def _short(match: re.Match[str]) -> str:
    start = match["start"]
    return f"{start}_start" if start else str(match["secura"] or match["lora"] or match["osf"])


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    return read_json_object(path, remedy="copy the adapter again")


def _quantization_record(file: TensorFile) -> dict[str, Any]:
    """What the header of a LoRA's weights file says of 4-bit training."""
    text = file.metadata.get(QUANTIZATION_KEY, "{}")
    record = parse_json(str(text), f"{file.path}: {QUANTIZATION_KEY}", remedy="save the adapter again")
    if not isinstance(record, dict):
        raise UserError(f"{file.path}: {QUANTIZATION_KEY} is no JSON object; save the adapter again")
    return record


def _refuse_changed_base(folder: Path, config: dict[str, Any]) -> None:
    start = config.get("init_lora_weights", True)
    unknown = [name for name in _REFUSED_LORA if config.get(name)]
    if start not in _PLAIN_LORA:
        unknown.append(f"init_lora_weights={start!r}")
    if unknown:
        raise UserError(
            f"{folder / CONFIG_NAME}: {', '.join(unknown)} cannot be merged here; use PEFT's merge_and_unload"
        )
