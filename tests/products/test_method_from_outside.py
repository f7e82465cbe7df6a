# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A method that is declared here, outside of the package, goes through the product tests as it stands."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_all_or_nothing as failures
import test_call_sequences as sequences
import test_methods as product
import test_weight_tying_matrix as ties
from support.method_options import OPTIONS, layered_methods
from support.registry import methods_put_back
from torch import nn

from peft.methods import Shape, Tensors, Trained, TyingConfig, method
from peft.utils import register_peft_method


@dataclass
class TiltConfig(TyingConfig):
    """One number per output and one per input."""

    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "TILT"


with methods_put_back():  # other test files ask for the methods that there are

    @method("TILT", TiltConfig)
    class Tilt:
        """W + u v'."""

        trained = ("outputs", "inputs")

        def tensors(shape: Shape, c: TiltConfig) -> dict[str, Trained]:
            """Start u at zero."""
            return {"outputs": Trained((shape[0], 1)), "inputs": Trained((1, shape[1]), nn.init.normal_)}

        def delta(t: Tensors, shape: Shape, c: TiltConfig) -> object:
            """Multiply."""
            return t.outputs @ t.inputs


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Enter the method for one test."""
    with methods_put_back():
        register_peft_method(name="tilt", config_cls=TiltConfig, model_cls=Tilt.Model)
        yield


def test_it_needs_nothing_but_to_be_registered() -> None:
    assert "TILT" in layered_methods() and "TILT" not in OPTIONS
    assert "TILT" in {cell.method for cell in product.cells()}
    assert "TILT" in ties.methods()
    assert "TILT" in {cell.methods[0] for cell in sequences.cells()}


@pytest.mark.filterwarnings("error::peft.PeftWarning")
@pytest.mark.parametrize("stage", product.STAGES)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("linear", "float32"), ("linear", "bfloat16"), ("linear_no_bias", "float32")]
)
def test_stages(kind: str, dtype: str, stage: str, tmp_path: Path) -> None:
    cell = product.Cell("TILT", kind, dtype)
    assert cell.is_declared()
    product.STAGES[stage](cell, tmp_path)


@pytest.mark.parametrize("kind", ["conv2d", "attention"])
def test_other_kinds_are_refused(kind: str) -> None:
    cell = product.Cell("TILT", kind, "float32")
    assert not cell.is_declared()
    product.test_kind_is_refused(cell)


@pytest.mark.parametrize("route", ties.ROUTES)
@pytest.mark.parametrize("name", ["llama", "plain_two_linears"])
def test_ties(name: str, route: str, tmp_path: Path) -> None:
    ties.test_ties_hold(ties.Cell("TILT", name, route), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_sequences(tied: bool) -> None:
    sequences.run(sequences.Cell(("TILT", "TILT"), tied), examples=4, steps=10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entrance", [*failures.FOR_ALL, *failures.FOR_LAYERS])
def test_failures(entrance: str, tmp_path: Path) -> None:
    failures.check("TILT", entrance, tmp_path, wide=False)
