# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Golden checkpoints: adapters saved by release 0.21.2, what was observed with them, and the reader of both."""
