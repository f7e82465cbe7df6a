# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The model card that is saved beside an adapter."""

import os
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from .utils.files import write_atomically


if TYPE_CHECKING:
    from .peft_model import PeftModel


_TEXT = """---
{data}
---

# Adapter for {base}

This folder holds an adapter: a small set of tensors to be loaded on top of its base model.

- Base model: {base}
- Method: {methods}
- Trained parameters: {trainable:,d} of {total:,d}

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


def write_model_card(model: "PeftModel", folder: str) -> None:
    """
    Write `README.md`; if there is one, only its metadata are brought up to date.

    Args:
        model: the model whose adapters are saved.
        folder: folder to write to.
    """
    configs = list(model.peft_config.values())
    base = next((c.base_model_name_or_path for c in configs if c.base_model_name_or_path), None)
    base = base or getattr(model.get_base_model(), "name_or_path", None) or None
    methods = sorted({getattr(c.peft_type, "value", str(c.peft_type)) for c in configs})
    data = ModelCardData(library_name="peft", base_model=base, tags=[method.lower() for method in methods])
    path = os.path.join(folder, "README.md")
    if os.path.isfile(path):
        card = ModelCard.load(path, ignore_metadata_errors=True)
        card.data.library_name = "peft"
        card.data.base_model = base or card.data.get("base_model")
        card.data.tags = sorted({*(card.data.get("tags") or ()), *data.tags})
        text = str(card)
    else:
        trainable, total = model.get_nb_trainable_parameters()
        text = _TEXT.format(
            data=data.to_yaml(),
            base=base or type(model.get_base_model()).__name__,
            methods=", ".join(methods),
            trainable=trainable,
            total=total,
        )

    def write(target: str) -> None:
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)

    write_atomically(path, write)
