# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Prefixes in the layouts that models had before the cache classes of transformers."""

import torch

from peft.utils.constants import bloom_model_postprocess_past_key_value, starcoder_model_postprocess_past_key_value


PREFIX = [torch.randn(2, 3, 4, 5, 6) for _ in range(2)]


def test_gpt_bigcode_has_one_head_with_keys_and_values_side_by_side():
    found = starcoder_model_postprocess_past_key_value(PREFIX)
    assert [tuple(layer.shape) for layer in found] == [(3, 5, 12)] * 2
    for layer, (keys, values) in zip(found, PREFIX, strict=True):
        assert torch.equal(layer[..., :6], keys[:, 0]) and torch.equal(layer[..., 6:], values[:, 0])


def test_bloom_takes_the_first_half_as_keys():
    found = bloom_model_postprocess_past_key_value(PREFIX)
    assert [[tuple(tensor.shape) for tensor in layer] for layer in found] == [[(12, 6, 5), (12, 5, 6)]] * 2
    for layer, keys, values in zip(found, PREFIX[0], PREFIX[1], strict=True):
        assert torch.equal(layer[0].flatten(), keys.transpose(1, 2).flatten())
        assert torch.equal(layer[1], values.flatten(0, 1))
