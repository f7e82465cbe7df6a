# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The model card that is saved beside an adapter."""

import os
from collections.abc import Callable, Mapping, Sequence

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..config import PeftConfig, interface_version
from ..registry import TaskType
from ..utils.files import write_atomically


# what the hub calls the tasks
_PIPELINES = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
}

_TEXT = """---
{data}
---

# Adapter for {base}

This folder holds an adapter: a small set of tensors to be loaded on top of its base model.

- Base model: {base}
- Method: {methods}
- Trained parameters: {trainable:,d} of {total:,d}
- Saved with peft {version}

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


def write_model_card(
    folder: str | os.PathLike,
    base_model: nn.Module,
    configs: Sequence[PeftConfig],
    count: Callable[[], tuple[int, int]],
) -> None:
    """
    Write `README.md`; if there is one, its text stays as it is, and only metadata are added.

    Args:
        folder: folder to write to.
        base_model: the base model.
        configs: configs of its adapters.
        count: gives the number of parameters that are trained, and that of all. It takes a while, and is asked only if
            there is no text yet.
    """
    base = next((c.base_model_name_or_path for c in configs if c.base_model_name_or_path), None)
    own_name = _own_name(base_model)
    methods = sorted({getattr(c.peft_type, "value", str(c.peft_type)) for c in configs})
    path = os.path.join(folder, "README.md")
    present = os.path.isfile(path)
    card = ModelCard.load(path, ignore_metadata_errors=True) if present else None
    data = card.data if present else ModelCardData()
    data.library_name = "peft"
    data.pipeline_tag = data.get("pipeline_tag") or _PIPELINES.get(configs[0].task_type)
    tags = {*(data.get("tags") or ()), *(method.lower() for method in methods)}
    tags |= set(getattr(base_model, "model_tags", None) or ())  # such as trainers put there
    if hasattr(base_model, "config") and type(base_model).__module__.startswith("transformers."):
        tags.add("transformers")
    if _is_on_hub(own_name):  # a path means nothing to anybody else, and the hub refuses it
        data.base_model = own_name
        tags = {tag for tag in tags if not tag.startswith("base_model:")} | {f"base_model:adapter:{own_name}"}
    data.tags = sorted(tags)
    if present:
        text = str(card)
    else:
        trainable, total = count()
        text = _TEXT.format(
            data=data.to_yaml(),
            base=base or own_name or type(base_model).__name__,
            methods=", ".join(methods),
            trainable=trainable,
            total=total,
            version=interface_version(),
        )

    def write(target: str) -> None:
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)

    write_atomically(path, write)


def _own_name(base_model: nn.Module) -> str | None:
    """Give the name that a model was loaded by; what a config of an adapter calls it may be anything."""
    config = getattr(base_model, "config", None)
    if config is None:
        return None
    name = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    name = getattr(base_model, "name_or_path", None) or name
    return name if isinstance(name, str) and name else None


def _is_on_hub(base: str | None) -> bool:
    """Whether the name of a base model can be a hub id; a folder of that name is taken for the model."""
    if not base or os.path.isdir(base):
        return False
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return True
