# Does order matter after DroPE, and if so at equal loss? The structured chain, four orders, a model that never had
# RoPE, and recalibrations of six lengths, each a schedule of its own: a cosine to zero makes the end of a short one
# another model than a point on the way of a long one. Six seeds.
from config.structured import *

out_dir = 'out/factorial'
arms = ('mha_shuffled', 'mha_topic_ordered', 'mha_topic_c4', 'mha_pseudo', 'mha_shuffled_nope')
seeds = (0, 1, 2, 3, 4, 5)
recal_iters = (0.3, 0.0, 0.01, 0.04, 0.1, 5000)
eval_interval = 250
