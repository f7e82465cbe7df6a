# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Merging adapters into base weights and taking them out again.

What counts is the base parameter, not the layer: a parameter that several layers share is visited once.
"""
