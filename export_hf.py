"""
Export a trained run as a Hugging Face folder: stock Qwen3, with or without RoPE.

Reads a run folder. Writes config.json and model.safetensors into out_dir and, where the run's dataset has a
tokenizer.json, a copy of it and tokenizer_config.json; all or nothing.

    python export_hf.py --run=out/demo/mha_shuffled_drope/seed0 --out_dir=out/hf
    python export_hf.py --run=out/demo/mha_topic_ordered_rope/seed0 --out_dir=out/hf_rope

AutoModelForCausalLM and AutoTokenizer of transformers open the folder, and so does what builds on them, such as
TransformerLens.
"""
import shutil
from os.path import exists

from safetensors.torch import save
from tokenizers import Tokenizer

from configurator import command
from model import load
from runs import columns, new_folder, read_config, write_bytes, write_json
from train import data_folder, read_data

# -----------------------------------------------------------------------------
# config

run = ''                    # folder of the trained run
out_dir = ''                # the folder to write; must not be there yet

# -----------------------------------------------------------------------------

def qwen3_config(c):
    """config.json of transformers' Qwen3ForCausalLM for a run's config c, both as dicts."""
    # without RoPE it is stock Qwen3 too: its angles divided by 1e30, so that cos is 1 and sin nothing beside it
    scaling = None if c['rope'] else {'rope_type': 'linear', 'factor': 1e30}
    return {
        'architectures': ['Qwen3ForCausalLM'],
        'model_type': 'qwen3',
        'dtype': 'float32',
        'vocab_size': c['vocab_size'],
        'max_position_embeddings': c['block_size'],
        'tie_word_embeddings': True,
        'num_hidden_layers': c['n_layer'],
        'hidden_size': c['n_embd'],
        'intermediate_size': c['mlp_hidden'],
        'num_attention_heads': c['n_head'],
        'num_key_value_heads': c['n_kv_head'],
        'head_dim': c['head_dim'],
        'hidden_act': 'silu',
        'rms_norm_eps': 1e-6,
        'attention_bias': False,
        'attention_dropout': 0.0,
        'use_sliding_window': False,
        'sliding_window': None,
        'rope_parameters': {**(scaling or {'rope_type': 'default'}), 'rope_theta': c['rope_theta']},
        # transformers before 5 reads these instead, and would rotate a model without RoPE and not say so
        'rope_theta': c['rope_theta'],
        'rope_scaling': scaling}

def main(cfg):
    """Writes the folder cfg.out_dir from the run cfg.run."""
    if not cfg.out_dir:                                     # that there is a run is checked below
        raise SystemExit('export_hf.py: --run=FOLDER, the trained run, and --out_dir=FOLDER, the folder to write')
    c = read_config(cfg.run)
    model = load(cfg.run)
    if not model.stock_positions():
        raise SystemExit(f'{cfg.run}: stock Qwen3 has the same plain RoPE in every layer, or none, and plain causal '
                         'attention; this model has other positions (model.py) and cannot be exported')
    source = f'{data_folder(c["data_dir"], c["seed"])}/tokenizer.json'
    has_tokenizer = exists(source)                          # a run can be exported where its data is gone
    if has_tokenizer:
        read_data(c, cfg.run)                               # stops at the tokenizer of another dataset
        try:
            largest = max(Tokenizer.from_file(source).get_vocab().values())
        except Exception as e:                              # the library's errors have no class of their own
            raise SystemExit(f'{source}: no tokenizer ({e}); make the dataset again') from None
        if largest >= c['vocab_size']:
            raise SystemExit(f'{source}: has a token {largest}, the model only {c["vocab_size"]} tokens')

    with new_folder(cfg.out_dir) as folder:
        weights = save(model.state_dict(), {'format': 'pt'})                # Hugging Face's names, and no lm_head
        write_bytes(f'{folder}/model.safetensors', weights)
        write_json(f'{folder}/config.json', qwen3_config(c))
        if has_tokenizer:
            shutil.copy(source, folder)
            write_json(f'{folder}/tokenizer_config.json', {
                'tokenizer_class': 'PreTrainedTokenizerFast',               # the file as it is, not Qwen's own rules
                'model_max_length': c['block_size'],
                'clean_up_tokenization_spaces': False})
    tokenizer = 'with its tokenizer' if has_tokenizer else f'no tokenizer ({source} is not there)'
    print(f'{cfg.out_dir}: {columns(c)["condition"]} as Qwen3, {tokenizer}')

if __name__ == '__main__':
    command(main, __file__)
