# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
OSF: all but the leading singular directions of a weight are trained, and kept orthogonal to these.

Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", 2025,
arXiv:2504.07097.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("OSF", "peft.tuners.osf.config:OSFConfig", "peft.tuners.osf.model:OSFModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["OSFConfig"],
        ".layer": ["Linear", "OSFLayer"],
        ".model": ["OSFModel"],
    },
)
