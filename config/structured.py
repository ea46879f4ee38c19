# The clean instrument: a group chain, where every token is as frequent in every topic and only transitions tell them
# apart. The whole learnable gap is structure, and a Bayes filter says how much of it there is to learn.
data_dir = 'data/structured'
out_dir = 'out/structured'
arms = ('mha_shuffled', 'mha_topic_ordered', 'mha_pseudo')
chain, beta, n_groups, repeats = 'group', 1.5, 32, False
n_topics, vocab_size, block_size, min_segment_len = 5, 512, 256, 32
train_rows, val_rows = 100_000, 1_000
n_layer, n_embd, n_head, head_dim, mlp_hidden = 4, 256, 4, 64, 688
max_iters = 5_000
adam_lr = 3e-3
grad_clip = 0.0
recal_iters = 0.3
