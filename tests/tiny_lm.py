"""Language models of a few thousand parameters, with a tokenizer, made offline."""

from functools import cache
from pathlib import Path
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


END = "<|endoftext|>"


def saved(folder: Path, kind: str) -> Path:
    """A transformers model of two layers with its tokenizer, as `lm.load` reads it."""
    import transformers

    folder.mkdir(exist_ok=True)
    torch.manual_seed(7)
    end, same = {"eos_token": END}, {"bos_token": END, "eos_token": END, "unk_token": END}
    tokens = {"gpt2": same, "gpt2 without special tokens": {}, "qwen": end, "neox": same}
    tokenizer = _wordpiece(folder) if kind == "bert" else _bytepairs(tokens[kind])
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "initializer_range": 0.5}
    if kind.startswith("gpt2"):
        shape |= {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": None}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, eos_token_id=None))
    else:
        shape |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"max_position_embeddings": 32}
        if kind == "qwen":
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(num_key_value_heads=2, **shape))
        elif kind == "neox":
            model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape))
        else:
            model = transformers.BertForMaskedLM(transformers.BertConfig(**shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _bytepairs(named: dict[str, str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    words.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=sorted(set(named.values())), initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([" ".join(WORDS[1:])], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, **named)


def _wordpiece(folder: Path) -> Any:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[1:]]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(str(folder / "vocab.txt"))
