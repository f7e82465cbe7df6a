# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What lets a Trainer freeze clusters."""

from typing import Any

from transformers import TrainerCallback


class AdamssAsaCallback(TrainerCallback):
    """
    Calls `update_and_allocate` of a model with AdaMSS at each step of the optimiser.

    Example:

        >>> from peft.tuners.adamss.asa_callback import AdamssAsaCallback
        >>> callbacks = [AdamssAsaCallback()]  # for Trainer(..., callbacks=callbacks)
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """
        Tell the model that a step was done.

        Args:
            args: not used.
            state: has the number of the step.
            control: not used.
            kwargs: the model, among others.
        """
        update = getattr(getattr(kwargs.get("model"), "base_model", None), "update_and_allocate", None)
        if update is not None:
            update(state.global_step)
