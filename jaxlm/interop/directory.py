"""Names and paths of the files in a Hugging Face directory, and a function that writes JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"


def path_inside(directory: Path, name: str) -> Path:
    """The path of the file ``name`` in ``directory``, with symbolic links resolved.

    A symbolic link must point to a file inside the directory. There is one exception: in the cache of the Hugging Face
    hub, ``<model>/snapshots/<revision>/<name>`` is a link to a file in ``<model>/blobs/``. So if ``directory`` is
    ``<model>/snapshots/<revision>``, a link may point to any file in ``<model>``.

    Raises:
        ValueError: ``name`` is not a plain file name, or the file is a link to a file outside the directory.
        FileNotFoundError: the file is missing or is not a regular file.
    """
    if Path(name).name != name or "\\" in name:
        raise ValueError(
            f"{directory}: {name!r} is not a plain file name: only files directly in the directory are read"
        )
    root = directory.resolve()
    path = (root / name).resolve()
    hub_folder = root.parent.parent
    is_in_hub_cache = root.parent.name == "snapshots" and (hub_folder / "blobs").is_dir()
    allowed_root = hub_folder if is_in_hub_cache else root
    if not path.is_relative_to(allowed_root):
        raise ValueError(f"{directory / name} is a link out of the directory, to {path}: replace the link by a copy")
    if not path.is_file():
        raise FileNotFoundError(f"{directory / name} is missing or not a regular file")
    return path


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as a JSON file with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
