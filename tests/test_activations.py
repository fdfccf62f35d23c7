"""From token windows to shuffled batches: the right rows, each once, whatever interrupts."""

import copy
import dataclasses
import errno
import gc
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_lm
import tokenizers
import torch
import transformers
from torch import Tensor

import fastsae
from fastsae import files, lm
from fastsae.activations import (
    ActivationStore,
    ActivationStream,
    Document,
    ModelActivations,
    TokenWindows,
    first_token,
    harvest,
    is_held_out,
    special_tokens,
    tokenize,
)
from fastsae.activations.store import Rows
from fastsae.evaluate import behavior
from fastsae.evaluate.questions import steered

HOOK = "blocks.1.hook_resid_post"
# Both kinds of TransformerLens models are served as long as the first exists.
pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

CONTEXT, WIDTH, HEADS = 12, 16, 2
# Short, exactly one window, one token more than a window, several windows.
DOCUMENT_TOKENS = [3, 11, 12, 1, 30, 7, 22, 5, 18, 9]


def text(n: int, start: int = 0) -> str:
    words = tiny_lm.WORDS[1:]
    return " ".join(words[(7 * i + start) % len(words)] for i in range(n))


DOCUMENTS = [Document(f"document {i}", text(n, start=i)) for i, n in enumerate(DOCUMENT_TOKENS)]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_lm.tokenizer()


@pytest.fixture(
    scope="session", params=[tiny_lm.hooked, tiny_lm.bridge], ids=["HookedTransformer", "TransformerBridge"]
)
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(scope="session")
def hooked() -> Any:
    return tiny_lm.hooked()


@pytest.fixture(scope="session")
def windows(tokenizer: Any) -> TokenWindows:
    return tokenize(DOCUMENTS, tokenizer, CONTEXT, held_out=None)


def all_rows(source: Any) -> Tensor:
    return torch.cat([source.block(i) for i in range(len(source.block_rows))])


# ---- tokens -------------------------------------------------------------------------------------------------------


def test_windows_hold_every_token_once_in_order_and_never_two_documents(tokenizer: Any, windows: TokenWindows):
    assert windows.has_bos
    assert windows.context == CONTEXT
    assert (windows.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert windows.names == tuple(d.name for d in DOCUMENTS)
    assert windows.n_tokens == sum(DOCUMENT_TOKENS) == int(windows.is_text().sum())
    for number, document in enumerate(DOCUMENTS):
        mine = windows.documents == number
        ids = windows.tokens[mine][windows.is_text()[mine]].tolist()
        assert ids == tokenizer(document.text, add_special_tokens=False)["input_ids"]
        lengths = windows.lengths[mine]
        assert (lengths[:-1] == CONTEXT).all()  # only the tail is shorter


def test_a_tokenizer_without_bos_gives_windows_of_text_alone(tokenizer: Any):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    windows = tokenize(DOCUMENTS, bare, CONTEXT, held_out=None)
    assert not windows.has_bos
    assert windows.n_tokens == int(windows.lengths.sum()) == sum(DOCUMENT_TOKENS)
    assert windows.lengths[:3].tolist() == [3, 11, 12]
    assert windows.is_text()[0].tolist() == [True] * 3 + [False] * (CONTEXT - 3)


@pytest.mark.parametrize("limit", [1, 14, 15, 26, 10_000])
def test_max_tokens_counts_tokens_of_text_and_stops_reading(tokenizer: Any, limit: int):
    read = []

    def documents() -> Iterator[Document]:
        for document in DOCUMENTS:
            read.append(document.name)
            yield document

    assert tokenize(documents(), tokenizer, CONTEXT, limit, held_out=None).n_tokens == min(limit, sum(DOCUMENT_TOKENS))
    if limit == 1:
        assert len(read) <= 2


def test_no_document_is_on_both_sides_of_the_split(tokenizer: Any):
    documents = [Document(f"document {i}", text(5, i)) for i in range(200)]
    training, held_out, everything = (
        tokenize(documents, tokenizer, CONTEXT, held_out=side) for side in (False, True, None)
    )
    assert set(held_out.names) == {d.name for d in documents if is_held_out(d.name)}
    assert not set(training.names) & set(held_out.names)
    assert set(training.names) | set(held_out.names) == set(everything.names) == {d.name for d in documents}


def test_tokenize_refuses_what_gives_no_window(tokenizer: Any):
    one = [Document("document 0", text(5))]
    with pytest.raises(ValueError, match=r"no held-out documents.*use more text"):
        tokenize(one, tokenizer, CONTEXT, held_out=True)
    with pytest.raises(ValueError, match="holds no documents"):
        tokenize([Document("empty", "")], tokenizer, CONTEXT, held_out=None)
    with pytest.raises(ValueError, match="context of at least 2; got 1"):
        tokenize(one, tokenizer, 1)
    with pytest.raises(ValueError, match="max_tokens of at least 1; got 0"):
        tokenize(one, tokenizer, CONTEXT, max_tokens=0)
    with pytest.raises(ValueError, match="has no tokenizer"):
        tokenize(one, None, CONTEXT)


def test_the_digest_tells_tokens_and_documents_apart(tokenizer: Any):
    def digest(*documents: Document) -> str:
        return tokenize(documents, tokenizer, CONTEXT, held_out=None).digest()

    a, b = Document("a", "the cat"), Document("b", "sat")
    assert digest(a, b) == digest(a, b)
    others = {digest(b, a), digest(a), digest(a, Document("b", "ran")), digest(a, Document("c", "sat"))}
    assert len(others | {digest(a, b)}) == 5


BOS = tiny_lm.WORDS[0]


@pytest.mark.parametrize("kind", ["gpt2", "gpt2 without special tokens", "qwen", "neox", "bert"])
def test_windows_begin_as_the_model_was_trained(kind: str, tmp_path: Path):
    model = lm.load(str(tiny_lm.saved(tmp_path, kind)))
    documents = [Document("a", "the cat sat on the mat")]
    plain = model.tokenizer(documents[0].text, add_special_tokens=False)["input_ids"]
    expected = model.to_tokens(documents[0].text)[0].tolist()  # TransformerLens' own idea of it
    if kind == "gpt2 without special tokens":
        expected = plain  # TransformerLens puts an id there that the model does not know
    elif kind == "bert":
        assert expected.pop() == model.tokenizer.sep_token_id
        assert expected[0] == model.tokenizer.cls_token_id
    assert (expected == plain) == (kind not in ("gpt2", "bert"))
    for given in (model, model.tokenizer):
        windows = tokenize(documents, given, 32, held_out=None)
        assert windows.tokens[0, : windows.lengths[0]].tolist() == expected
        assert windows.is_text().sum() == windows.n_tokens == len(plain)
        assert windows.has_bos == (expected != plain)
    assert len(ModelActivations(model, HOOK, windows).block(0)) == len(plain)
    without = tokenize(documents, model, 32, held_out=None, prepend_bos=False)
    assert without.tokens[0, : without.lengths[0]].tolist() == plain
    forced = tokenize(documents, model, 32, held_out=None, prepend_bos=True)
    assert forced.has_bos == (kind != "gpt2 without special tokens")
    if kind in ("qwen", "neox"):
        assert forced.tokens[0, 0] == model.tokenizer.eos_token_id
        with pytest.warns(UserWarning, match="begin with BOS, and this model was trained without"):
            ModelActivations(model, HOOK, forced)


def test_text_that_begins_with_bos_gets_no_second_one(tokenizer: Any):
    windows = tokenize([Document("a", text(30))], tokenizer, CONTEXT, held_out=None)
    begun = tokenize([Document("a", f"{BOS} {text(30)}")], tokenizer, CONTEXT, held_out=None)
    assert begun.digest() == windows.digest()
    words = text(22).split()
    middle = " ".join([*words[:11], BOS, *words[11:]])  # where a window begins
    inside = tokenize([Document("a", middle)], tokenizer, CONTEXT, held_out=None)
    plain = tokenize([Document("a", text(22))], tokenizer, CONTEXT, held_out=None)
    assert inside.tokens.tolist() == plain.tokens.tolist()


def test_what_stands_between_texts_is_seen_and_is_no_text(tokenizer: Any, model: Any):
    joined = [Document("a", f"the cat {BOS} sat on {BOS}"), Document("b", f"{BOS} {BOS}"), Document("c", text(3))]
    windows = tokenize(joined, tokenizer, CONTEXT, held_out=None)
    bos, ids = tokenizer.bos_token_id, tokenizer("the cat sat on", add_special_tokens=False)["input_ids"]
    assert windows.tokens[0, :7].tolist() == [bos, *ids[:2], bos, *ids[2:], bos]
    assert windows.documents.tolist() == [0, 2], "a window without text has nothing to train on"
    assert windows.is_text()[0, :7].tolist() == [False, True, True, False, True, True, False]
    assert (windows.n_tokens, windows.n_predictions) == (7, 4)
    source = ModelActivations(model, HOOK, windows)
    assert source.block_rows == [7]
    rows = source.rows(0)
    assert rows.positions.tolist() == [1, 2, 4, 5, 1, 2, 3]
    with torch.no_grad():
        _, seen = model.run_with_cache(windows.tokens[:1, :7], names_filter=[HOOK])
    torch.testing.assert_close(rows.activations[:4], seen[HOOK][0, [1, 2, 4, 5]], rtol=1e-5, atol=5e-6)
    for limit in range(1, 8):
        assert tokenize(joined, tokenizer, CONTEXT, limit, held_out=None).n_tokens == limit
    as_text = dataclasses.replace(windows, special=())
    assert as_text.n_tokens == 9
    assert as_text.digest() != windows.digest()


def test_which_tokens_are_special():
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "<|user|>": 3, "[SEP]": 4, "hi": 5}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    options: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    roles = {"additional_special_tokens": ["<|user|>"], "sep_token": "[SEP]", "pad_token": "<unk>", "cls_token": "<c>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options, **roles)
    assert made.convert_tokens_to_ids("<c>") == 6, "it has been added"
    assert special_tokens(made) == (0, 1, 4, 6)
    assert first_token(made) == 0
    made.bos_token = "<nowhere>"  # read as the unknown token
    assert first_token(made) != 2
    made.pad_token = "hi"  # a word of the text, which no row would be of
    assert special_tokens(made) == (1, 4, 6)


# ---- activations of a model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.hook_mlp_out", "blocks.1.mlp.hook_post", "blocks.2.attn.hook_z"])
def test_rows_are_those_of_a_plain_forward_hook_on_each_window_alone(model: Any, windows: TokenWindows, hook: str):
    """No BOS row, no padding row, and padding changes nothing: here every window is run at its own length."""
    seen: list[Tensor] = []
    handle = model.hook_dict[hook].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        for tokens, length in zip(windows.tokens, windows.lengths.tolist(), strict=True):
            model(tokens[None, :length])
    handle.remove()
    source = ModelActivations(model, hook, windows, batch_windows=4)
    assert source.n_rows == windows.n_tokens
    assert [len(source.block(i)) for i in range(len(source.block_rows))] == source.block_rows
    rows = all_rows(source)
    assert rows.shape[1] == source.d_in
    # Two float32 paths of three layers: a few roundings of entries of size about 1.
    expected = torch.cat([activation[0, 1:].flatten(1) for activation in seen])
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=5e-6)


def test_a_layers_output_is_what_transformers_calls_its_hidden_state(windows: TokenWindows):
    """The hook's name means the right place: compared with a twin of the model that no bridge has touched."""
    from transformers import GPT2LMHeadModel

    bridge = tiny_lm.bridge()
    source = ModelActivations(bridge, HOOK, windows, batch_windows=100)
    torch.manual_seed(6)  # as in tiny_lm
    twin = GPT2LMHeadModel(bridge.original_model.config).eval()
    with torch.no_grad():
        states = twin(windows.tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(source.block(0), states[2][windows.is_text()], rtol=1e-5, atol=5e-6)


def test_padding_tokens_do_not_matter_to_the_bit(model: Any, windows: TokenWindows):
    other = torch.where(torch.arange(CONTEXT) < windows.lengths[:, None], windows.tokens, 7)
    padded_otherwise = TokenWindows(other, windows.lengths, windows.documents, windows.names, windows.has_bos)
    assert not torch.equal(other, windows.tokens)
    rows = [all_rows(ModelActivations(model, HOOK, w, 4)) for w in (windows, padded_otherwise)]
    torch.testing.assert_close(*rows, rtol=0, atol=0)


def test_each_row_knows_its_document_and_position(model: Any, windows: TokenWindows):
    source = ModelActivations(model, "hook_embed", windows, batch_windows=4)
    blocks = [source.rows(i) for i in range(len(source.block_rows))]
    documents, positions = torch.cat([b.documents for b in blocks]), torch.cat([b.positions for b in blocks])
    assert documents.dtype == positions.dtype == torch.int32
    assert torch.bincount(documents).tolist() == DOCUMENT_TOKENS
    want = [p % (CONTEXT - 1) + 1 for n in DOCUMENT_TOKENS for p in range(n)]
    assert positions.tolist() == want


def test_heads_lie_side_by_side(model: Any, windows: TokenWindows):
    name = "blocks.1.attn.hook_z"
    source = ModelActivations(model, name, windows, batch_windows=100)
    _, cache = model.run_with_cache(windows.tokens, names_filter=[name])
    z = cache[name]
    assert z.shape[2:] == (HEADS, WIDTH // HEADS)
    torch.testing.assert_close(source.block(0), z.flatten(2)[windows.is_text()].detach(), rtol=0, atol=0)


def test_no_layer_above_the_hook_runs_and_nothing_is_recorded_for_backward(model: Any, windows: TokenWindows):
    ran, recording = [], []
    handles = [model.blocks[i].mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i in range(3)]
    handles.append(model.blocks[0].register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled())))
    ModelActivations(model, HOOK, windows, batch_windows=4).block(0)
    for handle in handles:
        handle.remove()
    assert set(ran) == {0, 1}
    assert set(recording) == {False}


def test_a_model_in_training_mode_is_read_without_dropout(model: Any, windows: TokenWindows):
    model.train()  # GPT2Config's dropout is 0.1
    source = ModelActivations(model, HOOK, windows, batch_windows=4)
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(source.block(0), source.block(0), rtol=0, atol=0)


def test_hooks_that_give_no_activations_are_refused_by_name(model: Any, windows: TokenWindows, tokenizer: Any):
    with pytest.raises(ValueError, match=r"no hook 'blocks.1.hook_resid_psot'. Near ones: blocks.1.hook_resid_post"):
        ModelActivations(model, "blocks.1.hook_resid_psot", windows)
    with pytest.raises(ValueError, match=r"no hook 'blocks.7.hook_resid_post'. Near ones"):
        ModelActivations(model, "blocks.7.hook_resid_post", windows)
    with pytest.raises(ValueError, match=r"no hook 'zzz'. See model.hook_dict"):
        ModelActivations(model, "zzz", windows)
    with pytest.raises(ValueError, match=r"attn.hook_result never fires in this model"):
        ModelActivations(model, "blocks.1.attn.hook_result", windows)
    with pytest.raises(ValueError, match=r"one row per token.*attn.hook_pattern; got shape"):
        ModelActivations(model, "blocks.1.attn.hook_pattern", windows)
    with pytest.raises(ValueError, match=f"at most {CONTEXT} tokens.*got {CONTEXT + 1}"):
        ModelActivations(model, HOOK, tokenize(DOCUMENTS, tokenizer, CONTEXT + 1))


def test_short_documents_are_not_padded_to_the_context(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    documents = [Document(f"{i}", text(1 + i % 4, i)) for i in range(9)]
    short = tokenize(documents, tokenizer, CONTEXT, held_out=None)
    assert short.tokens.shape == (9, 5)
    ordinary = tokenize(DOCUMENTS, tokenizer, CONTEXT, held_out=None)
    assert ordinary[:1].context == CONTEXT, "a short window among long ones keeps its bits"
    mixed = tokenize([*documents, Document("long", text(11))], tokenizer, CONTEXT, held_out=None)
    assert mixed.tokens.shape == (10, CONTEXT)
    widths, run = [], model.run_with_cache
    source = ModelActivations(model, HOOK, mixed, batch_windows=3)
    monkeypatch.setattr(model, "run_with_cache", lambda t, **kw: (widths.append(t.shape[1]), run(t, **kw))[1])
    rows = [source.rows(i) for i in range(4)]
    assert widths == [4, 5, 5, CONTEXT]
    monkeypatch.undo()
    alone = ModelActivations(model, HOOK, short, batch_windows=1)
    torch.testing.assert_close(
        torch.cat([part.activations for part in rows[:3]]), all_rows(alone), rtol=1e-5, atol=5e-6
    )
    assert torch.cat([part.documents for part in rows]).tolist() == [
        *(i for i in range(9) for _ in range(1 + i % 4)),
        *[9] * 11,
    ]


@pytest.fixture
def bert(tmp_path: Path) -> Any:
    return lm.load(str(tiny_lm.saved(tmp_path, "bert")))


def test_a_model_that_reads_in_both_directions_does_not_see_padding(bert: Any, tmp_path: Path):
    """Compared with transformers' own, a window at a time."""
    documents = [Document(f"{i}", text(n, i)) for i, n in enumerate([2, 9, 4, 7, 1])]
    windows = tokenize(documents, bert, CONTEXT, held_out=None)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    for hook, layer in {"blocks.0.hook_resid_post": 1, "blocks.1.hook_resid_post": 2}.items():
        rows = ModelActivations(bert, hook, windows).block(0)
        with torch.no_grad():
            alone = [
                theirs(tokens[None, :length], output_hidden_states=True).hidden_states[layer][0, 1:]
                for tokens, length in zip(windows.tokens, windows.lengths.tolist(), strict=True)
            ]
        torch.testing.assert_close(rows, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:HookedEncoder is deprecated")
def test_an_encoder_that_names_its_mask_otherwise_does_not_see_padding(bert: Any):
    from transformer_lens import HookedEncoder, HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": CONTEXT, "d_head": 8, "n_heads": 2, "d_mlp": 32, "d_vocab": 30}
    encoder = HookedEncoder(HookedTransformerConfig(**sizes, act_fn="gelu", attention_dir="bidirectional", seed=3))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    windows = tokenize([Document(f"{i}", text(n, i)) for i, n in enumerate([2, 9, 4])], bert, CONTEXT, held_out=None)
    rows = ModelActivations(encoder, HOOK, windows).block(0)
    alone = []
    for tokens, length in zip(windows.tokens, windows.lengths.tolist(), strict=True):
        with torch.no_grad():
            alone.append(encoder.run_with_cache(tokens[None, :length], names_filter=[HOOK])[1][HOOK][0, 1:])
    torch.testing.assert_close(rows, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_be_kept_from_seeing_padding_is_refused(bert: Any, monkeypatch: pytest.MonkeyPatch):
    windows = tokenize([Document("a", text(3)), Document("b", text(9))], bert, CONTEXT, held_out=None)
    run = bert.run_with_cache
    monkeypatch.setattr(bert, "run_with_cache", lambda t, attention_mask=None, **kw: run(t, **kw))
    with pytest.raises(ValueError, match="reads in both directions, and takes no attention mask"):
        ModelActivations(bert, HOOK, windows)
    full = tokenize([Document("a", text(11)), Document("b", text(22))], bert, CONTEXT, held_out=None)
    assert ModelActivations(bert, HOOK, full).n_rows == 33, "nothing is padded"


def test_a_model_that_reads_forward_runs_without_a_mask(model: Any, windows: TokenWindows):
    seen, run = [], model.run_with_cache
    source = ModelActivations(model, HOOK, windows)
    source.model = Spy = type("Spy", (), {"cfg": model.cfg})
    Spy.run_with_cache = staticmethod(lambda t, **kw: (seen.append(set(kw)), run(t, **kw))[1])
    source.block(0)
    assert seen
    assert not any("attention_mask" in kw for kw in seen)


def test_ids_that_the_model_does_not_know_are_named(model: Any, windows: TokenWindows):
    tokens = windows.tokens.clone()
    for unknown in (len(tiny_lm.WORDS), -1):
        tokens[3, 1] = unknown
        message = rf"token id {unknown} in 'document 2' is outside the model's vocabulary of {len(tiny_lm.WORDS)} ids"
        with pytest.raises(ValueError, match=message):
            ModelActivations(model, HOOK, dataclasses.replace(windows, tokens=tokens))


def transformers_model(kind: type = transformers.GPT2LMHeadModel, **options: Any) -> Any:
    """A model in memory: no name, no folder."""
    torch.manual_seed(8)
    shape = {"vocab_size": len(tiny_lm.WORDS), "n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": 3, "n_head": HEADS}
    return kind(transformers.GPT2Config(**shape, **options))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_transformers_model_in_memory_is_read_as_it_is(windows: TokenWindows, dropout: float):
    model = transformers_model(resid_pdrop=dropout)
    names, was_training = list(model.state_dict()), model.training
    source = ModelActivations(model, HOOK, windows)
    rows = all_rows(source)
    assert list(model.state_dict()) == names, "the model was changed"
    assert model.training == was_training
    model.eval()

    def theirs() -> Tensor:
        with torch.no_grad():
            return model(windows.tokens, output_hidden_states=True).hidden_states[2][windows.is_text()]

    torch.testing.assert_close(rows, theirs(), rtol=0, atol=1e-5)
    with torch.no_grad():  # one set of weights: training the model goes on
        model.transformer.h[0].mlp.c_fc.weight.mul_(2)
    torch.testing.assert_close(all_rows(source), theirs(), rtol=0, atol=1e-5)


def test_a_transformers_model_in_memory_with_its_tokenizer(windows: TokenWindows):
    model = transformers_model()
    made = tiny_lm.tokenizer.__wrapped__()
    before = made.init_kwargs.copy(), made.special_tokens_map
    loaded = lm.load(model, tokenizer=made)
    assert loaded.tokenizer is made
    assert (made.init_kwargs, made.special_tokens_map) == before
    assert tokenize(DOCUMENTS, loaded, CONTEXT, held_out=None).digest() == windows.digest()
    assert not loaded.training
    sae = fastsae.TopKSAE(WIDTH, 32, 4)
    of_both = [behavior(sae, m, HOOK, windows).full.kl for m in (model, loaded)]
    assert of_both[0] == of_both[1]
    with steered(sae, model, HOOK, 3, 5.0) as changed:
        moved = changed(windows.tokens[:1], return_type="logits")
    assert (moved - loaded(windows.tokens[:1], return_type="logits")).abs().max() > 1e-3
    for without in (model, lm.load(model)):
        with pytest.raises(ValueError, match=r"has no tokenizer; pass it, or fastsae\.lm\.load"):
            tokenize(DOCUMENTS, without, CONTEXT)


def test_a_model_without_named_hooks_is_told_what_is_wanted(windows: TokenWindows, tmp_path: Path):
    with pytest.raises(TypeError, match=r"cannot name the hooks of this GPT2Model .*Give a model with its head"):
        ModelActivations(transformers_model(transformers.GPT2Model), HOOK, windows)
    with pytest.raises(TypeError, match=r"expected a TransformerLens model.*got Linear.*fastsae.lm.load"):
        ModelActivations(torch.nn.Linear(2, 2), HOOK, windows)
    plain = transformers_model()
    with pytest.raises(TypeError, match=r"expected ModelActivations\(model, hook_name, windows\); got GPT2LMHeadModel"):
        harvest(plain, tmp_path)


# ---- store --------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Killed(BaseException):
    pass


class Dying:
    """The model, until it was run n times."""

    def __init__(self, model: Any, n: int) -> None:
        self._model, self._left = model, n

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run_with_cache(self, *args: Any, **options: Any) -> Any:
        if self._left == 0:
            raise Killed
        self._left -= 1
        return self._model.run_with_cache(*args, **options)


def sources(model: Any, windows: TokenWindows, dies_after: int | None = None) -> ModelActivations:
    source = ModelActivations(model, HOOK, windows, batch_windows=4)
    if dies_after is not None:
        source.model = Dying(model, dies_after)
    return source


def test_a_store_gives_what_the_model_gave(model: Any, windows: TokenWindows, tmp_path: Path):
    source = sources(model, windows)
    store = harvest(source, tmp_path)
    assert (store.d_in, store.n_rows, store.block_rows) == (source.d_in, source.n_rows, source.block_rows)
    assert store.document_names == windows.names
    assert store.identity == source.identity
    for i in range(len(store.block_rows)):
        torch.testing.assert_close(store.rows(i), source.rows(i), rtol=0, atol=0)
        torch.testing.assert_close(store.block(i), source.block(i), rtol=0, atol=0)


def test_a_store_in_bf16_is_the_rounded_activations(hooked: Any, windows: TokenWindows, tmp_path: Path):
    source = sources(hooked, windows)
    store = harvest(source, tmp_path, torch.bfloat16)
    assert store.identity["dtype"] == "bfloat16"
    torch.testing.assert_close(store.block(1), source.block(1).bfloat16(), rtol=0, atol=0)
    assert store.rows(1).positions.dtype == torch.int32


class Given:
    """Activations that are given, two rows of each of two documents, as of a model."""

    block_rows, n_rows, windows = [2, 2], 4, type("Windows", (), {"names": ("x", "y")})
    identity = {"d_in": 3}  # noqa: RUF012  # nobody writes to it

    def __init__(self, activations: Tensor) -> None:
        self.activations = activations

    def rows(self, i: int) -> Rows:
        return Rows(self.activations[2 * i : 2 * i + 2], torch.tensor([i, i]), torch.tensor([4, 7]))


@pytest.mark.parametrize(
    ("value", "source", "dtype", "holding"),
    [
        (65_520.0, torch.float32, torch.float16, "bfloat16"),
        (-1e5, torch.bfloat16, torch.float16, "bfloat16"),
        (3.4e38, torch.float32, torch.bfloat16, "float32"),
        (1e39, torch.float64, torch.float32, "float64"),
    ],
)
def test_activations_that_a_dtype_cannot_hold_are_refused_at_the_shard(value, source, dtype, holding, tmp_path: Path):
    activations = torch.zeros(4, 3, dtype=source)
    activations[0] = torch.finfo(dtype).max if source != torch.bfloat16 else 1.0
    activations[3, 1] = value
    place = f"document 'y', position 7, dimension 1 is {float(activations[3, 1]):g}"
    with pytest.raises(ValueError, match=re.escape(f"{place}, more than {str(dtype)[6:]} holds") + f".*Use {holding}"):
        harvest(Given(activations), tmp_path, dtype)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.glob("shard*")) == ["shard_00000.safetensors"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_the_model_itself_gives_is_not_blamed_on_the_dtype(value: float, tmp_path: Path):
    activations = torch.zeros(4, 3)
    activations[1, 2] = value
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(
            ValueError, match=rf"'x', position 7, dimension 2 is {value:g}: the model itself gives that"
        ):
            harvest(Given(activations), tmp_path / str(dtype), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_harvest_into_float8_is_refused_at_once(dtype: torch.dtype, tmp_path: Path):
    with pytest.raises(TypeError, match=rf"got {dtype}. Activations are trained on in float16, bfloat16"):
        harvest(Given(torch.zeros(4, 3)), tmp_path / "store", dtype)  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


def test_a_harvest_killed_at_any_shard_goes_on_and_ends_the_same_to_the_byte(
    hooked: Any, windows: TokenWindows, tmp_path: Path
):
    n_blocks = len(harvest(sources(hooked, windows), tmp_path / "whole").block_rows)
    assert n_blocks >= 4
    for n in range(n_blocks):
        folder = tmp_path / str(n)
        with pytest.raises(Killed):
            harvest(sources(hooked, windows, dies_after=n), folder)
        assert len(list(folder.glob("shard_*.safetensors"))) == n
        with pytest.raises(ValueError, match="did not finish; run it again"):
            ActivationStore(folder)
        (folder / f".shard_{n:05d}.safetensors.tmp").write_bytes(b"half a shard")  # what SIGKILL leaves
        harvest(sources(hooked, windows, dies_after=n_blocks - n), folder)  # dies if a whole shard is made again
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_full_disk_costs_only_the_shard_that_did_not_fit(
    hooked: Any, windows: TokenWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    harvest(sources(hooked, windows), tmp_path / "whole")
    save, folder = safetensors.torch.save_file, tmp_path / "full"

    def save_until_full(tensors: dict[str, Tensor], path: Path) -> None:
        if len(list(folder.glob("shard_*"))) == 2:
            path.write_bytes(b"what still fitted")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", save_until_full)
    with pytest.raises(OSError, match="No space left on device"):
        harvest(sources(hooked, windows), folder)
    kept = contents(folder)
    assert set(kept) == {".lock", "index.json", "shard_00000.safetensors", "shard_00001.safetensors"}
    monkeypatch.undo()
    harvest(sources(hooked, windows), folder)
    assert contents(folder) == contents(tmp_path / "whole")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_shard_is_named_and_can_be_made_again(
    hooked: Any, windows: TokenWindows, tmp_path: Path, damage: Any
):
    store = harvest(sources(hooked, windows), tmp_path)
    whole, shard = contents(tmp_path), tmp_path / "shard_00002.safetensors"
    damage(shard)
    store.block(1)
    with pytest.raises(ValueError, match=r"shard_00002.safetensors.*[Rr]un the harvest again"):
        store.block(2)
    if shard.exists():  # harvesting over it does not make it pass for whole
        with pytest.raises(ValueError, match=r"shard_00002.safetensors is damaged"):
            harvest(sources(hooked, windows), tmp_path).block(2)
        shard.unlink()
    harvest(sources(hooked, windows), tmp_path).block(2)
    assert contents(tmp_path) == whole


def test_a_shard_truncated_while_the_harvest_was_unfinished_is_named_too(
    hooked: Any, windows: TokenWindows, tmp_path: Path
):
    with pytest.raises(Killed):
        harvest(sources(hooked, windows, dies_after=2), tmp_path)
    truncate(tmp_path / "shard_00001.safetensors")
    with pytest.raises(ValueError, match=r"shard_00001.safetensors is damaged.*Delete it"):
        harvest(sources(hooked, windows), tmp_path).block(1)


def test_a_finished_harvest_is_not_computed_or_written_again(hooked: Any, windows: TokenWindows, tmp_path: Path):
    harvest(sources(hooked, windows), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard_*")}
    harvest(sources(hooked, windows, dies_after=0), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard_*")} == before


def test_a_folder_with_another_harvest_is_left_alone_and_says_what_differs(
    hooked: Any, windows: TokenWindows, tokenizer: Any, tmp_path: Path
):
    harvest(sources(hooked, windows), tmp_path)
    before = contents(tmp_path)
    retrained = copy.deepcopy(hooked)
    with torch.no_grad():
        retrained.blocks[0].mlp.b_out += 1
    other_text = tokenize(DOCUMENTS[::-1], tokenizer, CONTEXT)
    for differs, source in {
        "hook_name is 'blocks.1.hook_resid_post' there, 'blocks.1.hook_mlp_out' now": ModelActivations(
            hooked, "blocks.1.hook_mlp_out", windows, 4
        ),
        "tokens is": sources(hooked, other_text),
        "weights is": sources(retrained, windows),  # of the same name and shape
        "batch_windows is 4 there, 5 now": ModelActivations(hooked, HOOK, windows, 5),
    }.items():
        with pytest.raises(ValueError, match=f"holds another harvest: .*{differs}"):
            harvest(source, tmp_path)
    with pytest.raises(ValueError, match="dtype is 'float32' there, 'bfloat16' now"):
        harvest(sources(hooked, windows), tmp_path, torch.bfloat16)
    assert contents(tmp_path) == before


def test_a_folder_that_is_no_store_is_refused(hooked: Any, windows: TokenWindows, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no activation store: there is no index.json"):
        ActivationStore(tmp_path)
    harvest(sources(hooked, windows), tmp_path)
    index = tmp_path / "index.json"
    for written, message in {
        "{": "is damaged: not valid JSON",
        "[]": "has format list",
        '{"format": 99}': "has format 99",
    }.items():
        index.write_text(written)
        with pytest.raises(ValueError, match=rf"index.json {message}"):
            ActivationStore(tmp_path)
        with pytest.raises(ValueError, match=rf"index.json {message}"):
            harvest(sources(hooked, windows), tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match="shards of an unknown harvest"):
        harvest(sources(hooked, windows), tmp_path)


# ---- stream -------------------------------------------------------------------------------------------------------


class Numbered:
    """Blocks of uneven size whose rows are numbered."""

    d_in = 3
    block_rows = (13, 7, 20, 1, 16, 9, 14, 20)
    n_rows = sum(block_rows)

    def block(self, i: int) -> Tensor:
        first = sum(self.block_rows[:i])
        return torch.arange(first, first + self.block_rows[i]).float()[:, None].repeat(1, self.d_in)


class Watched(Numbered):
    """Counts the rows that are in memory when a block is asked for."""

    most_held = 0

    def block(self, i: int) -> Tensor:
        self.most_held = max(self.most_held, self._held())
        return super().block(i)

    def _held(self) -> int:
        """Rows of all memory that float tensors of this width hold, views counted by what they keep alive."""
        tensors = [t for t in gc.get_objects() if type(t) is Tensor and t.dtype == torch.float32]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors
            if t.dim() == 2 and t.shape[1] == self.d_in
        }
        return sum(storages.values()) // (4 * self.d_in)


def numbers(batches: Any) -> list[list[int]]:
    return [batch[:, 0].int().tolist() for batch in batches]


@pytest.mark.parametrize("batch_size", [1, 6, 20, 33, 100])
@pytest.mark.parametrize("buffer_rows", [1, 30, 1000])
def test_every_row_comes_once_an_epoch_in_a_new_order(batch_size: int, buffer_rows: int):
    batches = numbers(ActivationStream(Numbered(), batch_size, buffer_rows, epochs=3))
    assert {len(batch) for batch in batches} == {batch_size}
    assert len(batches) == 3 * Numbered.n_rows // batch_size
    rows = [row for batch in batches for row in batch]
    first, second = rows[: Numbered.n_rows], rows[Numbered.n_rows : 2 * Numbered.n_rows]
    assert sorted(first) == sorted(second) == list(range(Numbered.n_rows))
    assert first != second


def test_rows_are_mixed_within_the_buffer_and_blocks_over_the_epoch():
    rows = [row for batch in numbers(ActivationStream(Numbered(), 5, 1000, epochs=1)) for row in batch]
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(rows))
    assert neighbours < 10  # 99 in order; two expected of a permutation
    by_block = [row for batch in numbers(ActivationStream(Numbered(), 1, 1, epochs=1)) for row in batch]
    starts = [sum(Numbered.block_rows[:i]) for i in range(len(Numbered.block_rows))]
    order = [max(s for s in starts if s <= row) for row in by_block]
    assert list(dict.fromkeys(order)) != starts


def test_the_seed_decides_the_order():
    runs = [numbers(ActivationStream(Numbered(), 10, 30, seed=seed, epochs=2)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize(("batch_size", "buffer_rows"), [(7, 30), (50, 20), (20, 1000)])
def test_a_stream_set_back_goes_on_with_the_same_bits_from_every_batch(batch_size: int, buffer_rows: int):
    def stream() -> ActivationStream:
        return ActivationStream(Numbered(), batch_size, buffer_rows, seed=3, epochs=3)

    running, states = stream(), []
    whole = []
    for batch in running:
        states.append(json.loads(json.dumps(running.state_dict())))
        whole.append(batch)
    assert {state["epoch"] for state in states} >= {0, 1, 2}
    for done, state in enumerate(states, start=1):
        resumed = stream()
        resumed.load_state_dict(state)
        assert numbers(resumed) == numbers(whole[done:])
    running.load_state_dict(states[0])  # backwards, in a stream that has a buffer filled
    assert numbers(running) == numbers(whole[1:])


def test_no_more_than_the_buffer_and_a_block_is_held():
    source = Watched()
    batch_size, buffer_rows = 6, 30
    gc.collect()
    gc.freeze()  # so that only objects made from here on are looked at
    try:
        for batch in ActivationStream(source, batch_size, buffer_rows, epochs=4):
            del batch
    finally:
        gc.unfreeze()
    # The buffer ends with a whole block; when its last block is asked for, a part of a batch waits beside it.
    assert buffer_rows <= source.most_held <= buffer_rows + max(source.block_rows) + batch_size


def test_blocks_are_read_when_their_buffer_is_needed_and_not_before():
    class Recorded(Numbered):
        block_rows = (10,) * 20
        read: list[int] = []  # noqa: RUF012

        def block(self, i: int) -> Tensor:
            self.read.append(i)
            return super().block(i)

    source = Recorded()
    stream = ActivationStream(source, 5, 30)
    counts = [len(source.read)]
    for _ in range(7):
        next(stream)
        counts.append(len(source.read))
    assert counts == [0, 3, 3, 3, 3, 3, 3, 6]


def test_a_batch_stays_what_it_was():
    stream = ActivationStream(Numbered(), 4, 10, epochs=2)
    batch = next(stream)
    before = batch.clone()
    for later in stream:
        later.zero_()  # nor does writing into one change another
    torch.testing.assert_close(batch, before, rtol=0, atol=0)
    assert sorted(n for b in numbers(ActivationStream(Numbered(), 4, 10, epochs=1)) for n in b) == list(range(100))


def test_on_the_fly_and_through_the_store_are_the_same_stream(model: Any, windows: TokenWindows, tmp_path: Path):
    source = sources(model, windows)
    store = harvest(source, tmp_path)
    fly, stored = (ActivationStream(s, 9, 50, seed=1, epochs=2) for s in (source, store))
    first = next(fly)
    torch.testing.assert_close(first, next(stored), rtol=0, atol=0)
    stored.load_state_dict(fly.state_dict())  # so a run may go on from the store
    rest = list(fly)
    torch.testing.assert_close(rest, list(stored), rtol=0, atol=0)
    epoch = torch.cat([first, *rest])[: source.n_rows]
    everything = all_rows(store)
    want = torch.unique(everything, dim=0, return_counts=True)
    assert len(want[0]) > len(everything) / 2
    torch.testing.assert_close(torch.unique(epoch, dim=0, return_counts=True), want, rtol=0, atol=0)


def test_a_position_in_another_stream_or_source_is_refused(hooked: Any, windows: TokenWindows):
    state = ActivationStream(Numbered(), 7, 30, seed=3).state_dict()
    for message, other in {
        "seed was 3, is 4": ActivationStream(Numbered(), 7, 30, seed=4),
        "batch_size was 7, is 8": ActivationStream(Numbered(), 8, 30, seed=3),
        "buffer_rows was 30, is 31": ActivationStream(Numbered(), 7, 31, seed=3),
        "n_rows was 100, is": ActivationStream(sources(hooked, windows), 7, 30, seed=3),
    }.items():
        with pytest.raises(ValueError, match=f"belongs to another stream: .*{message}"):
            other.load_state_dict(state)
    state = ActivationStream(sources(hooked, windows), 7, 30).state_dict()
    same_shape = ActivationStream(ModelActivations(hooked, "blocks.0.hook_resid_post", windows, 4), 7, 30)
    with pytest.raises(ValueError, match=r"hook_name was blocks.1.hook_resid_post, is blocks.0.hook_resid_post"):
        same_shape.load_state_dict(state)


def test_a_stream_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="batch_size must be between 1 and the source's 100 rows; got 101"):
        ActivationStream(Numbered(), 101)
    with pytest.raises(ValueError, match="got 0"):
        ActivationStream(Numbered(), 0)
    with pytest.raises(ValueError, match="buffer_rows must be at least 1; got 0"):
        ActivationStream(Numbered(), 5, 0)


def test_two_harvests_into_one_folder(hooked: Any, windows: TokenWindows, tmp_path: Path):
    with (
        files.locked(tmp_path, "another harvest"),
        pytest.raises(RuntimeError, match="harvest: another process is writ"),
    ):
        harvest(sources(hooked, windows), tmp_path)
    harvest(sources(hooked, windows), tmp_path)


def test_who_is_refused_leaves_the_lock_as_it_is(tmp_path: Path):
    """The processes of one run look there for the text that the lock's holder writes."""
    with files.locked(tmp_path, "run"):
        (tmp_path / files.LOCK).write_text("token")
        with pytest.raises(RuntimeError, match="another process"), files.locked(tmp_path, "another"):
            pass
        assert (tmp_path / files.LOCK).read_text() == "token"


def test_a_harvest_into_whole_numbers_is_refused(hooked: Any, windows: TokenWindows, tmp_path: Path):
    with pytest.raises(TypeError, match=r"float dtype; got torch\.int8"):
        harvest(sources(hooked, windows), tmp_path, torch.int8)
    with pytest.raises(ValueError, match="batch_windows of at least 1; got 0"):
        ModelActivations(hooked, HOOK, windows, batch_windows=0)


@pytest.mark.parametrize(
    "index",
    [
        {"format": 1},
        {"format": 1, "identity": {}, "documents": [], "shards": []},
        {"format": 1, "identity": 7, "documents": [], "shards": []},
        {"format": 1, "identity": {"d_in": 8}, "documents": []},
        {"format": 1, "identity": {"d_in": 8}, "shards": []},
    ],
)
def test_an_index_that_lacks_parts(index: dict, tmp_path: Path):
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json is damaged: .* is missing or wrong; harvest again"):
        ActivationStore(tmp_path)


def test_windows_spread_over_a_document(tokenizer):
    words = "the a cat dog sat ran on under mat tree and then quickly slowly".split()  # noqa: SIM905  # as in tiny_lm
    documents = [Document("long", " ".join(words * 5)), Document("short", "the cat"), Document("last", "a dog sat")]
    windows = tokenize(documents, tokenizer, 8, held_out=None, max_windows_per_document=3)
    everything = tokenize(documents, tokenizer, 8, held_out=None)
    assert windows.documents.tolist() == [0, 0, 0, 1, 2]
    assert torch.equal(windows.tokens[:3], everything.tokens[[1, 5, 8]])
    assert windows.lengths.tolist() == [8, 8, 8, 3, 4]
    capped = tokenize(documents, tokenizer, 8, 16, held_out=None, max_windows_per_document=2)
    assert capped.lengths.tolist() == [8, 8, 3]
    with pytest.raises(ValueError, match="max_windows_per_document of at least 1; got 0"):
        tokenize(documents, tokenizer, 8, held_out=None, max_windows_per_document=0)
