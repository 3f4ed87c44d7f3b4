"""Serve a GGUF file with llama.cpp (package xllamacpp): print the address, and stop at the end of the input.

    python benchmarks/llama_server.py FILE.gguf [SLOTS THREADS]

With a number of slots and threads it runs with the settings that llama.cpp chooses; without, as exactly as it can.
"""

import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.verbosity = 0
if len(sys.argv) > 2:
    slots, threads = map(int, sys.argv[2:])
    params.n_ctx, params.n_parallel = 1024 * slots, slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
else:
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 1024, 1, 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # float32, as in our code
    # llama.cpp's flash attention rounds queries and keys to half precision:
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
