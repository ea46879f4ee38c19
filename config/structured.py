# The clean instrument: a group chain, where every token is as frequent in every topic and only transitions tell them
# apart. The whole learnable gap is structure, and a Bayes filter says how much of it there is to learn.
# Primary, named before these seeds were run: the entropy of the last layer's heads, topic order minus the mean of two
# shuffles, after DroPE for 10% of the steps; read beside the same with RoPE kept. Seeds 0-7 were looked at before.
data_dir = 'data/structured'
out_dir = 'out/structured'
arms = ('mha_shuffled', 'mha_reshuffled', 'mha_pseudo', 'mha_topic_ordered')
seeds = tuple(range(10, 26))
primary = ('entropy_last', 'topic_ordered', 'drope')
chain, beta, n_groups, repeats = 'group', 1.5, 32, False
n_topics, vocab_size, block_size, min_segment_len = 5, 512, 256, 32
train_rows, val_rows = 100_000, 1_000
n_layer, n_embd, n_head, head_dim, mlp_hidden = 4, 256, 4, 64, 688
max_iters = 5_000
adam_lr = 3e-3
grad_clip = 0.0
recal_iters = (0.1, 0.01, 0.04, 0.2, 0.3)       # each a schedule of its own, from the same parent
course_seeds = 8                                # all of them on seeds 10-17; 10% on 10-25
