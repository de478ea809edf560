"""Decoder language models: LLaMA, Qwen 2 and 3, Gemma 1 to 3, SmolLM3 and OPT.

model             a model with its config, parameters and tokenizer
config            the shape of a decoder, and the switches that families differ in
decoder           the decoder as pure functions over parameters
attention         causal attention with grouped heads
rope              rotary position embeddings
decoding          prefill and decoding with a key/value cache
adapter           how a LoRA or another adapter enters the decoder
scoring           log-likelihoods of tokens, in training and evaluation
int8              kernels in int8
huggingface       model directories of Hugging Face, read and written
checkpoint_files  the tensors of such a directory
gguf_format       llama.cpp's files: metadata and stored tensors
gguf_files        their tensors, dequantised
gguf_config       the config in their metadata
gguf_tokenizer    and the tokenizer
config_json       its config.json: what is used, and what is refused
families          names and configs of the Hugging Face families
presets           shapes of published checkpoints
"""
