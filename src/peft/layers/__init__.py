# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What is put into a model: adapter layers and their rules, merging, wrappers of saved modules and tokens."""
