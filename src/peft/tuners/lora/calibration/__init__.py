# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What has to be computed on data before, or after, an adapter is put into a model: for starts that learn from it."""
