# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Adapters of experts that were linear layers, for models that keep the weights of all experts in one parameter.

Mixtral, Qwen-MoE and others had three linear layers per expert. transformers 5 holds the weights of all experts in two
parameters, `gate_up_proj` (experts, 2 * width, hidden) and `down_proj` (experts, hidden, width), and says in *weight
conversions* which layers have gone into which parameter. An adapter follows its weight. With the weights W1 and W3 of
an expert stacked, so are their deltas, and that is LoRA again, of twice the rank:

    [B1 A1]   [B1  0] [A1]
    [B3 A3] = [0  B3] [A3]

Nothing here is needed for models that transformers converts nothing for.
"""
