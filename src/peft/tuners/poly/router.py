# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How much of each skill a task has."""

import torch
from torch import nn

from ...utils.error import PeftValueError
from .config import PolyConfig


EPS = 1e-12


class Router(nn.Module):
    """Base of what tells mixtures of skills."""

    def forward(self, task_ids: torch.Tensor) -> torch.Tensor:
        """
        Tell the mixtures of tasks.

        Args:
            task_ids: (batch,)
        """
        raise NotImplementedError


class PolyRouter(Router):
    """
    One trained number per task, part of the features and skill.

    Args:
        config: says how many of each there are.
        device: where the numbers are made.

    Example:

        >>> import torch
        >>> from peft import PolyConfig
        >>> from peft.tuners.poly.router import PolyRouter
        >>> router = PolyRouter(PolyConfig(n_tasks=3, n_skills=2)).eval()
        >>> router(torch.tensor([2, 0])).shape
        torch.Size([2, 1, 2])
    """

    def __init__(self, config: PolyConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.n_tasks, self.n_splits, self.n_skills = config.n_tasks, config.n_splits, config.n_skills
        logits = torch.empty(config.n_tasks, config.n_splits * config.n_skills, device=device)
        self.module_logits = nn.Parameter(logits)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start nearly even."""
        self.module_logits.uniform_(-1e-3, 1e-3)

    def forward(self, task_ids: torch.Tensor) -> torch.Tensor:
        """
        Tell the mixtures of tasks; while training, with noise as of relaxed choices.

        Args:
            task_ids: (batch,)

        Returns:
            (batch, splits, skills), which sum to 1 over the skills.
        """
        logits = self.module_logits[task_ids.to(self.module_logits.device)]
        logits = logits.view(-1, self.n_splits, self.n_skills)
        if self.training:
            tiny = torch.finfo(logits.dtype).eps
            drawn = torch.rand_like(logits).clamp(tiny, 1 - tiny)
            logits = logits + torch.log(drawn) - torch.log1p(-drawn)
        shares = torch.sigmoid(logits)
        return shares / (shares.sum(dim=-1, keepdim=True) + EPS)


def check_router(config: PolyConfig) -> None:
    """
    Refuse a kind of router that there is not.

    Args:
        config: an adapter's config.

    Raises:
        PeftValueError: for such a one.
    """
    if config.poly_type != "poly":
        raise PeftValueError(f'poly_type must be "poly", found {config.poly_type!r}')


def get_router(poly_config: PolyConfig, device: torch.device | str | None = None) -> PolyRouter:
    """
    Make the router that a config asks for.

    Args:
        poly_config: the config.
        device: where its numbers are made.

    Raises:
        PeftValueError: for a kind of router that there is not.
    """
    check_router(poly_config)
    return PolyRouter(poly_config, device)
