"""Results as JSON: beside the run they are of, and only as long as it is that run."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from fastsae import files
from fastsae.modules import read_description

_SAE = "sae_crc32"


def plain(result: Any) -> Any:
    """A result of named values as what JSON can hold: NaN is null, per-document sums stay out."""
    if dataclasses.is_dataclass(result):
        named = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "sums"}
        return plain(named)
    if isinstance(result, dict):
        return {str(name): plain(value) for name, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [plain(value) for value in result]
    return None if isinstance(result, float) and not math.isfinite(result) else result


def write(run: Path, name: str, result: Any, **options: Any) -> dict[str, Any]:
    """Write RUN/name.json with what it was measured with; returns what is written."""
    content = {_SAE: _checksum(run), "options": options, **plain(result)}
    files.write_json(run / f"{name}.json", content)
    return content


def read(run: Path, name: str) -> dict[str, Any] | None:
    """Read what `write` left; None if there is nothing, or if it is of another SAE: that run was trained again."""
    path = run / f"{name}.json"
    if not path.is_file():
        return None
    content = files.read_object(path)
    if _SAE not in content:
        raise ValueError(f"{path} is damaged: expected a result of fastsae; delete it and measure again")
    return content if content[_SAE] == _checksum(run) else None


def _checksum(run: Path) -> int:
    return read_description(run / "sae")["weights_crc32"]
