# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Ties between weights: found, recorded, settled and reported here, and nowhere else."""
