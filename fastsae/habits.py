"""Names that people type by habit, from other libraries, and what the same thing is called here."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C", bound=type)

_EXPANSION = "d_sae, as a number of features: {0} * d_in"
_NO_PENALTY = "no such thing: TopK needs no penalty, k sets how many features are active"
_BATCH = "where activations come from: fastsae.batches(x, {0}), DataConfig(batch_size={0})"
_CALLED = {
    **dict.fromkeys(("learning_rate", "max_lr", "base_lr"), "lr"),
    **dict.fromkeys(("n_steps", "num_steps", "max_steps", "total_steps", "training_steps", "train_steps"), "steps"),
    **dict.fromkeys(("warmup", "lr_warmup_steps", "lr_warm_up_steps", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("lr_decay_steps", "decay", "cooldown_steps"), "decay_steps"),
    **dict.fromkeys(("adam_betas", "beta1", "beta2"), "betas"),
    **dict.fromkeys(("adam_eps", "adam_epsilon", "epsilon"), "eps"),
    **dict.fromkeys(
        ("max_grad_norm", "grad_clip", "gradient_clip", "clip_grad", "gradient_clipping"), "clip_grad_norm"
    ),
    **dict.fromkeys(("normalize_activations", "normalise", "normalization"), "normalize"),
    **dict.fromkeys(("auxk_alpha", "aux_loss_coefficient", "aux_coef", "aux_alpha"), "auxk_coefficient"),
    **dict.fromkeys(("k_aux", "aux_k", "top_k_aux"), "auxk"),
    **dict.fromkeys(("dead_feature_threshold", "dead_feature_window", "dead_feature_tokens"), "dead_after_tokens"),
    **dict.fromkeys(
        ("out_dir", "output_dir", "output_path", "checkpoint_path", "save_dir", "checkpoint_dir"), "run_dir"
    ),
    **dict.fromkeys(("save_every", "checkpoint_interval", "save_steps"), "checkpoint_every"),
    **dict.fromkeys(("log_interval", "log_steps", "logging_steps"), "log_every"),
    **dict.fromkeys(("normalize_decoder", "decoder_norm", "normalize_w_dec"), "unit_norm_decoder"),
    **dict.fromkeys(
        ("d_model", "activation_dim", "d_input", "input_dim", "n_inputs", "input_size", "hook_dim"), "d_in"
    ),
    **dict.fromkeys(
        (
            "num_latents",
            "n_latents",
            "dict_size",
            "dictionary_size",
            "num_features",
            "n_features",
            "hidden_dim",
            "d_hidden",
        ),
        "d_sae",
    ),
    **dict.fromkeys(("n_dirs", "latent_dim", "num_dictionary_features", "width"), "d_sae"),
    **dict.fromkeys(("top_k", "topk", "n_active", "l0", "sparsity"), "k"),
    **dict.fromkeys(("apply_b_dec_to_input", "b_dec", "decoder_bias", "use_pre_bias", "tied_bias"), "pre_bias"),
    **dict.fromkeys(("embedding_dim", "d_embed", "embed_dim"), "d_embedding"),
    **dict.fromkeys(("dropout_p", "p_dropout", "dropout_rate"), "dropout"),
    **dict.fromkeys(("expansion_factor", "expansion", "multiple"), _EXPANSION),
    **dict.fromkeys(("l1_coefficient", "l1_coeff", "l1_penalty", "l1_weight", "sparsity_coefficient"), _NO_PENALTY),
    **dict.fromkeys(("batch_size", "train_batch_size", "train_batch_size_tokens", "bs"), _BATCH),
}


def named(cls: C) -> C:
    """Make a class say, where it is given a name that it does not know, what that is called here (a decorator).

    Raises TypeError, as Python does.
    """
    vars_of = vars(cls)
    if "__init__" in vars_of:
        cls.__init__ = _checked(cls.__name__, vars_of["__init__"])  # type: ignore[misc]
    return cls


def _checked(where: str, init: Callable[..., None]) -> Callable[..., None]:
    parameters = inspect.signature(init).parameters
    known = [name for name in parameters if name != "self"]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return init

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        for name, value in options.items():
            if name not in parameters:
                raise TypeError(f"{where} has no {name!r}: {_instead(name, value, known)}")
        init(self, *args, **options)

    return checked


def _instead(name: str, value: Any, known: list[str]) -> str:
    called = _CALLED.get(name.lower())
    if called in known:
        return f"it is called {called!r} here"
    if called is not None and not called.isidentifier():
        return f"here that is {called.format(value if isinstance(value, int) else 2048)}"
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(known)}"
