# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Writing an adapter and reading it again."""

from collections.abc import Iterator
from tempfile import TemporaryDirectory

from case import Row, case, ours, released
from measuring import wall_seconds
from models import make_effective, many_linears


@case(
    "files",
    unit="wall s",
    rounds=5,
    rows=[
        Row("save_pretrained, 256 layers, r=16", ours("save"), released("save")),
        Row("PeftModel.from_pretrained, 256 layers, r=16", ours("load"), released("load")),
    ],
)
def save_and_load() -> Iterator[dict[str, float]]:
    """One adapter on 256 layers 64 x 64."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(many_linears(256, 64), LoraConfig(r=16, target_modules=["query", "value"]))
    make_effective(model)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        PeftModel.from_pretrained(many_linears(256, 64), folder)
        while True:
            fresh = many_linears(256, 64)
            yield {
                "save": wall_seconds(lambda: model.save_pretrained(folder)),
                "load": wall_seconds(lambda base=fresh: PeftModel.from_pretrained(base, folder)),
            }
