# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What other libraries need done around parameters."""

from torch import nn

from peft.utils.integrations import init_empty_weights, skip_init_on_device


def test_a_function_that_needs_storage_gets_it_where_modules_are_made_empty() -> None:
    def device(module: nn.Module) -> str:
        return module.weight.device.type

    def make() -> nn.Linear:
        return nn.Linear(2, 2)

    def fail() -> None:
        raise KeyError

    real = skip_init_on_device(make)
    nested = skip_init_on_device(lambda: (make(), real(), make()))
    register = nn.Module.register_parameter
    with init_empty_weights():
        assert device(make()) == "meta"
        assert device(real()) == "cpu" and device(make()) == "meta"
        assert [device(module) for module in nested()] == ["cpu"] * 3
        try:
            skip_init_on_device(fail)()
        except KeyError:
            assert device(make()) == "meta"
    assert nn.Module.register_parameter is register
    assert real.__name__ == "make" and device(real()) == "cpu"
