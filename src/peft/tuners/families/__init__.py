# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What several methods share."""
