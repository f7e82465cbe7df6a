# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A model, changed: placing and replacing modules, switching adapters, copying layers, all or nothing."""
