"""Names that people type by habit get the right one in the error."""

import pytest

import fastsae


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fastsae.TrainerConfig(steps=1, learning_rate=1),
            "TrainerConfig has no 'learning_rate': it is called 'lr'",
        ),
        (lambda: fastsae.TrainerConfig(n_steps=1), "TrainerConfig has no 'n_steps': it is called 'steps' here"),
        (
            lambda: fastsae.TrainerConfig(steps=1, batch_size=512),
            r"no 'batch_size': here that is where activations come from: fastsae.batches\(x, 512\)",
        ),
        (lambda: fastsae.TrainerConfig(steps=1, warmup_step=3), "no 'warmup_step': did you mean 'warmup_steps'?"),
        (lambda: fastsae.TrainerConfig(steps=1, colour=3), "no 'colour': expected some of steps, lr, run_dir"),
        (lambda: fastsae.TopKSAE(8, num_latents=16, k=2), "TopKSAE has no 'num_latents': it is called 'd_sae' here"),
        (
            lambda: fastsae.JointSAE(8, expansion_factor=32, k=2),
            r"JointSAE has no 'expansion_factor': here that is d_sae, as a number of features: 32 \* d_in",
        ),
        (lambda: fastsae.TopKSAE(8, 16, 2, l1_coefficient=0.1), "no such thing: TopK needs no penalty"),
        (
            lambda: fastsae.TopKSAEConfig(d_model=8, d_sae=16, k=2),
            "TopKSAEConfig has no 'd_model': it is called 'd_in'",
        ),
        (
            lambda: fastsae.SequentialSAE(8, 16, 2, embedding_dim=3),
            "JointSAE has no 'embedding_dim'.*'d_embedding' here",
        ),
    ],
)
def test_the_right_name_is_told(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_signatures_stay_as_they_are():
    import inspect

    assert list(inspect.signature(fastsae.TopKSAE).parameters)[:3] == ["d_in", "d_sae", "k"]
    assert "lr" in inspect.signature(fastsae.TrainerConfig).parameters
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        fastsae.TopKSAE(8, 16)
