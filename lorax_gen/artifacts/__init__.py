"""Released artifacts: how they are written, read again, exported and verified.

generator   a released generator: a directory of safetensors and JSON
card        task cards: the kept experts of each layer and their gates
identity    which models a generator was trained with
checks      checks of the arrays in files
peft        LoRA trees as PEFT adapters, and back; peft_config: their configs by peft's rules
gguf        LoRA trees as GGUF adapters for llama.cpp
export      cards and adapters as merged models, PEFT or GGUF
verify      whether all forms of an artifact agree
"""
