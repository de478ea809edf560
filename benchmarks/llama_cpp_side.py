"""llama.cpp's side of `real_model.py`: a process that needs numpy and llama_cpp alone.

    python llama_cpp_side.py convert IN.gguf OUT.gguf    # the same weights in fp32
    python llama_cpp_side.py serve FILE.gguf f32|f16 THREADS

`serve` reads lines of JSON, {"tokens": [B, T], "new": N}, and answers each with {"prefill":
seconds, "decode": seconds per token, "tokens": [B, N]}: greedy, all rows as one batch.
"""

import ctypes
import json
import sys
import time

import llama_cpp as api
import numpy as np

SILENT = api.llama_log_callback(lambda level, text, data: None)
CACHE = {"f32": 0, "f16": 1}  # ggml's types


def convert(source: str, target: str) -> None:
    options = api.llama_model_quantize_default_params()
    options.ftype = 0  # all tensors in fp32
    options.allow_requantize = True
    if api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)):
        sys.exit(f"llama.cpp cannot write {source} in fp32")


class Server:
    def __init__(self, path: str, cache: str, threads: int):
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = False  # its AMX kernels end the process at Q4_1 (0.3.36)
        self.model = api.llama_model_load_from_file(path.encode(), options)
        self.words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.cache, self.threads, self.contexts = CACHE[cache], threads, {}

    def context(self, rows: int, length: int):
        """One for each shape, made before anything is timed."""
        if (rows, length) not in self.contexts:
            options = api.llama_context_default_params()
            options.n_seq_max = rows
            options.n_ctx = rows * (-(-length // 256) * 256)  # of all rows together
            options.n_batch = options.n_ubatch = rows * length
            options.n_threads = options.n_threads_batch = self.threads
            options.type_k = options.type_v = self.cache
            context = api.llama_init_from_model(self.model, options)
            batch = api.llama_batch_init(rows * length, 0, 1)
            self.contexts[rows, length] = context, batch
        return self.contexts[rows, length]

    def step(self, context, batch, tokens: np.ndarray, position: int) -> np.ndarray:
        """Reads tokens `[B, T]`, and chooses the next `[B]`."""
        rows, length = tokens.shape
        batch.n_tokens = rows * length
        for i in range(rows * length):
            row, place = divmod(i, length)
            batch.token[i] = int(tokens[row, place])
            batch.pos[i] = position + place
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = place == length - 1
        if api.llama_decode(context, batch):
            sys.exit("llama.cpp cannot decode this batch")
        scores = [
            np.ctypeslib.as_array(
                api.llama_get_logits_ith(context, (row + 1) * length - 1), shape=(self.words,)
            )
            for row in range(rows)
        ]
        return np.array([row.argmax() for row in scores])

    def run(self, tokens: np.ndarray, new: int) -> dict:
        rows, length = tokens.shape
        context, batch = self.context(rows, length + new)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        start = time.perf_counter()
        token, out = self.step(context, batch, tokens, 0), []
        middle = time.perf_counter()
        for i in range(new):
            token = self.step(context, batch, token[:, None], length + i)
            out.append(token)
        seconds = (time.perf_counter() - middle) / new
        found = np.stack(out, axis=1).tolist()
        return {"prefill": middle - start, "decode": seconds, "tokens": found}


def main(command: str, *words: str) -> None:
    api.llama_log_set(SILENT, None)
    api.llama_backend_init()
    if command == "convert":
        convert(*words)
        return
    path, cache, threads = words
    server = Server(path, cache, int(threads))
    print(json.dumps({"version": api.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(server.run(np.array(asked["tokens"]), asked["new"])), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
