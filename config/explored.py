# Outside the primary's family: how ordered the data must be, what a window holds, and a model that never had RoPE.
# The base of each arm is made of the structured runs of the same seeds; of the pure arms it is shuffled_pure.
from config.structured import *

out_dir = 'out/explored'
rows_from = 'results/structured'
arms = ('mha_shuffled', 'mha_reshuffled', 'mha_topic_c4', 'mha_topic_c16', 'mha_topic_ordered_cd20',
        'mha_shuffled_pure', 'mha_topic_ordered_pure', 'mha_shuffled_nope')
seeds = tuple(range(10, 18))
recal_iters = 0.1
