# Run 1, 8 query heads on 4 key-value heads, rows in random order
n_kv_head = 4
order = 'shuffled'
