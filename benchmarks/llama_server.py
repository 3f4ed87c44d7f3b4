"""Serve a GGUF file with llama.cpp (package xllamacpp): print the address, and stop at the end of the input.

    python benchmarks/llama_server.py FILE.gguf
"""

import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.verbosity = 1024, 1, 1, 0
params.warmup = False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # float32, as in our code
# llama.cpp's flash attention rounds queries and keys to half precision:
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
