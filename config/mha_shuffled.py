# Run 1, MHA, rows in random order: the defaults of train.py
order = 'shuffled'
