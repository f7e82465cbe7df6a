# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A model, read: walking around adapters, matching names, kinds of layers, offloaded weights."""
