# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Adapters in files: keys, tensors, files, what was loaded, vocabularies and conversions."""
