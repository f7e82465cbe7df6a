# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What configs are made of: fields that many share, checks, files, comparison. No torch in here."""
