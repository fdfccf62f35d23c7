"""Train the embedded language model: `python -m fastsae.lm.train --out FOLDER`.

A small GPT-2 on the sources and docstrings of the Python standard library, which every interpreter carries. Documents
held out by `fastsae.activations.text.is_held_out` are neither trained on nor seen by the tokenizer; the held-out loss
is stated beside that of a trigram model over the same tokens. The same seed on the same machine gives the same weights,
also when the training was interrupted and continued.
"""

import hashlib
import json
import math
import os
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from fastsae.activations.text import STDLIB, Document, is_held_out, read_documents
from fastsae.lm.trigram import Trigram

BOS = "<|endoftext|>"
CONTEXT = 256


@dataclass(frozen=True)
class Options:
    """Settings of the embedded weights' training."""

    out: Path
    """Folder for weights, tokenizer, card and metrics."""
    steps: int = 3200
    """Optimizer steps."""
    batch_size: int = 16
    """Windows of 256 tokens per step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW, after 2 % of the steps; a cosine brings it down to a tenth."""
    width: int = 256
    """Width of the residual stream."""
    layers: int = 4
    """Blocks; each has width / 64 heads."""
    vocabulary: int = 4096
    """Byte-level BPE tokens."""
    seed: int = 0
    """Seeds weights, order of the windows and dropout."""
    text: str = STDLIB
    """Text to train on, as fastsae.activations.text.read_documents takes it."""
    save_every: int = 200
    """Steps between saves of the unfinished training."""


def main(options: Options) -> None:
    """Train, or continue an interrupted training, and write the finished model with its card."""
    options.out.mkdir(parents=True, exist_ok=True)
    # In the order the committed weights were made in.
    documents = sorted(
        read_documents(options.text), key=lambda d: hashlib.sha256(d.name.encode(errors="surrogateescape")).digest()
    )
    train_documents = [d for d in documents if not is_held_out(d.name)]
    held_out_documents = [d for d in documents if is_held_out(d.name)]
    tokenizer = train_tokenizer(train_documents, options)
    train_ids, held_out_ids = (
        [np.array(tokenizer.encode(d.text).ids, dtype=np.int64) for d in part]
        for part in (train_documents, held_out_documents)
    )
    held_out = cut(held_out_ids, [0] * len(held_out_ids))
    model, minutes, history = train(train_ids, held_out, options)
    loss = held_out_loss(model, held_out)
    trigram = Trigram(pad(cut(train_ids, [0] * len(train_ids)), -1), options.vocabulary)
    tokens = sum(len(w) - 1 for w in held_out)
    metrics = {
        "held_out_loss_nats_per_token": round(loss, 4),
        "trigram_loss_nats_per_token": round(trigram.loss(pad(held_out, -1)), 4),
        "held_out_bits_per_byte": round(loss * tokens / math.log(2) / _bytes(held_out_documents), 4),
        "held_out_tokens": tokens,
        "train_tokens": sum(len(ids) for ids in train_ids),
        "train_documents": len(train_documents),
        "held_out_documents": len(held_out_documents),
        "presented_tokens": options.steps * options.batch_size * (CONTEXT - 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round(minutes, 1),
        "history": history,
        "options": {k: v for k, v in asdict(options).items() if k != "out"},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    write_model(model, tokenizer, metrics, options)
    tqdm.write(json.dumps({k: v for k, v in metrics.items() if k != "history"}, indent=2))


def _bytes(documents: list[Document]) -> int:
    return sum(len(d.text.encode()) for d in documents)


def train_tokenizer(documents: list[Document], options: Options) -> Any:
    """Byte-level BPE: any text comes back exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return tokenizer


def cut(documents: list[np.ndarray], offsets: list[int]) -> list[np.ndarray]:
    """Windows of BOS (id 0) and up to 255 tokens of one document; the first one ends at `offset` if that is above 0."""
    windows = []
    for ids, offset in zip(documents, offsets, strict=True):
        for lo in range(offset - (CONTEXT - 1) if offset else 0, len(ids), CONTEXT - 1):
            part = ids[max(lo, 0) : lo + CONTEXT - 1]
            if len(part):
                windows.append(np.concatenate([[0], part]))
    return windows


def pad(windows: list[np.ndarray], filler: int) -> np.ndarray:
    """Windows as one (n, 256) array, filled up on the right."""
    padded = np.full((len(windows), CONTEXT), filler, dtype=np.int64)
    for row, window in zip(padded, windows, strict=True):
        row[: len(window)] = window
    return padded


def batches(documents: list[np.ndarray], options: Options) -> Any:
    """Batches of windows for ever; each epoch cuts and shuffles anew."""
    epoch = 0
    while True:
        draw = random.Random(f"{options.seed}/{epoch}")
        windows = cut(documents, [draw.randrange(CONTEXT - 1) for _ in documents])
        draw.shuffle(windows)
        for lo in range(0, len(windows) - options.batch_size + 1, options.batch_size):
            yield torch.from_numpy(pad(windows[lo : lo + options.batch_size], -100))
        epoch += 1


def new_model(options: Options) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=options.vocabulary,
        n_positions=CONTEXT,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=max(1, options.width // 64),
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def token_loss(model: Any, windows: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of every real token given those before it in its window; padding is -100."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows.clamp_min(0), use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(model: Any, windows: list[np.ndarray]) -> float:
    """Mean nats per token over all tokens of the windows."""
    model.eval()
    padded = torch.from_numpy(pad(windows, -100))
    total = sum(token_loss(model, part, "sum").item() for part in padded.split(64))
    model.train()
    return total / sum(len(w) - 1 for w in windows)


def learning_rate(step: int, options: Options) -> float:
    warmup = max(1, options.steps // 50)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, options.steps - warmup)
    return options.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(documents: list[np.ndarray], held_out: list[np.ndarray], options: Options) -> tuple[Any, float, list]:
    """The trained model, the minutes it took, and the held-out loss on the way (on 200 windows)."""
    torch.manual_seed(options.seed)
    model = new_model(options)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)
    first, seconds, history = 0, 0.0, []
    unfinished = options.out / "unfinished.pt"
    if unfinished.exists():
        try:
            saved = torch.load(unfinished, weights_only=True)
        except Exception as error:  # torch raises whatever its reader stumbles over
            raise ValueError(f"{unfinished} is damaged ({error}); delete it to train from the start") from error
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        first, seconds, history = saved["step"], saved["seconds"], saved["history"]
    stream = batches(documents, options)
    for _ in range(first):
        next(stream)
    sample = held_out[:: max(1, len(held_out) // 200)]
    started = time.monotonic()
    progress = tqdm(range(first, options.steps), initial=first, total=options.steps, desc="language model")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        loss = token_loss(model, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            history.append([step + 1, round(held_out_loss(model, sample), 4)])
            progress.set_postfix(train=f"{loss.item():.3f}", held_out=history[-1][1])
            saved = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "step": step + 1,
                "seconds": seconds + time.monotonic() - started,
                "history": history,
            }
            temporary = unfinished.with_suffix(".tmp")
            torch.save(saved, temporary)
            os.replace(temporary, unfinished)
    return model.eval(), (seconds + time.monotonic() - started) / 60, history


def write_model(model: Any, tokenizer: Any, metrics: dict[str, Any], options: Options) -> None:
    """The folder that fastsae.lm.load reads: fp16 weights and tokenizer as transformers writes them, metrics, card."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token=BOS, model_max_length=CONTEXT
    )
    fast.save_pretrained(options.out)
    model.half().save_pretrained(options.out)
    (options.out / "generation_config.json").unlink(missing_ok=True)
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (options.out / "README.md").write_text(card(metrics))
    (options.out / "unfinished.pt").unlink()


def card(m: dict[str, Any]) -> str:
    """The model card, from the metrics."""
    o = m["options"]
    return f"""# The embedded language model of fastsae

A GPT-2 of {o["layers"]} layers, width {o["width"]}, context {CONTEXT}, {m["parameters"]:,} parameters (tied
embeddings), fp16. It exists so that everything in fastsae runs offline on a real, if small, language model.

- **Text**: the sources and docstrings of the standard library of Python {m["python"]} (PSF licence), without tests and
  code pages: {m["train_documents"]} documents, {m["train_tokens"]:,} tokens to train on; {m["held_out_documents"]}
  documents, {m["held_out_tokens"]:,} tokens held out by a hash of their name.
- **Tokenizer**: byte-level BPE of {o["vocabulary"]} tokens, trained on the training documents; `{BOS}` begins each
  window.
- **Training**: `python -m fastsae.lm.train --out FOLDER --seed {o["seed"]}`: {o["steps"]} steps of {o["batch_size"]}
  windows ({m["presented_tokens"]:,} token presentations), AdamW, bf16 autocast, {m["minutes"]} minutes on
  {m["machine"]}, torch {m["torch"]}. The same seed on the same machine gives the same weights.

| held-out loss | nats per token |
|---|---|
| this model | {m["held_out_loss_nats_per_token"]} |
| trigram, interpolated Kneser-Ney, same tokens | {m["trigram_loss_nats_per_token"]} |

The model's loss is {m["held_out_bits_per_byte"]} bits per byte of held-out text.

**Use** it to try, test and demonstrate. **Limits**: it knows Python's library and its prose, and little else; do not
draw conclusions about large language models from it. **Licence** of the weights: MIT, as the rest of fastsae.
"""


if __name__ == "__main__":
    main(tyro.cli(Options))
