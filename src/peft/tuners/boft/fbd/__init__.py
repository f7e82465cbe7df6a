# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Kept for its import path: block-diagonal matrices need no extension of their own here."""
