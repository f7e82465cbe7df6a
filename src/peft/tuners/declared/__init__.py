# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Methods as declarations: a config and pure functions of tensors, out of which the classes of layers and model are made.

`@method` reads the functions of a class, takes the rule that they belong to, and makes the classes; see there.
"""
