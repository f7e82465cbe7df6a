# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Whether the vocabulary of a model has been resized since it was loaded."""

import json
import os
from typing import Any

from torch import nn


def vocabulary_has_grown(model: nn.Module, config: Any) -> bool:
    """
    Compare the model's vocabulary with that of the base model as it was published. Nothing is downloaded.

    Args:
        model: a model with adapters.
        config: the adapter's config, which names the base model.

    Returns:
        True if the sizes differ; False if they are equal or the published size is not known.
    """
    now = _vocabulary_size(_as_dict(getattr(model, "config", None)))
    published = _vocabulary_size(_published_config(getattr(config, "base_model_name_or_path", None), config.revision))
    return now is not None and published is not None and now != published


def _as_dict(config: Any) -> dict[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _vocabulary_size(config: dict[str, Any]) -> int | None:
    """Read `vocab_size`, which multimodal models keep in the config of their text model."""
    nested = config.get("text_config")
    return config.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, dict) else None)


def _published_config(name_or_path: str | None, revision: str | None) -> dict[str, Any]:
    if not name_or_path:
        return {}
    path = os.path.join(name_or_path, "config.json")
    if not os.path.isfile(path):
        path = _cached_config(name_or_path, revision)
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _cached_config(hub_id: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except HFValidationError:  # a path that does not exist here
        return None
    return path if isinstance(path, str) else None
