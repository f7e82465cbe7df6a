# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The number that an adapter's part is multiplied by, for methods that have one."""

from ..utils.warning import warn
from .merging.changes import changes_adapter, taken_out


class Scaled:
    """
    To be mixed into layers that keep a number per adapter in `scaling`.

    A layer says what the config asks for in `_configured_scaling`.
    """

    scaling: dict[str, float]

    def _configured_scaling(self, adapter: str) -> float:
        raise NotImplementedError

    @changes_adapter
    def set_scale(self, adapter: str, scale: float) -> None:
        """
        Set an adapter's scaling to a multiple of the one that its config says.

        Args:
            adapter: name; a layer that does not have it stays as it is.
            scale: multiple.
        """
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._configured_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """
        Multiply the scaling of the active adapters.

        Args:
            scale: factor.
        """
        for adapter in self.active_adapters:
            if adapter in self.scaling:  # the settings of adapters that follow are the owner's to change
                with taken_out([self], adapter):
                    self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """
        Undo `scale_layer` for the active adapters.

        Args:
            scale: factor to divide by; left out, the scaling becomes the one that the config says.
        """
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                configured = self._configured_scaling(adapter)
                with taken_out([self], adapter):
                    self.scaling[adapter] = configured if scale is None else self.scaling[adapter] / scale


class Unscaled:
    """To be mixed into layers whose adapters have no such number; callers of the released package may set it."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """
        Warn: there is no scale.

        Args:
            adapter: name; a layer that does not have it is silent.
            scale: 1 is silent too.
        """
        if self.has_adapter(adapter):
            self.scale_layer(scale)

    def scale_layer(self, scale: float) -> None:
        """
        Warn: there is no scale.

        Args:
            scale: 1 is silent.
        """
        if scale != 1:
            warn(f"{type(self).__name__} has no scale; it stays as it is")

    def unscale_layer(self, scale: float | None = None) -> None:
        """
        Warn: there is no scale.

        Args:
            scale: 1 is silent.
        """
        self.scale_layer(0.0 if scale is None else scale)
