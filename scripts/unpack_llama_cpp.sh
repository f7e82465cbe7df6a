#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
# Put llama.cpp's converters into the environment in the folder $1. The source of llama-cpp-python brings them along.
set -euo pipefail
environment=$1
version=0.3.36

download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT
"$environment/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --no-binary llama-cpp-python --dest "$download" "llama-cpp-python==$version"
tar --extract --gzip --file "$download"/llama_cpp_python-*.tar.gz --directory "$download" \
    --wildcards '*/vendor/llama.cpp/convert_*.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
rm -rf "$environment/llama.cpp"
mv "$download"/llama_cpp_python-*/vendor/llama.cpp "$environment/llama.cpp"
