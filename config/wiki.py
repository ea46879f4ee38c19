# The log's v2: Wikipedia in 8 topics by meaning, 98M parameters, 16,384 tokens of byte-level BPE
data_script = 'prepare_wiki.py'
data_dir = 'data/wiki'
out_dir = 'out/wiki'
arms = ('mha_shuffled', 'mha_reshuffled', 'mha_topic_ordered')
primary = ('profile', 'topic_ordered', 'drope')
source, max_articles, embedder = 'wikimedia/wikipedia', 500_000, 'all-MiniLM-L6-v2'
n_topics, vocab_size, block_size = 8, 16_384, 512
min_segments, max_segments, min_segment_len = 2, 4, 64
n_layer, n_embd, n_head, head_dim, mlp_hidden = 12, 768, 12, 64, 2048
max_iters = 30_000
warmup_iters = 1000
recal_iters = (0.3, 0.1, 0.0, 0.01)      # what is there at once, and what grows again
lens_rows = 50              # 98M and 512 tokens: a quarter of the rows, the same picture
