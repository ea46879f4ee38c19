# The log's v2: 98M parameters for Wikipedia, 16,384 tokens of byte-level BPE
data_dir = 'data/wiki'
out_dir = 'out/wiki'
vocab_size, block_size = 16_384, 512
n_layer, n_embd, n_head, head_dim, mlp_hidden = 12, 768, 12, 64, 2048
max_iters = 30_000
warmup_iters = 1000
