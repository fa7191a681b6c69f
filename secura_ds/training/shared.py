"""What calibration wrote and chose, shared by runs that would write and choose the same."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from secura_ds.calibration import Calibration
from secura_ds.files import save_tensors
from secura_ds.ranks import on_main

logger = logging.getLogger(__name__)
_PARTS = ("factors", "outputs")


@dataclass(frozen=True)
class SharedCalibration:
    """The files of one backbone, adapter and task; the first run that needs them writes them.

    Several runs may come to it at once: each writes what the others do.
    """

    factors: Path | None
    """What `Calibration` holds of every layer, and the text's tokens (safetensors); None shares text only."""
    text: Path | None
    """The text alone (JSON lines), for other adapters and tasks, too; None where the recipe names its own."""

    def exists(self) -> bool:
        """Whether the factors are there and can be read. Collective."""
        return on_main(self._readable)

    def read(self, tokenizer: Any) -> tuple[Calibration, float]:
        """What another run has chosen, and how many seconds it took."""
        assert self.factors is not None
        with safe_open(str(self.factors), framework="pt") as file:
            seconds = float(file.metadata()["seconds"])
        tensors = load_file(self.factors)
        ids = tensors.pop("token_ids")
        parts: dict[str, Any] = {part: {} for part in _PARTS}
        for key, tensor in tensors.items():
            part, name = key.split("/")
            parts[part][name] = tensor
        texts = [tokenizer.decode(row) for row in ids.tolist()]
        return Calibration(texts=texts, token_ids=ids, **parts), seconds

    def keep(self, calibration: Calibration, seconds: float) -> None:
        """Write down what a run has chosen. Main process only."""
        if self.text is not None and not self.text.is_file():
            calibration.save(self.text)
        if self.factors is None:
            return
        parts = {part: getattr(calibration, part) for part in _PARTS}
        tensors = {f"{part}/{name}": tensor for part in _PARTS for name, tensor in parts[part].items()}
        tensors["token_ids"] = calibration.token_ids
        save_tensors(self.factors, tensors, metadata={"seconds": f"{seconds:.3f}"})

    def found_text(self) -> Path | None:
        """The text, where the backbone has written it for another run. Collective."""
        text = self.text
        return text if text is not None and on_main(text.is_file) else None

    def _readable(self) -> bool:
        if self.factors is None:
            return False
        try:
            with safe_open(str(self.factors), framework="pt"):
                return True
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s): choosing its contents anew", self.factors, error)
            return False
