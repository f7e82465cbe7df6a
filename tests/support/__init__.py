# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What tests of several rooms share: models, checks, and the tables behind the products."""
