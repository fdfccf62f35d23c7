"""Language models of a few thousand parameters, with a tokenizer, made offline."""

from functools import cache
from typing import Any

import torch

WORDS = "<bos> the a cat dog sat ran on under mat tree and then quickly slowly . ,".split()  # noqa: SIM905  # readable


@cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<bos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", name_or_path="tiny", add_bos_token=True)


@cache
def hooked() -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(5)
    config = HookedTransformerConfig(
        n_layers=3, d_model=16, n_ctx=12, d_head=8, n_heads=2, d_mlp=32, d_vocab=len(WORDS), act_fn="gelu", seed=5
    )
    model = HookedTransformer(config)
    model.tokenizer = tokenizer()
    return model.eval()


@cache
def bridge() -> Any:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(6)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=12, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return TransformerBridge.boot_transformers(
        "tiny", hf_model=GPT2LMHeadModel(config).eval(), tokenizer=tokenizer(), device="cpu"
    )
