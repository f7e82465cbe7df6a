# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Cases that rest on what their file leaves out and a machine computes anew.

Where singular vectors or eigenvectors are free, be it in their signs only, processors choose different ones, and the
release reads such a file rightly only where it was written. So does this package.
"""

import torch

from peft import PeftModel, get_peft_model_state_dict

from .cases import Case


def reason_to_skip(name: str, case: Case | None, other: Case | None = None) -> str | None:
    """
    Say why a case cannot be as it was observed on this machine, if it cannot.

    Args:
        name: of a case or a script.
        case: the case, if it is one.
        other: a case on the same base whose file has what the file of this one leaves out.
    """
    if name == "llama/boft_butterfly" and torch.cuda.is_available():
        return "BOFT has one factor where there is no CUDA device, as it was when this was observed"
    if other is not None and not decomposes_as_recorded(other.fresh, other, "frod_V"):
        return "this machine computes other bases than that on which the file without them was written"
    if case is not None and "/adamss" in name and not decomposes_as_recorded(case.fresh, case, "adamss_newB"):
        return "this machine finds other singular vectors than that on which the clusters of the file were found"
    return None


def decomposes_as_recorded(fresh: PeftModel, case: Case, part: str) -> bool:
    """Whether a fresh adapter has the vectors, and the sizes, that the file of the case has."""
    found = get_peft_model_state_dict(fresh)
    sizes_fit = all(found[key].shape == tensor.shape for key, tensor in case.saved.items() if key in found)
    wanted = {key: tensor for key, tensor in case.saved.items() if part in key}
    return sizes_fit and all(torch.allclose(found[key], wanted[key], rtol=1e-4, atol=1e-4) for key in wanted)
