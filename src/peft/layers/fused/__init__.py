# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Layers computed as one, with the outputs and the gradients of the ordinary way.

A method declares what its adapters add (`terms.py`). Where nobody could see the difference (`path.py`), the layer and
its adapters are one function for autograd (`linear.py`): it keeps the input once, in the type that it comes in, and
computes again what is cheaper to compute than to keep. `switch.py` turns all of it off.
"""
