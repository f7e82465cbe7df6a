# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Write a merged model to safetensors, GGUF and ONNX, and reopen each file with a reader that does not know peft.

    python examples/tied_embeddings/export.py outputs/tied_embeddings/tiny/merged
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft.export import export_gguf, export_onnx, export_safetensors


COLUMNS = ("file", "MiB", "embedding", "head", "largest logit difference")
TOLERANCE = 1e-3


def safetensors_row(model: torch.nn.Module, folder: Path, ids: torch.Tensor, expected: torch.Tensor) -> tuple:
    """Write, reopen with transformers, and look into the header by hand."""
    path = export_safetensors(model, folder) / "model.safetensors"
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    again = AutoModelForCausalLM.from_pretrained(folder)
    difference = (again(ids).logits - expected).abs().max().item()
    has_head = any(key.startswith("lm_head.") for key in header)
    return path, "in the file", "in the file" if has_head else "tied, says config.json", difference


def gguf_row(
    model: torch.nn.Module, tokenizer: object, folder: Path, ids: torch.Tensor, expected: torch.Tensor
) -> tuple:
    """Write, list the tensors with the package gguf, and reopen with transformers."""
    from gguf import GGUFReader

    path = export_gguf(model, folder / "model.gguf", tokenizer)
    names = [tensor.name for tensor in GGUFReader(path).tensors]
    again = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
    difference = (again(ids).logits - expected).abs().max().item()
    return path, "in the file", "in the file" if "output.weight" in names else "tied, no output.weight", difference


def onnx_row(model: torch.nn.Module, folder: Path, ids: torch.Tensor, expected: torch.Tensor) -> tuple:
    """Write, count the matrices of the embedding's size, and run with onnxruntime."""
    import onnx
    import onnxruntime

    path = export_onnx(model, folder / "model.onnx", {"input_ids": ids})
    size = sorted(model.get_input_embeddings().weight.shape)
    graph = onnx.load(path, load_external_data=False).graph
    count = sum(sorted(tensor.dims) == size for tensor in graph.initializer)
    (logits,) = onnxruntime.InferenceSession(str(path)).run(None, {"input_ids": ids.numpy()})
    difference = (torch.from_numpy(logits) - expected).abs().max().item()
    return path, "in the file", "in the file" if count > 1 else "tied, one initializer", difference


@torch.no_grad()
def main() -> int:
    """Export, reopen, print a table; 1 if a file holds another model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a merged model, such as the demo leaves behind")
    parser.add_argument("--out", type=Path, help="folder for the files (default: `exported` beside the model)")
    arguments = parser.parse_args()
    out = arguments.out or Path(arguments.model).parent / "exported"
    for kind in ("safetensors", "gguf", "onnx"):
        (out / kind).mkdir(parents=True, exist_ok=True)

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = torch.arange(2, 34).reshape(2, 16) % model.config.vocab_size
    expected = model(ids).logits
    rows = [
        safetensors_row(model, out / "safetensors", ids, expected),
        gguf_row(model, tokenizer, out / "gguf", ids, expected),
        onnx_row(model, out / "onnx", ids, expected),
    ]
    print(f"{COLUMNS[0]:34}{COLUMNS[1]:>8}  {COLUMNS[2]:14}{COLUMNS[3]:26}{COLUMNS[4]}")
    for path, embedding, head, difference in rows:
        name = str(path.relative_to(out))
        print(f"{name:34}{path.stat().st_size / 2**20:8.1f}  {embedding:14}{head:26}{difference:.1e}")
    return int(any(row[-1] > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
