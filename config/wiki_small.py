# Wikipedia on one CPU: download, embedding, clusters, BPE, training and the whole report, in miniature
data_script = 'prepare_wiki.py'
data_dir, work_dir = 'data/wiki_small', 'data/wiki_small_work'
out_dir = 'out/wiki_small'
arms = ('mha_shuffled', 'mha_topic_ordered')
source, max_articles, embedder = 'wikimedia/wikipedia', 3_000, 'all-MiniLM-L6-v2'
n_topics, vocab_size, block_size = 8, 4096, 128
min_segments, max_segments, min_segment_len = 2, 4, 24
val_share = 0.1
n_layer, n_embd, n_head, head_dim, mlp_hidden = 3, 128, 4, 32, 344
batch_size = 32
max_iters = 450
eval_interval, eval_rows = 150, 400
adam_lr = 3e-3
recal_iters = 0.3
analysis_rows, probe_tokens, null_draws, lens_rows = 200, 10_000, 200, 60
jobs = 2
